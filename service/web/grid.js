// The wall of images: one tile each, every pixel of it a whole number of screen pixels where there is room.

const GAP = 14;
const WIDEST_GAP = 36;
const PAIR_GAP = 4;
const CAPTION = 26;
const SMALLEST = 76;
const LARGEST = 448;

export class Grid {
  constructor(list, onSeed) {
    this.list = list;
    this.onSeed = onSeed;
    this.tiles = [];
    this.view = "x0";
    this.shape = { width: 1, height: 1 };
    new ResizeObserver(() => this.layout()).observe(list.parentElement);
  }

  setShape(shape) {
    this.shape = shape;
    this.list.style.setProperty("--noise", `url(${noise(shape)})`);
    this.list.style.setProperty("--aspect", `${shape.width} / ${shape.height}`);
  }

  // images: [{label, seed}], seed absent on a tile that only holds a place.
  reset(images) {
    this.tiles = images.map((image) => this.tile(image));
    this.list.replaceChildren(...this.tiles.map((tile) => tile.item));
    this.layout();
  }

  tile({ label, seed }) {
    const item = document.createElement("li");
    const pictures = document.createElement("div");
    const x0 = new Image();
    const xt = new Image();
    const frames = [x0, xt].map((image, i) => {
      const frame = document.createElement("span");
      frame.className = `frame ${i ? "xt" : "x0"}`;
      image.hidden = true;
      frame.append(image);
      return frame;
    });
    pictures.className = "pictures";
    pictures.append(...frames);
    const caption = document.createElement("div");
    caption.className = "caption";
    const name = document.createElement("span");
    name.textContent = label;
    name.hidden = !label;
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Use this seed";
    button.hidden = true;
    button.addEventListener("click", () => this.onSeed(button.value));
    caption.append(name, button);
    item.append(pictures, caption);
    const tile = { item, x0, xt, button, label };
    if (seed !== undefined) nameSeed(tile, seed);
    return tile;
  }

  show(view) {
    this.view = view;
    this.list.dataset.view = view;
    this.layout();
  }

  draw(trajectory, step) {
    trajectory.images.forEach(({ seed }, index) => {
      const tile = this.tiles[index];
      const frame = trajectory.frame(index, step);
      nameSeed(tile, seed);
      for (const kind of ["x0", "xt"]) {
        const image = tile[kind];
        const url = frame?.[kind];
        image.hidden = !url;
        if (url && image.src !== url) image.src = url;
        const what = kind === "x0" ? "prediction" : "latent";
        image.alt = `${tile.label || "image"}, seed ${seed}, ${what} at step ${frame?.step} of ${trajectory.steps}`;
      }
      tile.item.classList.toggle("done", frame?.step === trajectory.steps);
    });
  }

  // The fewest columns, so the largest tiles, whose rows still fit the window; else small tiles that scroll.
  layout() {
    const count = this.tiles.length;
    const room = this.list.parentElement.clientWidth;
    if (!count || !room) return;
    const { width, height } = this.shape;
    const abreast = this.view === "both" ? 2 : 1;
    const tall = Math.max(260, window.innerHeight - 300);
    let columns = 0;
    let size;
    do {
      columns += 1;
      size = this.size(room, columns, abreast, width);
      const tile = (size * height) / width + CAPTION;
      if (Math.ceil(count / columns) * (tile + GAP) <= tall) break;
    } while (columns < count && this.size(room, columns + 1, abreast, width) >= SMALLEST);
    this.list.style.setProperty("--size", `${size}px`);
    columns = Math.ceil(count / Math.ceil(count / columns));
    const tile = abreast * size + (abreast - 1) * PAIR_GAP;
    const gap = Math.min(WIDEST_GAP, (room - columns * tile) / Math.max(1, columns - 1));
    this.list.style.setProperty("--columns", columns);
    this.list.style.setProperty("--gap", `${Math.floor(gap)}px`);
  }

  size(room, columns, abreast, width) {
    const free = (room - (columns - 1) * GAP) / columns;
    const size = Math.min(LARGEST, Math.floor((free - (abreast - 1) * PAIR_GAP) / abreast));
    const unit = width / Math.max(1, Math.floor(window.devicePixelRatio));
    return size < width ? size : size - (size % unit);
  }
}

function nameSeed({ button, label }, seed) {
  if (button.value === String(seed)) return;
  button.value = seed;
  button.textContent = seed;
  button.setAttribute("aria-label", `Use seed ${seed}${label ? ` of ${label}` : ""}`);
  button.hidden = false;
}

// What an empty frame shows. It stands for the starting noise; it is not the noise of any seed.
function noise({ width, height, channels }) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    for (let c = 0; c < 3; c += 1) {
      pixels.data[i + c] = channels === 1 && c ? pixels.data[i] : Math.random() * 256;
    }
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}
