// Finished images, without previews.

import * as key from "./key.js";
import { Problem } from "./stream.js";

// fields: the body of a /generate request. Returns the images as data: URLs, of pictures unless the fields say otherwise.
export async function generate(fields, signal) {
  const headers = { "Content-Type": "application/json", ...key.headers() };
  const response = await fetch("generate", { method: "POST", headers, body: JSON.stringify({ output_format: "png", ...fields }), signal }).catch(
    (error) => {
      throw error instanceof TypeError ? new Problem({ title: "The service cannot be reached" }) : error;
    },
  );
  if (!response.ok) throw await Problem.from(response);
  const { images } = await response.json();
  return images.map(({ media_type, b64_json }) => `data:${media_type};base64,${b64_json}`);
}
