// The scrubber. At its right end it follows the run; anywhere else it stays where the user put it.

const PLAY_MS = 4000;
const MIN_INTERVAL_MS = 40;
const REDUCED_MOTION_INTERVAL_MS = 400;

export class Player {
  constructor({ bar, button, range, label }, onMove) {
    Object.assign(this, { bar, button, range, label, onMove });
    this.following = true;
    this.timer = null;
    range.addEventListener("input", () => {
      this.pause();
      this.following = range.valueAsNumber === Number(range.max);
      this.onMove();
    });
    button.addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  load(trajectory) {
    this.pause();
    this.trajectory = trajectory;
    this.following = true;
    this.range.max = trajectory.stops.length - 1;
    this.range.value = 0;
    this.bar.hidden = false;
  }

  // The step to show; past the end means the latest one available.
  get step() {
    return this.following ? Infinity : this.trajectory.stops[this.range.valueAsNumber];
  }

  draw() {
    const { stops, steps, furthest, timesteps } = this.trajectory;
    this.range.max = stops.length - 1;
    if (this.following) this.range.value = Math.max(0, stops.findLastIndex((stop) => stop <= furthest));
    const step = this.following ? furthest : this.step;
    const t = timesteps.get(step);
    this.label.textContent = `step ${step} of ${steps}` + (t === undefined ? "" : `, t = ${t}`);
    this.range.setAttribute("aria-valuetext", this.label.textContent);
  }

  play() {
    const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const interval = Math.max(
      reducedMotion ? REDUCED_MOTION_INTERVAL_MS : MIN_INTERVAL_MS,
      PLAY_MS / this.trajectory.stops.length,
    );
    if (this.range.value === this.range.max || this.following) this.range.value = 0;
    this.following = false;
    this.timer = setInterval(() => this.advance(), interval);
    this.setAction("Pause");
    this.onMove();
  }

  advance() {
    this.range.stepUp();
    const reached = this.trajectory.stops[this.range.valueAsNumber] >= this.trajectory.furthest;
    if (reached) {
      this.pause();
      this.following = true;
    }
    this.onMove();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.setAction("Play");
  }

  setAction(action) {
    this.button.setAttribute("aria-label", action);
    this.bar.classList.toggle("playing", action === "Pause");
  }
}
