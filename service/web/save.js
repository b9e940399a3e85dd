// Images and texts out of the page: to a file, or to the clipboard.

const GAP = 2; // pixels between the images of a sheet, as in the service's own

export function download(url, name) {
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
}

// navigator.clipboard is missing on plain HTTP from another machine, where selecting still works.
export async function copyText(element) {
  if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
  getSelection().selectAllChildren(element);
  if (!document.execCommand("copy")) throw new Error("copying was refused");
}

export const canCopyImages = () => Boolean(navigator.clipboard?.write && window.ClipboardItem);

// url: a data: URL of a PNG. Rejects where the browser refuses.
export function copyImage(url) {
  return navigator.clipboard.write([new ClipboardItem({ "image/png": blob(url) })]);
}

// Not fetch(url): the page's policy allows connections to the service alone.
export function blob(url) {
  const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (one) => one.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

// Images of one size (data: URLs) side by side, about as many across as down, as a data: URL.
export async function sheet(urls) {
  const images = await Promise.all(
    urls.map(async (url) => {
      const image = Object.assign(new Image(), { src: url });
      await image.decode();
      return image;
    }),
  );
  const columns = Math.ceil(Math.sqrt(images.length));
  const [{ naturalWidth: width, naturalHeight: height }] = images;
  const canvas = document.createElement("canvas");
  canvas.width = columns * (width + GAP) - GAP;
  canvas.height = Math.ceil(images.length / columns) * (height + GAP) - GAP;
  const context = canvas.getContext("2d");
  images.forEach((image, i) => {
    context.drawImage(image, (i % columns) * (width + GAP), Math.floor(i / columns) * (height + GAP));
  });
  return canvas.toDataURL("image/png");
}
