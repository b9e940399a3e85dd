// The way in: what the service says of itself, by a key where it asks for one.

import * as key from "./key.js";
import { Problem } from "./stream.js";

const $ = (id) => document.getElementById(id);

// The answer of /info. While the form #door asks for a key, `room` is not to be seen.
export async function enter(room, say) {
  for (;;) {
    const response = await fetch("info", { headers: key.headers() }).catch(() => null);
    if (!response) throw new Problem({ title: "The service cannot be reached. Reload to try again" });
    const asked = response.status === 401;
    $("door").hidden = !asked;
    room.hidden = asked;
    if (response.ok) return response.json();
    if (!asked) throw await Problem.from(response);
    say(key.isSet() ? "The service does not know this key." : "The service asks for a key.", key.isSet());
    key.set(await knock());
  }
}

function knock() {
  $("key").select();
  return new Promise((resolve) => {
    // Not a listener that is gone after once: a second press would then leave the page.
    $("door").onsubmit = (event) => {
      event.preventDefault();
      resolve($("key").value);
    };
  });
}

export function facts({ model, runtime }) {
  const size = `${model.height} × ${model.width}${model.channels === 1 ? " grey" : ""}`;
  const parameters = `${(model.parameters / 1e6).toFixed(1)} M parameters`;
  return [size, parameters, `${runtime.name} ${runtime.dtype} on ${runtime.device}`].join(" · ");
}
