// What is asked of the service: images, each with a class and a seed, and the fields that they share. No DOM in here.

// One body for each request of at most `most` images. request: {fields, images: [{label, seed}], source}.
export function bodies({ fields, images, source }, most) {
  const parts = [];
  for (let first = 0; first < images.length; first += most) parts.push(images.slice(first, first + most));
  return parts.map((part) => ({ ...fields, ...source?.fields, ...which(part) }));
}

// Lists have an entry for each image; they are needed where the seeds do not follow each other.
function which(images) {
  const [{ label, seed }] = images;
  const alike = images.every((image, i) => image.label === label && image.seed === seed + i);
  if (!alike) return { class_label: images.map((image) => image.label), seed: images.map((image) => image.seed) };
  return { n: images.length, seed, ...(label !== null && { class_label: label }) };
}

// A body as a query: the entries of a list are parameters of the same name.
export function query(body) {
  const pairs = Object.entries(body).flatMap(([name, value]) => [value].flat().map((each) => [name, each]));
  return new URLSearchParams(pairs);
}
