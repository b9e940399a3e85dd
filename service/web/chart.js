// A curve in SVG: axes from zero with round ticks, the points, and a marker on one of them.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 14, top: 12, bottom: 42 };

export class Chart {
  // x, y: {title, name, unit}. The axis shows the title; the accessible description uses name and unit.
  constructor(svg, { x, y, onPick }) {
    Object.assign(this, { svg, x, y, onPick });
    this.points = []; // {x, y, id}, in the order they are joined
    this.marked = null;
    new ResizeObserver(() => this.draw()).observe(svg);
    svg.addEventListener("pointerdown", (event) => this.pick(event));
    svg.addEventListener("pointermove", (event) => event.buttons && this.pick(event));
  }

  show(points, marked) {
    Object.assign(this, { points, marked });
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    this.svg.replaceChildren();
    if (!width || !this.points.length) return;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const across = ticks(Math.max(...this.points.map((point) => point.x)), Math.floor(inner.width / 56));
    const up = ticks(Math.max(...this.points.map((point) => point.y)), Math.floor(inner.height / 36));
    this.toX = (value) => MARGIN.left + (value / across.at(-1)) * inner.width;
    this.toY = (value) => MARGIN.top + (1 - value / up.at(-1)) * inner.height;
    this.axes(across, up, width, height);
    const line = this.points.map(({ x, y }) => `${round(this.toX(x))},${round(this.toY(y))}`).join(" ");
    this.add("polyline", { class: "curve", points: line });
    for (const { x, y } of this.points) this.square("point", this.toX(x), this.toY(y), 3.5);
    this.drawMark();
    this.svg.setAttribute("aria-label", this.describe());
  }

  axes(across, up, width, height) {
    const [left, bottom, right] = [MARGIN.left, height - MARGIN.bottom, width - MARGIN.right];
    for (const value of up) {
      const y = round(this.toY(value));
      this.add("line", { class: "grid", x1: left, x2: right, y1: y, y2: y });
      this.add("text", { class: "tick end", x: left - 8, y: y + 4 }, String(value));
    }
    for (const value of across) {
      const x = round(this.toX(value));
      this.add("line", { class: "grid", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
      this.add("text", { class: "tick middle", x, y: bottom + 17 }, String(value));
    }
    this.add("text", { class: "axis middle", x: (left + right) / 2, y: height - 6 }, this.x.title);
    const middle = (MARGIN.top + bottom) / 2;
    this.add("text", { class: "axis middle", transform: `translate(11 ${middle}) rotate(-90)` }, this.y.title);
  }

  drawMark() {
    const point = this.points.find(({ id }) => id === this.marked);
    if (!point) return;
    const [x, y] = [this.toX(point.x), this.toY(point.y)];
    this.add("line", { class: "guide", x1: x, x2: x, y1: y, y2: this.toY(0) });
    this.add("line", { class: "guide", x1: this.toX(0), x2: x, y1: y, y2: y });
    this.square("mark", x, y, 9);
  }

  describe() {
    const format = ({ x, y }) => `${short(y)} ${this.y.unit} at ${this.x.name} ${short(x)} ${this.x.unit}`.trim();
    const marked = this.points.find(({ id }) => id === this.marked);
    const ends = `${this.y.name}: ${format(this.points[0])}, ${format(this.points.at(-1))}.`;
    return marked ? `${ends} Marked: ${format(marked)}.` : ends;
  }

  pick(event) {
    if (!this.points.length) return;
    const box = this.svg.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const distance = (point) => Math.hypot(this.toX(point.x) - x, this.toY(point.y) - y);
    this.onPick(this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best)).id);
  }

  square(name, x, y, size) {
    this.add("rect", { class: name, x: x - size / 2, y: y - size / 2, width: size, height: size });
  }

  add(name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    this.svg.append(element);
  }
}

// Round numbers from 0 to at least `max`, about `count` steps of 1, 2 or 5 times a power of ten.
export function ticks(max, count) {
  const rough = (max || 1) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const steps = Math.max(1, Math.ceil((max || 1) / step - 1e-9));
  return Array.from({ length: steps + 1 }, (_, i) => Number((i * step).toPrecision(6)));
}

export const short = (value) => String(Number(value.toPrecision(3)));
const round = (value) => Math.round(value * 10) / 10;
