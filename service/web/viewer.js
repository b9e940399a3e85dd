// One image, large, with what can be done with it.

import { fileName } from "./curl.js";
import { canCopyImages, copyImage, download } from "./save.js";

const $ = (id) => document.getElementById(id);

export class Viewer {
  // onEdit({url, label, seed}), onPin(seed)
  constructor({ onEdit, onPin, editable }) {
    Object.assign(this, { onEdit, onPin });
    const dialog = (this.dialog = $("viewer"));
    $("viewer-edit").hidden = !editable;
    $("viewer-copy").hidden = !canCopyImages();
    $("viewer-save").addEventListener("click", () => download(this.image.url, `${fileName([this.image])}.png`));
    $("viewer-copy").addEventListener("click", () =>
      copyImage(this.image.url).then(
        () => this.say("Copied."),
        () => this.say("The browser refused to copy."),
      ),
    );
    $("viewer-edit").addEventListener("click", () => this.leave(() => this.onEdit(this.image)));
    $("viewer-pin").addEventListener("click", () => this.leave(() => this.onPin(this.image.seed)));
    $("viewer-close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // its backdrop
  }

  // image: {url, label, seed}. url: of the finished image, or of what there is of it.
  open(image, finished) {
    this.image = image;
    const title = [image.label, `seed ${image.seed}`].filter(Boolean).join(", ");
    $("viewer-title").textContent = title;
    Object.assign($("viewer-image"), { src: image.url, alt: title });
    for (const id of ["viewer-save", "viewer-copy", "viewer-edit"]) $(id).disabled = !finished;
    this.say(finished ? "" : "Not finished yet.");
    this.dialog.showModal();
  }

  leave(work) {
    this.dialog.close();
    work();
  }

  say(text) {
    $("viewer-status").textContent = text;
  }
}
