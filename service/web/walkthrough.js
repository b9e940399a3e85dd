// The first study: one image, the slider over t, and the curves.

import { draw } from "./ask.js";
import { Chart, short } from "./chart.js";
import { difference, fit, snapped } from "./picture.js";
import { Walk, nearest, rmse } from "./walk.js";

const TERMS = 50;
const SAMPLES = 3;
const SAMPLE_STEPS = 20;
const GAIN = 3; // of the difference: as the page says
const NOTHING = "nothing";
const WIDEST = 256;
const GAP = 12;

const $ = (id) => document.getElementById(id);

export class Walkthrough {
  constructor(info, say) {
    Object.assign(this, { info, say, images: [], walk: null, wanted: info.model.timesteps / 2 });
    const onPick = (timestep) => this.goTo(timestep);
    this.rate = new Chart($("rate-chart"), {
      x: { title: "rate, bits per dimension", name: "a rate of", unit: "bits per dimension" },
      y: { title: "distortion, RMSE of 255", name: "Root mean square error", unit: "of 255" },
      onPick,
    });
    this.error = new Chart($("guess-chart"), {
      x: { title: "timestep t", name: "timestep", unit: "" },
      y: { title: "RMSE of 255", name: "Root mean square error of the guess", unit: "of 255" },
      onPick,
    });
    this.offer();
    this.listen();
  }

  get dims() {
    const { width, height, channels } = this.info.model;
    return width * height * channels;
  }

  // What the network can be told an image shows.
  offer() {
    const { classes, guidance } = this.info.model;
    const options = classes.map((name, index) => new Option(name, index));
    if (guidance) options.unshift(new Option("nothing", NOTHING));
    $("told").replaceChildren(...options);
    $("told-field").hidden = !classes.length;
  }

  listen() {
    $("t").addEventListener("input", () => {
      const frame = this.walk.frames[$("t").valueAsNumber];
      if (frame) this.goTo(frame.timestep); // a walk that has just begun has none
    });
    $("told").addEventListener("change", () => this.score());
    $("choices").addEventListener("change", (event) => this.choose(Number(event.target.value)));
    $("others").addEventListener("click", () => this.sample(Math.floor(Math.random() * 1e6)));
    $("file").addEventListener("change", () => this.take($("file").files));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.take(event.dataTransfer.files);
    });
    new ResizeObserver(() => this.layout()).observe($("four").parentElement);
  }

  layout() {
    const room = $("four").parentElement.clientWidth;
    const columns = room < 560 ? 2 : 4;
    $("four").style.setProperty("--columns", columns);
    $("four").style.setProperty("--size", `${snapped(room, columns, GAP, this.info.model.width, WIDEST)}px`);
  }

  // Images of the model's own to begin with, of classes far apart.
  async sample(seed) {
    this.sampling?.abort();
    const { signal } = (this.sampling = new AbortController());
    const { classes } = this.info.model;
    const labels = Array.from({ length: SAMPLES }, (_, i) =>
      classes.length ? Math.round((i * (classes.length - 1)) / (SAMPLES - 1)) : null,
    );
    const steps = Math.min(SAMPLE_STEPS, this.info.model.timesteps);
    const drawn = labels.map((label, i) => {
      const fields = { seed: seed + i, num_inference_steps: steps, sampler: this.info.samplers.at(-1) };
      return draw(label === null ? fields : { ...fields, class_label: label }, signal);
    });
    try {
      const urls = (await Promise.all(drawn)).flat();
      this.images = urls.map((url, i) => ({ url, label: labels[i], name: classes[labels[i]] ?? `image ${i + 1}` }));
    } catch (error) {
      if (!signal.aborted) this.say(error.message, true);
      return;
    }
    this.choose(0);
  }

  async take([file]) {
    if (!file) return;
    try {
      const url = await fit(file, this.info.model);
      this.images = [...this.images.filter(({ own }) => !own), { url, label: null, name: file.name, own: true }];
    } catch {
      this.say(`${file.name} is no image that this browser can read.`, true);
      return;
    } finally {
      $("file").value = ""; // so that the same file can be chosen again
    }
    this.choose(this.images.length - 1);
  }

  choose(index) {
    const chosen = this.images[index];
    $("choices").replaceChildren(...this.images.map((image, i) => radio(image, i, i === index, $("choices"))));
    $("clean").src = chosen.url;
    $("clean").alt = `The image: ${chosen.name}`;
    $("clean").hidden = false;
    $("told").value = chosen.label ?? (this.info.model.guidance ? NOTHING : 0);
    this.image = chosen;
    return this.score();
  }

  // One request shows every timestep; the slider then asks for nothing more. The newest choice wins.
  async score() {
    this.controller?.abort();
    const { signal } = (this.controller = new AbortController());
    const told = $("told").value;
    const order = {
      terms: Math.min(TERMS, this.info.model.timesteps),
      label: told === "" || told === NOTHING ? null : Number(told),
    };
    this.walk = new Walk(this.image);
    this.say("Looking at every noise level.");
    try {
      const problem = await this.walk.run(order, signal, () => this.draw());
      if (problem) this.say([problem.title, problem.detail].filter(Boolean).join(": "), true);
      else this.say(`${this.walk.frames.length} noise levels of ${this.image.name}.`);
    } catch (error) {
      if (!signal.aborted) this.say(error.message, true);
    }
  }

  goTo(timestep) {
    this.wanted = timestep;
    this.draw();
  }

  // Many events arrive between two frames of the screen; they are drawn once.
  draw() {
    this.drawing ||= requestAnimationFrame(() => {
      this.drawing = 0;
      if (this.walk.frames.length) this.drawFrame(this.walk.nearest(this.wanted));
      if (this.walk.score) this.drawCurves(this.walk.score);
    });
  }

  drawFrame(at) {
    const { frames } = this.walk;
    const { timestep, mse, bits, ...urls } = frames[at];
    Object.assign($("t"), { max: frames.length - 1, value: at, disabled: false });
    const reading = [`t = ${timestep} of ${this.info.model.timesteps - 1}`];
    if (mse !== undefined) reading.push(`the guess is off by ${short(rmse(mse))} of 255 (RMSE)`);
    if (bits !== undefined) reading.push(`this step costs ${short(bits * this.dims)} bits`);
    $("reading").textContent = reading.join(" · ");
    $("t").setAttribute("aria-valuetext", reading.join(", "));
    for (const [id, url, what] of [["noisy", urls.xt, "The image under noise"], ["guess", urls.x0, "The guess"]]) {
      if (url && $(id).src !== url) $(id).src = url;
      $(id).hidden = !url;
      $(id).alt = `${what} at t = ${timestep}`;
    }
    if (urls.x0) this.drawDifference(timestep);
  }

  async drawDifference(timestep) {
    try {
      await difference($("error"), $("clean"), $("guess"), GAIN);
    } catch {
      return; // another picture took its place meanwhile, and will be compared itself
    }
    $("error").setAttribute("aria-label", `How far the guess at t = ${timestep} is off, pixel by pixel`);
    $("error").hidden = false;
  }

  drawCurves({ bits_per_dim: bits, standard_error: error, terms, rate_distortion: curve }) {
    const at = this.walk.frames[this.walk.nearest(this.wanted)]?.timestep ?? this.wanted;
    const rates = sorted(curve).map(({ timestep, rate, rmse: y }) => ({ x: rate, y, id: timestep }));
    const errors = sorted(terms).map(({ timestep, mse }) => ({ x: timestep, y: rmse(mse), id: timestep }));
    this.rate.show(rates, curve[nearest(curve, at)]?.timestep);
    this.error.show(errors, terms[nearest(terms, at)]?.timestep);
    const bytes = Math.ceil((bits * this.dims) / 8).toLocaleString("en");
    const uncertain = error == null ? "" : ` ± ${error.toFixed(2)}`;
    $("bits").textContent =
      `Without loss the image takes at most ${bits.toFixed(2)}${uncertain} bits per dimension by this network, ` +
      `${bytes} bytes in all; as it is, ${this.dims.toLocaleString("en")}.`;
  }
}

const sorted = (points) => [...points].sort((a, b) => b.timestep - a.timestep); // from noise to the image

function radio({ url, name }, index, checked, list) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "image", value: index, checked });
  const frame = Object.assign(document.createElement("span"), { className: "frame" });
  frame.append(Object.assign(new Image(), { src: url, alt: name }));
  input.className = "unseen";
  label.title = name;
  label.append(input, frame);
  // The list is rebuilt at every choice; the keyboard stays where it was.
  if (checked && list.contains(document.activeElement)) requestAnimationFrame(() => input.focus());
  return label;
}
