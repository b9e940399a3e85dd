// The last minutes of one or two figures, in SVG: time to the right, zero at the bottom.

import { short, ticks } from "./chart.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 40, right: 6, top: 8, bottom: 20 };

export class Timeline {
  // series: [{name, unit}]; seconds: how far back it goes.
  constructor({ title, series, seconds }) {
    Object.assign(this, { title, series, seconds, points: [] });
    this.element = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const heading = Object.assign(document.createElement("h2"), { textContent: title });
    this.outputs = series.map(({ name }) => {
      const output = document.createElement("output");
      const label = Object.assign(document.createElement("span"), { textContent: series.length > 1 ? name : "" });
      const item = document.createElement("span");
      item.className = "now";
      item.append(output, label);
      return { output, item };
    });
    caption.append(heading, ...this.outputs.map(({ item }) => item));
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("role", "img");
    this.svg.setAttribute("class", "timeline");
    this.element.append(caption, this.svg);
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  // values: one for each series, null where there is none.
  add(at, values) {
    this.points.push({ at, values });
    while (this.points[0].at < at - this.seconds) this.points.shift();
    values.forEach((value, i) => (this.outputs[i].output.textContent = text(value, this.series[i].unit)));
    this.draw();
  }

  // {now, least, most} of a series, as text.
  figures(index) {
    const values = this.points.map((point) => point.values[index]).filter((value) => value !== null);
    const { unit } = this.series[index];
    const now = text(this.points.at(-1)?.values[index] ?? null, unit);
    if (!values.length) return { now, least: "–", most: "–" };
    return { now, least: text(Math.min(...values), unit), most: text(Math.max(...values), unit) };
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    this.svg.replaceChildren();
    if (!width || !this.points.length) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
    const most = Math.max(...this.points.flatMap(({ values }) => values.map((value) => value ?? 0)));
    const up = ticks(most || 1, Math.floor((bottom - MARGIN.top) / 36));
    const toY = (value) => MARGIN.top + (1 - value / up.at(-1)) * (bottom - MARGIN.top);
    const last = this.points.at(-1).at;
    const toX = (at) => right - ((last - at) / this.seconds) * (right - MARGIN.left);
    for (const value of up) {
      this.put("line", { class: "grid", x1: MARGIN.left, x2: right, y1: toY(value), y2: toY(value) });
      this.put("text", { class: "tick end", x: MARGIN.left - 6, y: toY(value) + 4 }, String(value));
    }
    this.put("text", { class: "tick", x: MARGIN.left, y: height - 4 }, `${this.seconds} s ago`);
    this.put("text", { class: "tick end", x: right, y: height - 4 }, "now");
    this.series.forEach((_, i) => this.curve(i, toX, toY));
    this.svg.setAttribute("aria-label", this.describe());
  }

  // A gap where there was no figure.
  curve(index, toX, toY) {
    let joined = false;
    const path = this.points.map(({ at, values }) => {
      const value = values[index];
      const command = value === null ? "" : `${joined ? "L" : "M"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}h0.1`;
      joined = value !== null;
      return command;
    });
    this.put("path", { class: `curve curve-${index}`, d: path.join("") });
  }

  describe() {
    const parts = this.series.map(({ name }, i) => {
      const { now, least, most } = this.figures(i);
      return `${name} ${now}, from ${least} to ${most}`;
    });
    return `${this.title}, now and in the last ${this.seconds} s: ${parts.join("; ")}`;
  }

  put(name, attributes, content) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (content !== undefined) element.textContent = content;
    this.svg.append(element);
  }
}

const text = (value, unit) => (value === null ? "–" : `${value >= 1000 ? Math.round(value).toLocaleString("en") : short(value)} ${unit}`.trim());
