// One seed in a table of samplers and step counts, and the same seeds over the guidance scale.

import { generate } from "./generate.js";

const STEP_COUNTS = [4, 8, 16, 32];
const DISTILLED_COUNTS = [1, 2, 4, 8];
const CONCURRENCY = 4; // a browser opens six connections to one HTTP/1.1 host
const SEEDS = 6;
const GUIDED_STEPS = 20;

const $ = (id) => document.getElementById(id);

export class SamplerComparison {
  constructor({ samplers, model }) {
    const counts = model.distilled_guidance === null ? STEP_COUNTS : DISTILLED_COUNTS;
    this.counts = counts.filter((count) => count <= model.timesteps);
    this.samplers = samplers;
    const head = this.counts.map((count) => cell("th", named(count), "col"));
    $("counts").replaceChildren(document.createElement("td"), ...head);
    this.frames = samplers.map(() => this.counts.map(() => frame()));
    const rows = samplers.map((sampler, i) => {
      const row = document.createElement("tr");
      row.append(cell("th", sampler, "row"), ...this.frames[i].map((item) => cell("td", item)));
      return row;
    });
    $("samplers").replaceChildren(...rows);
  }

  // fields: {seed, class_label?}. The fewest steps first: those images are ready soonest.
  async run(fields, signal) {
    const jobs = this.counts.flatMap((steps, column) =>
      this.samplers.map((sampler, row) => ({ steps, sampler, target: this.frames[row][column] })),
    );
    for (const { target } of jobs) target.classList.add("stale");
    const queue = jobs.values();
    const consume = async () => {
      for (const { steps, sampler, target } of queue) {
        const [url] = await generate({ ...fields, sampler, num_inference_steps: steps }, signal);
        show(target, url, `${sampler}, ${named(steps)}, seed ${fields.seed}`);
      }
    };
    await Promise.all(Array.from({ length: CONCURRENCY }, consume));
  }
}

export class GuidanceComparison {
  constructor({ model, samplers, defaults, limits }) {
    this.steps = Math.min(GUIDED_STEPS, model.timesteps);
    this.sampler = samplers.includes("dpmpp_2m") ? "dpmpp_2m" : defaults.sampler;
    this.frames = Array.from({ length: Math.min(SEEDS, limits.max_images) }, () => frame());
    this.cache = new Map(); // request body → images
    $("seeds").replaceChildren(...this.frames.map((item) => cell("li", item)));
  }

  async run(fields, scale, signal) {
    const request = {
      ...fields,
      n: this.frames.length,
      sampler: this.sampler,
      num_inference_steps: this.steps,
      guidance_scale: scale,
    };
    const name = JSON.stringify(request);
    if (!this.cache.has(name)) {
      for (const item of this.frames) item.classList.add("stale");
      this.cache.set(name, await generate(request, signal));
    }
    this.cache.get(name).forEach((url, i) => show(this.frames[i], url, `seed ${fields.seed + i}, guidance ${scale}`));
  }
}

function named(steps) {
  return steps === 1 ? "1 step" : `${steps} steps`;
}

function frame() {
  const element = Object.assign(document.createElement("span"), { className: "frame" });
  element.append(Object.assign(new Image(), { alt: "", hidden: true }));
  return element;
}

function show(element, url, alt) {
  Object.assign(element.firstChild, { src: url, alt, title: alt, hidden: false });
  element.classList.remove("stale");
}

function cell(name, content, scope) {
  const element = document.createElement(name);
  if (scope) element.scope = scope;
  element.append(content);
  return element;
}
