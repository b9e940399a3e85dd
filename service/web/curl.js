// The commands that reproduce the images: as pictures, or as arrays where they are none.

import { isPicture } from "./connect.js";
import * as key from "./key.js";
import { bodies } from "./request.js";

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// base: the address of the service. most: images per request.
export function curl(base, request, model, most) {
  const [accept, ending] = isPicture(model) ? ["image/png", "png"] : ["application/x-npy", "npy"];
  const all = bodies(request, most);
  return all
    .map((body, i) => {
      const name = fileName(request.images.slice(i * most, (i + 1) * most)) + (all.length > 1 ? `-${i + 1}` : "");
      return [
        `curl -sS ${quote(new URL(request.source ? "edit" : "generate", base).href)} \\`,
        ...(key.isSet() ? [`  -H "Authorization: Bearer $KEY" \\`] : []),
        `  -H 'Accept: ${accept}' \\`,
        ...(request.source ? form(body) : [`  -H 'Content-Type: application/json' \\`, `  -d ${quote(JSON.stringify(body))} \\`]),
        `  -o ${name}.${ending}`,
      ].join("\n");
    })
    .join("\n");
}

// The pictures are files, which the page offers beside the command.
function form(body) {
  const files = ["image", "mask"].filter((name) => body[name]).map((name) => `  -F ${name}=@${name}.png \\`);
  const fields = Object.entries(body).filter(([name]) => name !== "image" && name !== "mask");
  return [...files, ...fields.map(([name, value]) => `  -F ${quote(`${name}=${value}`)} \\`)];
}

// Of the file that images are saved in.
export function fileName(images) {
  const [{ label, seed }] = images;
  const name = images.every((image) => image.label === label) ? (label ?? "image") : "images";
  return `${name.toLowerCase().replace(/[^a-z0-9]+/g, "-")}-seed-${seed}`;
}
