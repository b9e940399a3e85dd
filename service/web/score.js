// One image noised at many timesteps, and the network's x₀ prediction at each. No DOM in here.

import { follow } from "./stream.js";

const GREY_LEVELS = 127.5; // of 255, in a distance of 1 between pixels in [-1, 1]

export const rmse = (mse) => Math.sqrt(mse) * GREY_LEVELS;

export class ScoreRun {
  constructor(image) {
    this.image = image; // {url, label}, and {file} where what is shown is not what is sent
    this.frames = []; // {timestep, x0, xt, bits, mse}, by timestep
    this.score = null;
  }

  // Evaluates `terms` timesteps and calls onFrame after every event. Returns the problem of an `error` event, else
  // null. Throws Problem.
  async run({ terms, label }, signal, onFrame) {
    const images = [(this.image.file ?? this.image.url).split(",")[1]];
    const body = { images, terms, seed: 0, preview: "both", preview_every: 1, output_format: "png" };
    if (label !== null) body.class_label = label;
    for await (const { type, data } of follow("score", signal, body)) {
      if (type === "error") return data;
      if (type === "completed") this.score = data.scores[0];
      for (const picture of type === "preview" ? data.images : []) this.record(picture, data.timestep);
      onFrame();
    }
    return null;
  }

  record({ kind, media_type, b64_json, measure }, eventTimestep) {
    const timestep = measure?.timestep ?? eventTimestep;
    let at = this.frames.findIndex((frame) => frame.timestep >= timestep);
    if (at < 0) at = this.frames.length;
    if (this.frames[at]?.timestep !== timestep) this.frames.splice(at, 0, { timestep });
    Object.assign(this.frames[at], { bits: measure?.bits, mse: measure?.mse });
    this.frames[at][kind] = `data:${media_type};base64,${b64_json}`;
  }

  // Index of the frame whose timestep is nearest.
  nearest(timestep) {
    return nearest(this.frames, timestep);
  }
}

export function nearest(points, timestep) {
  let best = 0;
  points.forEach((point, at) => {
    if (Math.abs(point.timestep - timestep) < Math.abs(points[best].timestep - timestep)) best = at;
  });
  return best;
}
