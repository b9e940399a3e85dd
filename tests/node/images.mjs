// Calls the Images API with the official client and prints what came of it as one JSON object.
//
//     node images.mjs BASE_URL KEY PICTURE MASK

import { readFileSync } from "node:fs";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey, picture, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
const few = { seed: 7, num_inference_steps: 3 };
const found = {};

found.models = (await client.models.list()).data.map((model) => model.id);
found.model = (await client.models.retrieve(found.models[0])).id;

const { data, _request_id } = await client.images.generate({ prompt: "two dogs", n: 2, size: "64x64", ...few });
found.generated = data;
found.requestId = _request_id;

const upload = async (path) => toFile(readFileSync(path), "picture.png", { type: "image/png" });
const edited = await client.images.edit({
  prompt: "a cat",
  image: [await upload(picture)],
  mask: await upload(mask),
  ...few,
});
found.edited = edited.data[0].b64_json;

found.events = [];
const stream = await client.images.generate({ prompt: "a dog", stream: true, partial_images: 2, ...few });
for await (const event of stream) found.events.push(event);

const failure = async (call) => {
  try {
    await call();
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param };
  }
};
found.unknownPrompt = await failure(() => client.images.generate({ prompt: "a zebra" }));
found.unknownModel = await failure(() => client.models.retrieve("zebra"));
found.wrongKey = await failure(() => new OpenAI({ baseURL, apiKey: "wrong" }).models.list());
found.failedInStream = await failure(async () => {
  const failing = await client.images.generate({ prompt: "a dog", ...few, seed: 13, stream: true });
  for await (const event of failing) found.events.push(event);
});

console.log(JSON.stringify(found));
