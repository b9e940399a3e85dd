// One press of Generate: a request per class, their streams, and how far they are.

import { Problem, follow } from "./stream.js";
import { Trajectory } from "./trajectory.js";

// A browser opens six connections to one HTTP/1.1 host; one stays free for the rest of the page.
const LANES = 5;
const MOST_FRAMES = 100;
const FEWEST_FRAMES = 10;
const MEMORY = 96e6; // characters of base64 kept for replay, all images together

export class Run {
  constructor(order, shape, { onData, onFailure }) {
    const { fields, labels, each } = order;
    Object.assign(this, { order, onData, onFailure });
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
    const waiting = this.order.labels.keys();
    const lane = async () => {
      for (const part of waiting) {
        if (this.stopped) return;
        await this.part(part);
      }
    };
    await Promise.all(Array.from({ length: LANES }, lane));
    this.seconds = (performance.now() - this.started) / 1000;
  }

  async part(part) {
    const label = this.order.labels[part];
    const query = new URLSearchParams({ ...this.order.fields, preview: "both", preview_every: this.every });
    if (label !== null) query.set("class_label", label);
    try {
      for await (const { type, data } of follow(`stream?${query}`, this.controller.signal)) {
        if (type === "error") throw new Problem(data);
        this.take(part, type, data);
        this.onData();
      }
    } catch (error) {
      if (this.stopped) return;
      const named = this.order.each ? `${label}: ` : "";
      this.onFailure(named + (error instanceof Problem ? error.message : `This page failed. ${error.message}`));
    } finally {
      this.parts[part].due = 0;
      this.parts[part].position = null;
    }
  }

  take(part, type, data) {
    const state = this.parts[part];
    const first = part * this.order.fields.n;
    if (data.eta_s != null) state.due = performance.now() + data.eta_s * 1000;
    state.position = type === "queued" ? data.position : null;
    for (const { index, seed, kind, b64_json, media_type } of data.images ?? []) {
      const url = `data:${media_type};base64,${b64_json}`;
      this.trajectory.images[first + index].seed = seed;
      if (type === "preview") this.trajectory.record(first + index, { ...data, kind, url });
      else if (type === "completed") this.trajectory.finish(first + index, url);
    }
  }

  // In seconds; null while nothing is known. The service's word where it has given it for every part, else our own.
  get left() {
    const now = performance.now();
    if (this.parts.every(({ due }) => due !== null)) {
      return Math.max(0, ...this.parts.map(({ due }) => due - now)) / 1000;
    }
    const { fraction } = this.trajectory;
    return fraction > 0.02 ? ((now - this.started) * (1 - fraction)) / fraction / 1000 : null;
  }

  get position() {
    const places = this.parts.map(({ position }) => position).filter(Boolean);
    return this.trajectory.fraction === 0 && places.length ? Math.min(...places) : null;
  }
}

// Both pictures of every frame stay in memory, so large images get fewer frames.
function previewEvery(steps, images, { width, height, channels }) {
  const frame = 2 * images * width * height * channels * 1.4;
  const frames = Math.min(MOST_FRAMES, Math.max(FEWEST_FRAMES, Math.floor(MEMORY / frame)));
  return Math.ceil(steps / frames);
}
