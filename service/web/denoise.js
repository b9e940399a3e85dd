// One image: the slider over t, the x₀ prediction at each timestep, and the curves.

import { Chart, short } from "./chart.js";
import { isPicture } from "./connect.js";
import { generate } from "./generate.js";
import { difference, fit, snappedSize } from "./picture.js";
import { ScoreRun, nearest, rmse } from "./score.js";
import { Problem } from "./stream.js";

const TERMS = 50;
const SAMPLES = 3;
const SAMPLE_STEPS = 20;
const GAIN = 3; // of the difference, as the page's caption says
const UNCONDITIONAL = "none";
const MAX_SIZE = 256;
const GAP = 12;

const $ = (id) => document.getElementById(id);

export class DenoisePanel {
  constructor(info, say) {
    Object.assign(this, { info, say, images: [], scoreRun: null, selected: info.model.timesteps / 2 });
    const onPick = (timestep) => this.goTo(timestep);
    this.rateChart = new Chart($("rate-chart"), {
      x: { title: "rate, bits per dimension", name: "a rate of", unit: "bits per dimension" },
      y: { title: "distortion, RMSE of 255", name: "Root mean square error", unit: "of 255" },
      onPick,
    });
    this.errorChart = new Chart($("error-chart"), {
      x: { title: "timestep t", name: "timestep", unit: "" },
      y: { title: "RMSE of 255", name: "Root mean square error of the x₀ prediction", unit: "of 255" },
      onPick,
    });
    $("upload").hidden = !isPicture(info.model);
    this.fillClasses();
    this.listen();
  }

  get dims() {
    const { width, height, channels } = this.info.model;
    return width * height * channels;
  }

  fillClasses() {
    const { classes, guidance } = this.info.model;
    const options = classes.map((name, index) => new Option(name, index));
    if (guidance) options.unshift(new Option("None (unconditional)", UNCONDITIONAL));
    $("condition").replaceChildren(...options);
    $("condition-field").hidden = !classes.length;
  }

  listen() {
    $("t").addEventListener("input", () => {
      const frame = this.scoreRun.frames[$("t").valueAsNumber];
      if (frame) this.goTo(frame.timestep); // a run that has just started has none
    });
    $("condition").addEventListener("change", () => this.score());
    $("choices").addEventListener("change", (event) => this.choose(Number(event.target.value)));
    $("others").addEventListener("click", () => this.sample(Math.floor(Math.random() * 1e6)));
    $("file").addEventListener("change", () => this.upload($("file").files));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.upload(event.dataTransfer.files);
    });
    new ResizeObserver(() => this.layout()).observe($("images").parentElement);
  }

  layout() {
    const available = $("images").parentElement.clientWidth;
    const columns = available < 560 ? 2 : 4;
    $("images").style.setProperty("--columns", columns);
    $("images").style.setProperty("--size", `${snappedSize(available, columns, GAP, this.info.model.picture.width, MAX_SIZE)}px`);
  }

  // The model's own samples to begin with, of classes far apart.
  async sample(seed) {
    this.sampling?.abort();
    const { signal } = (this.sampling = new AbortController());
    const { classes } = this.info.model;
    const labels = Array.from({ length: SAMPLES }, (_, i) =>
      classes.length ? Math.round((i * (classes.length - 1)) / (SAMPLES - 1)) : null,
    );
    const steps = Math.min(SAMPLE_STEPS, this.info.model.timesteps);
    const requests = labels.map((label, i) => {
      const fields = { seed: seed + i, num_inference_steps: steps, sampler: this.info.samplers.at(-1) };
      return label === null ? fields : { ...fields, class_label: label };
    });
    const made = async (more) => {
      const answers = requests.map((fields) => generate({ ...fields, ...more }, signal));
      return (await Promise.all(answers)).flat();
    };
    try {
      // What is no picture is scored from its array; the sheet of its channels is for the eye.
      const [urls, files] = await Promise.all([made(), isPicture(this.info.model) ? [] : made({ output_format: "npy" })]);
      const name = (i) => classes[labels[i]] ?? `image ${i + 1}`;
      this.images = urls.map((url, i) => ({ url, file: files[i], label: labels[i], name: name(i) }));
    } catch (error) {
      if (!signal.aborted) this.say(error.message, true);
      return;
    }
    this.choose(0);
  }

  async upload([file]) {
    if (!file) return;
    if ($("upload").hidden) {
      this.say("This model's samples are arrays, not pictures: they can be scored by the API alone.", true);
      return;
    }
    try {
      const url = await fit(file, this.info.model);
      this.images = [
        ...this.images.filter(({ uploaded }) => !uploaded),
        { url, label: null, name: file.name, uploaded: true },
      ];
    } catch {
      this.say(`${file.name} is not an image this browser can read.`, true);
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
    $("condition").value = chosen.label ?? (this.info.model.guidance ? UNCONDITIONAL : 0);
    this.image = chosen;
    return this.score();
  }

  // One request covers every timestep; the slider sends no more. The latest choice wins.
  async score() {
    this.controller?.abort();
    const { signal } = (this.controller = new AbortController());
    const condition = $("condition").value;
    const request = {
      terms: Math.min(TERMS, this.info.model.timesteps),
      label: condition === "" || condition === UNCONDITIONAL ? null : Number(condition),
    };
    this.scoreRun = new ScoreRun(this.image);
    this.say("Evaluating the network at every noise level.");
    try {
      const problem = await this.scoreRun.run(request, signal, () => this.draw());
      if (problem) this.say(new Problem(problem).message, true);
      else this.say(`Evaluated ${this.image.name} at ${this.scoreRun.frames.length} noise levels.`);
    } catch (error) {
      if (!signal.aborted) this.say(error.message, true);
    }
  }

  goTo(timestep) {
    this.selected = timestep;
    this.draw();
  }

  // Many events arrive between two frames of the screen; they are drawn once.
  draw() {
    this.scheduled ||= requestAnimationFrame(() => {
      this.scheduled = 0;
      if (this.scoreRun.frames.length) this.drawFrame(this.scoreRun.nearest(this.selected));
      if (this.scoreRun.score) this.drawCurves(this.scoreRun.score);
    });
  }

  drawFrame(at) {
    const { frames } = this.scoreRun;
    const { timestep, mse, bits, ...urls } = frames[at];
    Object.assign($("t"), { max: frames.length - 1, value: at, disabled: false });
    const readout = [`t = ${timestep} of ${this.info.model.timesteps - 1}`];
    if (mse !== undefined) readout.push(`RMSE ${short(rmse(mse))} of 255`);
    if (bits !== undefined) readout.push(`${short(bits * this.dims)} bits for this step`);
    $("readout").textContent = readout.join(" · ");
    $("t").setAttribute("aria-valuetext", readout.join(", "));
    for (const [id, url, what] of [["noisy", urls.xt, "The noisy image"], ["x0-pred", urls.x0, "The x₀ prediction"]]) {
      if (url && $(id).src !== url) $(id).src = url;
      $(id).hidden = !url;
      $(id).alt = `${what} at t = ${timestep}`;
    }
    if (urls.x0) this.drawDifference(timestep);
  }

  async drawDifference(timestep) {
    try {
      await difference($("difference"), $("clean"), $("x0-pred"), GAIN);
    } catch {
      return; // another picture has replaced it, and will be compared in its turn
    }
    $("difference").setAttribute("aria-label", `Absolute error of the x₀ prediction at t = ${timestep}, by pixel`);
    $("difference").hidden = false;
  }

  drawCurves({ bits_per_dim: bits, standard_error: error, terms, rate_distortion: curve }) {
    const at = this.scoreRun.frames[this.scoreRun.nearest(this.selected)]?.timestep ?? this.selected;
    const rates = sorted(curve).map(({ timestep, rate, rmse: y }) => ({ x: rate, y, id: timestep }));
    const errors = sorted(terms).map(({ timestep, mse }) => ({ x: timestep, y: rmse(mse), id: timestep }));
    this.rateChart.show(rates, curve[nearest(curve, at)]?.timestep);
    this.errorChart.show(errors, terms[nearest(terms, at)]?.timestep);
    const bytes = Math.ceil((bits * this.dims) / 8).toLocaleString("en");
    const uncertainty = error == null ? "" : ` ± ${error.toFixed(2)}`;
    $("bits").textContent =
      `Variational bound: ${bits.toFixed(2)}${uncertainty} bits per dimension, or ${bytes} bytes for the image ` +
      `(${this.dims.toLocaleString("en")} uncompressed).`;
  }
}

const sorted = (points) => [...points].sort((a, b) => b.timestep - a.timestep); // from noise to the image

function radio({ url, name }, index, checked, list) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "image", value: index, checked });
  const frame = Object.assign(document.createElement("span"), { className: "frame" });
  frame.append(Object.assign(new Image(), { src: url, alt: name }));
  input.className = "visually-hidden";
  label.title = name;
  label.append(input, frame);
  // The list is rebuilt at every choice; keyboard focus stays where it was.
  if (checked && list.contains(document.activeElement)) requestAnimationFrame(() => input.focus());
  return label;
}
