// The form: filled from /info, read as the fields of a request.

const $ = (id) => document.getElementById(id);

export const EACH = "each";
const NONE = "none";

export class Form {
  constructor(info) {
    this.info = info;
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
    $("sampler").addEventListener("change", () => {
      $("steps").value = defaults.steps_by_sampler[$("sampler").value];
      this.update();
    });
    for (const id of ["guidance", "eta"]) $(id).addEventListener("input", () => this.update());
    $("seed").addEventListener("input", () => this.update());
    $("pin").addEventListener("click", () => this.pin($("seed").value === "" ? this.used : ""));
    this.update();
  }

  get kind() {
    return $("class").value === EACH ? EACH : "other";
  }

  update() {
    const each = this.kind === EACH;
    const unconditional = $("class").value === NONE;
    $("n").value = this.counts[this.kind];
    $("n-label").textContent = each ? "Images per class" : "Images";
    $("guidance-field").hidden = !this.info.model.guidance || unconditional;
    $("guidance-value").textContent = Number($("guidance").value).toFixed(1);
    $("eta-field").hidden = $("sampler").value !== "ddim";
    $("eta-value").textContent = Number($("eta").value).toFixed(2);
    const pinned = $("seed").value !== "";
    $("pin").textContent = pinned ? "Unpin" : "Pin";
    $("seed-text").textContent = pinned ? "pinned" : `last: ${this.used}`;
    $("seed-used").hidden = !pinned && this.used === undefined;
  }

  pin(seed) {
    $("seed").value = seed;
    this.update();
  }

  setUsed(seed) {
    this.used = seed;
    this.update();
  }

  // The fields of the requests, and their classes: one request for each of `labels`.
  read() {
    const { model } = this.info;
    const fields = { n: $("n").valueAsNumber, seed: $("seed").value === "" ? randomSeed() : $("seed").valueAsNumber };
    fields.sampler = $("sampler").value;
    fields.num_inference_steps = $("steps").valueAsNumber;
    if (!$("eta-field").hidden) fields.eta = $("eta").valueAsNumber;
    if (!$("guidance-field").hidden) fields.guidance_scale = $("guidance").valueAsNumber;
    const chosen = $("class").value;
    if (chosen === EACH) return { fields, labels: model.classes, each: true };
    const named = chosen !== "" && chosen !== NONE;
    return { fields, labels: [named ? model.classes[chosen] : null], each: false };
  }

  // The tiles that a request would fill, without seeds, for the empty grid.
  placeholders() {
    const n = Math.min($("n").valueAsNumber || 1, this.info.limits.max_images);
    const labels = this.kind === EACH ? this.info.model.classes : [""];
    return labels.flatMap((label) => Array.from({ length: n }, () => ({ label })));
  }
}

// Chosen here, so that every class of one run starts from the same noise.
function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}
