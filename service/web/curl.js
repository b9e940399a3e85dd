// The command that reproduces the images: as pictures, or as arrays where they are none.

import { isPicture } from "./connect.js";
import * as key from "./key.js";

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(url, { fields, labels, each }, model) {
  const [accept, ending] = isPicture(model) ? ["image/png", "png"] : ["application/x-npy", "npy"];
  const call = (data, file) =>
    [
      `curl -sS ${quote(url)} \\`,
      ...(key.isSet() ? [`  -H "Authorization: Bearer $KEY" \\`] : []),
      `  -H 'Content-Type: application/json' -H 'Accept: ${accept}' \\`,
      `  -d ${data} \\`,
      `  -o ${file}`,
    ];
  if (each) {
    const body = JSON.stringify({ ...fields, class_label: 0 });
    const data = quote(body).replace('"class_label":0', `"class_label":'$c'`);
    const lines = call(data, `class-$c-seed-${fields.seed}.${ending}`).map((line) => `  ${line}`);
    return [`for c in ${labels.map((_, index) => index).join(" ")}; do`, ...lines, "done"].join("\n");
  }
  const [label] = labels;
  const body = label === null ? fields : { ...fields, class_label: label };
  const name = (label ?? "image").toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return call(quote(JSON.stringify(body)), `${name}-seed-${fields.seed}.${ending}`).join("\n");
}

// navigator.clipboard is missing on plain HTTP from another machine, where selecting still works.
export async function copy(element) {
  if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
  getSelection().selectAllChildren(element);
  if (!document.execCommand("copy")) throw new Error("copying was refused");
}
