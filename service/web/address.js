// The form in the page's address, so that a link makes the same images. No DOM in here.

const ALL = "all";
const PICTURE = "picture";
const NUMBERS = ["n", "seed", "num_inference_steps", "guidance_scale", "eta", "strength"];

// values: {each, class_label, sampler, and those of NUMBERS}, null or absent where they do not apply; source: whether
// images are made from a picture, which itself has no room in an address.
export function write(values) {
  const query = new URLSearchParams();
  if (values.each) query.set("classes", ALL);
  else if (values.class_label != null) query.set("class_label", values.class_label);
  if (values.sampler) query.set("sampler", values.sampler);
  for (const name of NUMBERS) if (values[name] != null) query.set(name, values[name]);
  if (values.source) query.set("from", PICTURE);
  return query.toString();
}

// The same values; null where an address asks for nothing.
export function read(search) {
  const query = new URLSearchParams(search);
  const values = {
    each: query.get("classes") === ALL,
    class_label: query.get("class_label"),
    sampler: query.get("sampler"),
    source: query.get("from") === PICTURE,
  };
  for (const name of NUMBERS) values[name] = query.get(name);
  return Object.values(values).some(Boolean) ? values : null;
}
