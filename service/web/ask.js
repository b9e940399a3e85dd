// Finished images, without watching them being made.

import * as key from "./key.js";
import { Problem } from "./stream.js";

// fields: of a request to /generate. The images as data: URLs.
export async function draw(fields, signal) {
  const headers = { "Content-Type": "application/json", ...key.headers() };
  const response = await fetch("generate", { method: "POST", headers, body: JSON.stringify(fields), signal }).catch(
    (error) => {
      throw error instanceof TypeError ? new Problem({ title: "The service cannot be reached" }) : error;
    },
  );
  if (!response.ok) throw await Problem.from(response);
  const { images } = await response.json();
  return images.map(({ media_type, b64_json }) => `data:${media_type};base64,${b64_json}`);
}
