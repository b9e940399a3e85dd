// Which pixels are to be regenerated. No DOM in here.

export class Mask {
  constructor(width, height) {
    Object.assign(this, { width, height, pixels: new Uint8Array(width * height) });
  }

  get isEmpty() {
    return !this.pixels.includes(1);
  }

  // Share of the pixels that is regenerated.
  get share() {
    return this.pixels.reduce((sum, one) => sum + one, 0) / this.pixels.length;
  }

  clear() {
    this.pixels.fill(0);
  }

  invert() {
    this.pixels.forEach((one, i) => (this.pixels[i] = 1 - one));
  }

  // A rectangle in fractions of the picture.
  part(left, top, right, bottom) {
    this.clear();
    const { width, height } = this;
    this.fill(Math.round(left * width), Math.round(top * height), Math.round(right * width), Math.round(bottom * height), 1);
  }

  // A line of the square brush between two points, in pixels. value: 1 regenerates, 0 keeps.
  stroke(from, to, size, value) {
    const count = Math.max(1, Math.ceil(Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y))));
    for (let i = 0; i <= count; i += 1) {
      const x = Math.round(from.x + ((to.x - from.x) * i) / count - size / 2);
      const y = Math.round(from.y + ((to.y - from.y) * i) / count - size / 2);
      this.fill(x, y, x + size, y + size, value);
    }
  }

  fill(left, top, right, bottom, value) {
    const [first, last] = [Math.max(0, left), Math.min(this.width, right)];
    if (first >= last) return;
    for (let y = Math.max(0, top); y < Math.min(this.height, bottom); y += 1) {
      this.pixels.fill(value, y * this.width + first, y * this.width + last);
    }
  }
}
