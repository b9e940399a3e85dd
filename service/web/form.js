// The form: filled from /info or an address, read as a request.

const $ = (id) => document.getElementById(id);

export const EACH = "each";
const NONE = "none";

export class Form {
  constructor(info, source) {
    Object.assign(this, { info, source });
    const { model, samplers, defaults, limits } = info;
    const classes = model.classes.map((name, index) => new Option(name, index));
    if (classes.length) classes.unshift(new Option("All classes", EACH));
    if (classes.length && model.guidance) classes.push(new Option("No class (unconditional)", NONE));
    $("class").replaceChildren(...classes);
    $("class-field").hidden = !classes.length;
    $("sampler").replaceChildren(...samplers.map((name) => new Option(name)));
    $("sampler").value = defaults.sampler;
    $("steps").max = model.timesteps;
    $("steps").value = defaults.num_inference_steps;
    $("eta").value = defaults.eta;
    $("guidance").min = Math.min(1, defaults.guidance_scale);
    $("guidance").max = Math.max(8, defaults.guidance_scale);
    $("guidance").value = defaults.guidance_scale;
    $("n").max = limits.max_images;
    // "Per class" and "in total" have different sensible numbers, so each keeps its own.
    this.counts = { [EACH]: 1, other: Math.min(8, limits.max_images) };
    $("n").addEventListener("input", () => (this.counts[this.kind] = $("n").value));
    $("class").addEventListener("change", () => this.update());
    $("sampler").addEventListener("change", () => this.useDefaultSteps());
    for (const id of ["guidance", "eta"]) $(id).addEventListener("input", () => this.update());
    $("seed").addEventListener("input", () => this.update());
    $("pin").addEventListener("click", () => this.pin($("seed").value === "" ? this.used : ""));
    this.update();
  }

  get kind() {
    return $("class").value === EACH ? EACH : "other";
  }

  useDefaultSteps() {
    $("steps").value = this.info.defaults.steps_by_sampler[$("sampler").value];
    this.update();
  }

  update() {
    const editing = this.source.image !== null;
    const each = [...$("class").options].find((option) => option.value === EACH);
    if (each) each.disabled = each.hidden = editing; // a picture is of one class
    if (editing && this.kind === EACH) $("class").value = this.info.model.guidance ? NONE : 0;
    if (this.limitSamplers()) return;
    const unconditional = $("class").value === NONE;
    $("n").value = this.counts[this.kind];
    $("n-label").textContent = this.kind === EACH ? "Images per class" : "Images";
    $("guidance-field").hidden = !this.info.model.guidance || unconditional;
    $("guidance-value").textContent = Number($("guidance").value).toFixed(1);
    const distilled = this.info.model.distilled_guidance !== null;
    $("eta-field").hidden = $("sampler").value !== "ddim" || distilled;
    $("eta-value").textContent = Number($("eta").value).toFixed(2);
    const pinned = $("seed").value !== "";
    $("pin").textContent = pinned ? "Unpin" : "Pin";
    $("seed-text").textContent = pinned ? "pinned" : `last: ${this.used}`;
    $("seed-used").hidden = !pinned && this.used === undefined;
  }

  // RePaint takes some samplers only. Whether another one had to be chosen, which updates the form.
  limitSamplers() {
    const possible = this.source.repaint ? this.info.editing.inpainting.samplers : this.info.samplers;
    for (const option of $("sampler").options) option.disabled = !possible.includes(option.value);
    if (possible.includes($("sampler").value)) return false;
    $("sampler").value = possible[0];
    this.useDefaultSteps();
    return true;
  }

  pin(seed) {
    $("seed").value = seed;
    this.update();
  }

  setUsed(seed) {
    this.used = seed;
    this.update();
  }

  choose(label) {
    const index = this.info.model.classes.indexOf(label);
    if (index >= 0) $("class").value = index;
    this.update();
  }

  // The request: {fields, images: [{label, seed}], source, values}; values are those of the address. Where no seed was
  // given it is chosen here, so that every class of one run starts from the same noise.
  read() {
    const { classes } = this.info.model;
    const seed = $("seed").value === "" ? randomSeed() : $("seed").valueAsNumber;
    const fields = { sampler: $("sampler").value, num_inference_steps: $("steps").valueAsNumber };
    if (!$("eta-field").hidden) fields.eta = $("eta").valueAsNumber;
    if (!$("guidance-field").hidden) fields.guidance_scale = $("guidance").valueAsNumber;
    const each = this.kind === EACH;
    const label = each || ["", NONE].includes($("class").value) ? null : classes[$("class").value];
    const n = $("n").valueAsNumber;
    const images = (each ? classes : [label]).flatMap((one) =>
      Array.from({ length: n }, (_, i) => ({ label: one, seed: seed + i })),
    );
    const source = this.source.fields && { fields: this.source.fields };
    const strength = source?.fields.strength;
    return { fields, images, source, values: { each, class_label: label, n, seed, ...fields, source, strength } };
  }

  // Takes the values of an address. Returns what is wrong with them, or an empty string.
  restore({ each, class_label: label, ...values }) {
    const { classes } = this.info.model;
    const index = classes.indexOf(label);
    if (label !== null && index < 0) return `The address names a class that this model does not have: ${label}.`;
    if (classes.length) $("class").value = each ? EACH : index >= 0 ? index : this.info.model.guidance ? NONE : EACH;
    if (values.sampler) {
      if (!this.info.samplers.includes(values.sampler)) return "The address names a sampler that this service does not have.";
      $("sampler").value = values.sampler;
      $("steps").value = this.info.defaults.steps_by_sampler[values.sampler];
    }
    if (values.n) this.counts[this.kind] = values.n;
    const inputs = { seed: "seed", num_inference_steps: "steps", guidance_scale: "guidance", eta: "eta", strength: "strength" };
    for (const [name, id] of Object.entries(inputs)) if (values[name]) $(id).value = values[name];
    this.update();
    const wrong = ["n", "seed", "steps"].find((id) => !$(id).validity.valid || (id !== "seed" && $(id).value === ""));
    return wrong ? "The address has a number that is not possible here; the form says which." : "";
  }

  // The tiles that a request would fill, without seeds, for the empty grid.
  placeholders() {
    const n = Math.min($("n").valueAsNumber || 1, this.info.limits.max_images);
    const labels = this.kind === EACH ? this.info.model.classes : [""];
    return labels.flatMap((label) => Array.from({ length: n }, () => ({ label })));
  }
}

// Below 2³¹, so that a person can copy it.
function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}
