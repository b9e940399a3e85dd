// The grid of images. Each image pixel covers a whole number of screen pixels where the window is wide enough.

const GAP = 14;
const MAX_GAP = 36;
const PAIR_GAP = 4;
const CAPTION_HEIGHT = 26;
const MIN_SIZE = 76;
const MAX_SIZE = 448;
const COLOURED = [3, 4]; // numbers of channels

export class Grid {
  // onSeed(seed), onOpen(index): a seed or an image was pressed.
  constructor(list, { onSeed, onOpen }) {
    Object.assign(this, { list, onSeed, onOpen });
    this.tiles = [];
    this.view = "x0";
    this.shape = { width: 1, height: 1 };
    new ResizeObserver(() => this.layout()).observe(list.parentElement);
  }

  setShape({ picture, channels }) {
    this.shape = picture;
    this.list.style.setProperty("--noise", `url(${noise(picture, channels)})`);
  }

  // images: [{label, seed}], without a seed for a placeholder.
  reset(images) {
    this.tiles = images.map((image, index) => this.tile(image, index));
    this.list.replaceChildren(...this.tiles.map((tile) => tile.item));
    this.layout();
  }

  tile({ label, seed }, index) {
    const item = document.createElement("li");
    const pictures = Object.assign(document.createElement("button"), { type: "button", disabled: true });
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
    pictures.addEventListener("click", () => this.onOpen(index));
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
    const tile = { item, pictures, x0, xt, button, label };
    if (seed !== undefined) setSeed(tile, seed);
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
      setSeed(tile, seed);
      tile.pictures.disabled = !frame;
      for (const kind of ["x0", "xt"]) {
        const image = tile[kind];
        const url = frame?.[kind];
        image.hidden = !url;
        if (url && image.src !== url) image.src = url;
        const what = kind === "x0" ? "x₀ prediction" : "noisy sample";
        image.alt = `${tile.label || "Image"}, seed ${seed}, ${what} at step ${frame?.step} of ${trajectory.steps}`;
      }
      tile.item.classList.toggle("done", frame?.step === trajectory.steps);
    });
  }

  // The fewest columns, and so the largest tiles, whose rows fit the window; otherwise small tiles that scroll.
  layout() {
    const count = this.tiles.length;
    const available = this.list.parentElement.clientWidth;
    if (!count || !available) return;
    const { width, height } = this.shape;
    const perTile = this.view === "both" ? 2 : 1;
    const maxHeight = Math.max(260, window.innerHeight - 300);
    let columns = 0;
    let size;
    do {
      columns += 1;
      size = this.size(available, columns, perTile, width);
      const tile = (size * height) / width + CAPTION_HEIGHT;
      if (Math.ceil(count / columns) * (tile + GAP) <= maxHeight) break;
    } while (columns < count && this.size(available, columns + 1, perTile, width) >= MIN_SIZE);
    this.list.style.setProperty("--size", `${size}px`);
    columns = Math.ceil(count / Math.ceil(count / columns));
    const tile = perTile * size + (perTile - 1) * PAIR_GAP;
    const gap = Math.min(MAX_GAP, (available - columns * tile) / Math.max(1, columns - 1));
    this.list.style.setProperty("--columns", columns);
    this.list.style.setProperty("--gap", `${Math.floor(gap)}px`);
  }

  size(available, columns, perTile, width) {
    const share = (available - (columns - 1) * GAP) / columns;
    const size = Math.min(MAX_SIZE, Math.floor((share - (perTile - 1) * PAIR_GAP) / perTile));
    const unit = width / Math.max(1, Math.floor(window.devicePixelRatio));
    return size < width ? size : size - (size % unit);
  }
}

function setSeed({ button, label }, seed) {
  if (button.value === String(seed)) return;
  button.value = seed;
  button.textContent = seed;
  button.setAttribute("aria-label", `Use seed ${seed}${label ? ` of ${label}` : ""}`);
  button.hidden = false;
}

// The background of an empty frame: random pixels, not the noise of any seed.
function noise({ width, height }, channels) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    for (let c = 0; c < 3; c += 1) {
      pixels.data[i + c] = COLOURED.includes(channels) || !c ? Math.random() * 256 : pixels.data[i];
    }
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}
