// The command that reproduces the images.

import * as key from "./key.js";

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export function curl(url, { fields, labels, each }) {
  const call = (data, file) =>
    [
      `curl -sS ${quote(url)} \\`,
      ...(key.isSet() ? [`  -H "Authorization: Bearer $KEY" \\`] : []),
      `  -H 'Content-Type: application/json' -H 'Accept: image/png' \\`,
      `  -d ${data} \\`,
      `  -o ${file}`,
    ];
  if (each) {
    const body = JSON.stringify({ ...fields, class_label: 0 });
    const data = quote(body).replace('"class_label":0', `"class_label":'$c'`);
    const lines = call(data, `class-$c-seed-${fields.seed}.png`).map((line) => `  ${line}`);
    return [`for c in ${labels.map((_, index) => index).join(" ")}; do`, ...lines, "done"].join("\n");
  }
  const [label] = labels;
  const body = label === null ? fields : { ...fields, class_label: label };
  const name = (label ?? "image").toLowerCase().replace(/[^a-z0-9]+/g, "-");
  return call(quote(JSON.stringify(body)), `${name}-seed-${fields.seed}.png`).join("\n");
}

// navigator.clipboard is missing on plain HTTP from another machine, where selecting still works.
export async function copy(element) {
  if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
  getSelection().selectAllChildren(element);
  if (!document.execCommand("copy")) throw new Error("copying was refused");
}
