// One press of Generate: a stream (several, where the service takes fewer images at a time) and its progress.

import { bodies, query } from "./request.js";
import { Problem, follow } from "./stream.js";
import { Trajectory } from "./trajectory.js";

const MAX_FRAMES = 100;
const MIN_FRAMES = 10;
const MEMORY = 96e6; // base64 characters kept for replay, over all images

export class Run {
  // request: {fields, images: [{label, seed}], source}. most: images per request.
  constructor(request, shape, most, onData) {
    Object.assign(this, { request, most, onData });
    const { fields, images, source } = request;
    const steps = fields.num_inference_steps;
    // How many steps an edit has is not known before its first preview.
    this.every = source ? null : previewEvery(steps, images.length, shape);
    this.trajectory = new Trajectory(images, steps, this.every);
    this.bodies = bodies(request, most);
    this.parts = this.bodies.map(() => ({ due: null, position: null }));
    this.controller = new AbortController();
    this.started = performance.now();
  }

  get stopped() {
    return this.controller.signal.aborted;
  }

  stop() {
    this.controller.abort();
  }

  // One part after another: together they may be more than the service has room for. Throws Problem.
  async drain() {
    try {
      for (const part of this.bodies.keys()) await this.runPart(part);
    } catch (error) {
      if (!this.stopped) throw error;
    } finally {
      this.seconds = (performance.now() - this.started) / 1000;
    }
  }

  async runPart(part) {
    for await (const { type, data } of this.events(this.bodies[part])) {
      if (type === "error") throw new Problem(data);
      this.apply(part, type, data);
      this.onData();
    }
    this.parts[part] = { due: 0, position: null };
  }

  events(fields) {
    const body = { ...fields, preview: "both", output_format: "png" };
    if (this.request.source) return follow("edit", this.controller.signal, body);
    return follow(`stream?${query({ ...body, preview_every: this.every })}`, this.controller.signal);
  }

  apply(part, type, data) {
    const state = this.parts[part];
    const first = part * this.most;
    if (data.eta_s != null) state.due = performance.now() + data.eta_s * 1000;
    state.position = type === "queued" ? data.position : null;
    if (data.steps) this.trajectory.expect(data.steps);
    for (const { index, seed, kind, b64_json, media_type } of data.images ?? []) {
      const url = `data:${media_type};base64,${b64_json}`;
      this.trajectory.images[first + index].seed = seed;
      if (type === "preview") this.trajectory.record(first + index, { ...data, kind, url });
      else if (type === "completed") this.trajectory.finish(first + index, url);
    }
  }

  // Seconds remaining; null while unknown. The service's estimate once every part has one, else an extrapolation.
  get remaining() {
    const now = performance.now();
    if (this.parts.every(({ due }) => due !== null)) {
      return Math.max(0, ...this.parts.map(({ due }) => due - now)) / 1000;
    }
    const { fraction } = this.trajectory;
    return fraction > 0.02 ? ((now - this.started) * (1 - fraction)) / fraction / 1000 : null;
  }

  get position() {
    const positions = this.parts.map(({ position }) => position).filter(Boolean);
    return this.trajectory.fraction === 0 && positions.length ? Math.min(...positions) : null;
  }
}

// Both images of every frame stay in memory, so large images get fewer frames.
function previewEvery(steps, images, { width, height, channels }) {
  const frame = 2 * images * width * height * channels * 1.4;
  const frames = Math.min(MAX_FRAMES, Math.max(MIN_FRAMES, Math.floor(MEMORY / frame)));
  return Math.ceil(steps / frames);
}
