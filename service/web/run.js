// One press of Generate: a request per class, their streams, and their progress.

import { Problem, follow } from "./stream.js";
import { Trajectory } from "./trajectory.js";

// A browser opens six connections to one HTTP/1.1 host; one stays free for the rest of the page.
const CONCURRENCY = 5;
const MAX_FRAMES = 100;
const MIN_FRAMES = 10;
const MEMORY = 96e6; // base64 characters kept for replay, over all images

export class Run {
  constructor(request, shape, { onData, onFailure }) {
    const { fields, labels, each } = request;
    Object.assign(this, { request, onData, onFailure });
    const images = labels.flatMap((label) =>
      Array.from({ length: fields.n }, (_, i) => ({ label: each ? label : "", seed: fields.seed + i })),
    );
    this.every = previewEvery(fields.num_inference_steps, images.length, shape);
    this.trajectory = new Trajectory(images, fields.num_inference_steps, this.every);
    this.parts = labels.map(() => ({ due: null, position: null }));
    this.controller = new AbortController();
    this.started = performance.now();
  }

  get stopped() {
    return this.controller.signal.aborted;
  }

  stop() {
    this.controller.abort();
  }

  async drain() {
    const queue = this.request.labels.keys();
    const consume = async () => {
      for (const part of queue) {
        if (this.stopped) return;
        await this.runPart(part);
      }
    };
    await Promise.all(Array.from({ length: CONCURRENCY }, consume));
    this.seconds = (performance.now() - this.started) / 1000;
  }

  async runPart(part) {
    const label = this.request.labels[part];
    const shown = { preview: "both", preview_every: this.every, output_format: "png" };
    const query = new URLSearchParams({ ...this.request.fields, ...shown });
    if (label !== null) query.set("class_label", label);
    try {
      for await (const { type, data } of follow(`stream?${query}`, this.controller.signal)) {
        if (type === "error") throw new Problem(data);
        this.apply(part, type, data);
        this.onData();
      }
    } catch (error) {
      if (this.stopped) return;
      const prefix = this.request.each ? `${label}: ` : "";
      this.onFailure(prefix + (error instanceof Problem ? error.message : `Error in the page: ${error.message}`));
    } finally {
      this.parts[part].due = 0;
      this.parts[part].position = null;
    }
  }

  apply(part, type, data) {
    const state = this.parts[part];
    const first = part * this.request.fields.n;
    if (data.eta_s != null) state.due = performance.now() + data.eta_s * 1000;
    state.position = type === "queued" ? data.position : null;
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
