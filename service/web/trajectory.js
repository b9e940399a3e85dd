// Every preview received, by image, for replay. No DOM in here.

export class Trajectory {
  // images: [{label, seed}]; stops: the steps that the scrubber moves over. They are those that a preview is expected at
  // where it is known how often one comes (`every`), else those that have come.
  constructor(images, steps, every) {
    this.images = images.map((image) => ({ ...image, frames: [], done: 0 }));
    this.steps = steps;
    this.every = every;
    this.stops = [];
    for (let step = every; every && step < steps; step += every) this.stops.push(step);
    this.stops.push(steps);
    this.timesteps = new Map();
  }

  // The steps of the chain, as the service counts them: an edit has fewer, or more, than were asked for.
  expect(steps) {
    if (steps === this.steps) return;
    this.stops = [...this.stops.filter((stop) => stop < steps && stop !== this.steps), steps];
    this.steps = steps;
  }

  record(index, { step, timestep, kind, url }) {
    const { frames } = this.images[index];
    // A resumed stream may repeat a step; x0 and x_t of one step arrive as two images.
    let at = frames.findLastIndex((frame) => frame.step <= step);
    if (frames[at]?.step !== step) frames.splice(++at, 0, { step });
    frames[at][kind] = url;
    if (timestep !== undefined) this.timesteps.set(step, timestep);
    if (!this.every) this.addStop(step);
    this.images[index].done = Math.max(this.images[index].done, step);
  }

  addStop(step) {
    const at = this.stops.findIndex((stop) => stop >= step);
    if (this.stops[at] !== step) this.stops.splice(at, 0, step);
  }

  // After the last step x_t and the x₀ prediction are the same image.
  finish(index, url) {
    this.record(index, { step: this.steps, kind: "x0", url });
    this.record(index, { step: this.steps, kind: "xt", url });
    this.images[index].url = url;
  }

  // The latest frame of an image at or before a step, or undefined.
  frame(index, step) {
    return this.images[index].frames.findLast((frame) => frame.step <= step);
  }

  get furthest() {
    return Math.max(...this.images.map((image) => image.done));
  }

  get fraction() {
    const done = this.images.reduce((sum, image) => sum + image.done, 0);
    return done / (this.images.length * this.steps);
  }
}
