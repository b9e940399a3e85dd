// Reads /info, with an API key where the service requires one, and how the model's samples are shown.

import * as key from "./key.js";
import { Problem } from "./stream.js";

const $ = (id) => document.getElementById(id);

// Returns the answer of /info. `content` is hidden while the form #key-form asks for a key.
export async function connect(content, say) {
  for (;;) {
    const response = await fetch("info", { headers: key.headers() }).catch(() => null);
    if (!response) throw new Problem({ title: "The service cannot be reached. Reload to try again" });
    const unauthorized = response.status === 401;
    $("key-form").hidden = !unauthorized;
    content.hidden = unauthorized;
    if (response.ok) return response.json();
    if (response.status === 503) {
      say("The model is being loaded.");
      await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(response.headers.get("Retry-After")) || 1)));
      continue;
    }
    if (!unauthorized) throw await Problem.from(response);
    say(key.isSet() ? "The API key was not accepted." : "This service requires an API key.", key.isSet());
    key.set(await keyEntered());
  }
}

function keyEntered() {
  $("key").select();
  return new Promise((resolve) => {
    // Not a listener with `once`: a second press would then submit the form and leave the page.
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      resolve($("key").value);
    };
  });
}

const KINDS = { 1: " grey", 3: "", 4: " with alpha" };

// Whether samples are pictures; else they are arrays, which are shown channel by channel.
export const isPicture = (model) => model.channels in KINDS;

// Proportions of the frames below an element, and what shows through where a picture is transparent.
export function showShape(element, { picture, channels }) {
  element.style.setProperty("--aspect", `${picture.width} / ${picture.height}`);
  element.classList.toggle("alpha", channels === 4);
}

export function summarize({ model, runtime }) {
  const size = `${model.height} × ${model.width}${KINDS[model.channels] ?? ` × ${model.channels}`}`;
  const parameters = `${(model.parameters / 1e6).toFixed(1)} M parameters`;
  return [size, parameters, `${runtime.name} ${runtime.dtype} on ${runtime.device}`].join(" · ");
}
