// The picture that images are made from, and the mask painted on it.

import { isPicture } from "./connect.js";
import { Mask } from "./mask.js";
import { fit } from "./picture.js";

const PARTS = { left: [0, 0, 0.5, 1], right: [0.5, 0, 1, 1], centre: [0.25, 0.25, 0.75, 0.75] };

const TINT = [190, 40, 45, 170]; // of what is masked: seen on black, grey and white

const $ = (id) => document.getElementById(id);

export class Source {
  // mode: what the model does with a picture: "edit", "fill" (a mask is needed), "condition" (it takes none) or "none".
  constructor(model, strength, { onChange, say }) {
    Object.assign(this, { model, onChange, say, image: null, painting: null });
    this.mode = modeOf(model);
    this.mask = new Mask(model.width, model.height);
    $("source-field").hidden = this.mode === "none";
    $("masking").hidden = this.mode === "condition";
    $("strength").value = strength;
    $("brush").max = Math.max(2, Math.floor(Math.min(model.width, model.height) / 2));
    $("brush").value = Math.ceil(Math.min(model.width, model.height) / 8);
    Object.assign($("mask"), { width: model.width, height: model.height });
    $("canvas").style.setProperty("--aspect", `${model.width} / ${model.height}`);
    if (this.mode !== "none") this.listen();
  }

  get required() {
    return this.mode === "fill" || this.mode === "condition";
  }

  get masked() {
    return this.image !== null && this.mode !== "condition" && !this.mask.isEmpty;
  }

  // RePaint, which begins with noise inside the mask.
  get repaint() {
    return this.mode === "edit" && this.masked && $("method").value === "noise";
  }

  // The fields of an edit; null where images are made from noise alone.
  get fields() {
    if (!this.image) return null;
    const fields = { image: this.image };
    if (this.masked) fields.mask = this.maskUrl();
    if (this.mode === "edit" && !this.repaint) fields.strength = $("strength").valueAsNumber;
    return fields;
  }

  // Why the picture and the mask do not do as they are; empty where they do.
  get missing() {
    if (this.required && !this.image) return "This model makes images from a picture: choose one.";
    return this.mode === "fill" && !this.masked ? "This model fills holes in pictures: paint a mask, or choose a part." : "";
  }

  listen() {
    $("picture").addEventListener("change", () => this.open($("picture").files[0]));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.open(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => this.open(event.clipboardData.files[0]));
    $("remove").addEventListener("click", () => {
      this.set(null);
      $("picture").focus();
    });
    $("method").addEventListener("change", () => this.changed());
    $("strength").addEventListener("input", () => this.changed());
    $("masks").addEventListener("click", (event) => this.act(event.target.value));
    const canvas = $("mask");
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.painting && this.paint(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => this.release());
  }

  async open(file) {
    if (!file) return;
    try {
      this.set(await fit(file, this.model));
      this.say("The picture was fitted to the model's size. Paint what is to change, or change all of it.");
    } catch {
      this.say(`${file.name} is not an image this browser can read.`, true);
    } finally {
      $("picture").value = ""; // so that the same file can be chosen again
    }
  }

  // url: a data: URL of a picture of the model's size, or null.
  set(url) {
    this.image = url;
    this.mask.clear();
    $("editor").hidden = !url;
    if (url) $("original").src = url;
    else $("original").removeAttribute("src");
    this.changed();
  }

  act(name) {
    if (name in PARTS) this.mask.part(...PARTS[name]);
    else if (name === "invert") this.mask.invert();
    else if (name === "clear") this.mask.clear();
    else return;
    this.changed();
  }

  press(event) {
    if (event.button || this.mode === "condition") return;
    event.preventDefault();
    $("mask").setPointerCapture(event.pointerId);
    this.painting = this.point(event);
    this.paint(event);
  }

  paint(event) {
    const point = this.point(event);
    this.mask.stroke(this.painting, point, $("brush").valueAsNumber, $("erase").checked ? 0 : 1);
    this.painting = point;
    this.draw();
  }

  release() {
    if (!this.painting) return;
    this.painting = null;
    this.changed();
  }

  point(event) {
    const box = $("mask").getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.model.width,
      y: ((event.clientY - box.top) / box.height) * this.model.height,
    };
  }

  changed() {
    const edit = this.mode === "edit";
    $("method-field").hidden = !edit || !this.masked;
    $("strength-field").hidden = !edit || this.repaint;
    $("strength-value").textContent = $("strength").valueAsNumber.toFixed(2);
    this.draw();
    this.onChange();
  }

  draw() {
    drawPixels($("mask"), this.mask, TINT, [0, 0, 0, 0]);
    const share = this.masked ? Math.round(this.mask.share * 100) : 0;
    const text = this.masked ? `Mask: ${share} % of the picture is regenerated` : "No mask: all of the picture changes";
    $("mask-text").textContent = this.mode === "fill" && !this.masked ? "No mask yet" : text;
    $("mask").setAttribute("aria-label", $("mask-text").textContent);
  }

  // White is regenerated, black is kept.
  maskUrl() {
    const canvas = Object.assign(document.createElement("canvas"), { width: this.model.width, height: this.model.height });
    drawPixels(canvas, this.mask, [255, 255, 255, 255], [0, 0, 0, 255]);
    return canvas.toDataURL("image/png");
  }
}

function drawPixels(canvas, { width, height, pixels }, masked, kept) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  pixels.forEach((one, i) => image.data.set(one ? masked : kept, 4 * i));
  context.putImageData(image, 0, 0);
}

function modeOf(model) {
  const { condition } = model;
  if (!isPicture(model)) return "none";
  if (!condition.length) return "edit";
  return condition.some((name) => name === "mask" || name === "masked_image") ? "fill" : "condition";
}
