// Between files, data: URLs and pixels.

// An image file cropped around its centre and resized to the model's size and channels, as a PNG data: URL. Throws if
// the browser cannot read the file.
export async function fit(file, { width, height, channels }) {
  const bitmap = await createImageBitmap(file);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (channels !== 4) context.fillRect(0, 0, width, height); // black shows through transparent pixels
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  bitmap.close();
  if (channels === 1) grey(context, width, height);
  return canvas.toDataURL("image/png");
}

function grey(context, width, height) {
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    const luma = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2]; // ITU-R BT.601
    data.fill(Math.round(luma), i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
}

// Draws gain · |a − b|, channel by channel, onto a canvas; what differs in alpha alone is grey. a, b: <img> elements.
export async function difference(canvas, a, b, gain) {
  await Promise.all([a.decode(), b.decode()]);
  const { naturalWidth: width, naturalHeight: height } = a;
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const [first, second] = [a, b].map((image) => {
    context.clearRect(0, 0, width, height);
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  });
  for (let i = 0; i < first.data.length; i += 4) {
    const alpha = Math.abs(first.data[i + 3] - second.data[i + 3]);
    for (let c = i; c < i + 3; c += 1) {
      first.data[c] = gain * Math.max(alpha, Math.abs(first.data[c] - second.data[c])); // the array type clamps to 0 … 255
    }
    first.data[i + 3] = 255;
  }
  context.putImageData(first, 0, 0);
}

// The displayed width of an image of `width` pixels, `columns` of them side by side: a whole number of screen pixels
// per image pixel.
export function snappedSize(available, columns, gap, width, maxSize) {
  const size = Math.min(maxSize, Math.floor((available - (columns - 1) * gap) / columns));
  const unit = width / Math.max(1, Math.floor(window.devicePixelRatio));
  return size < width ? size : size - (size % unit);
}
