// Draws the data set: node generate.mjs FOLDER [TRAIN_PER_CLASS] [TEST_PER_CLASS]
//
// Writes FOLDER/{train,test}/CLASS/NUMBER.png: 16×16 RGB portraits in the style "Pixel Art" of DiceBear, at the size they
// are designed in, so that every pixel is as the designer set it. Each is a function of its own name: split, class and
// number are its seed, and the versions of package-lock.json do the rest.

import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { createAvatar } from "@dicebear/core";
import * as pixelArt from "@dicebear/pixel-art";
import { Resvg } from "@resvg/resvg-js";

const SIZE = 16;
const BACKGROUNDS = ["b6e3f4", "c0aede", "d1d4f9", "ffd5dc", "ffdfbf", "c8e6c9"];

const numbered = (prefix, count) => Array.from({ length: count }, (_, i) => prefix + String(i + 1).padStart(2, "0"));
const SHORT = { hair: numbered("short", 24), hatProbability: 0 };
const LONG = { hair: numbered("long", 21), hatProbability: 0 };
const HAT = { hair: numbered("short", 24), hatProbability: 100 };
const BARE = { glassesProbability: 0 };
const GLASSES = { glassesProbability: 100 };

// What a portrait has on its head and before its eyes; the rest is left to the style.
const CLASSES = {
  "short hair": { ...SHORT, ...BARE },
  "short hair and glasses": { ...SHORT, ...GLASSES },
  "long hair": { ...LONG, ...BARE },
  "long hair and glasses": { ...LONG, ...GLASSES },
  hat: { ...HAT, ...BARE },
  "hat and glasses": { ...HAT, ...GLASSES },
};

function portrait(seed, options) {
  const avatar = createAvatar(pixelArt, { seed, backgroundColor: BACKGROUNDS, ...options });
  return new Resvg(avatar.toString(), { fitTo: { mode: "width", value: SIZE }, shapeRendering: 1 }).render().asPng();
}

function write(folder, split, perClass) {
  for (const [name, options] of Object.entries(CLASSES)) {
    const place = join(folder, split, name);
    mkdirSync(place, { recursive: true });
    for (let i = 0; i < perClass; i += 1) {
      const file = `${String(i).padStart(5, "0")}.png`;
      writeFileSync(join(place, file), portrait(`${split}/${name}/${i}`, options));
    }
    console.log(`${place}: ${perClass}`);
  }
}

const [folder, train = 3000, test = 350] = process.argv.slice(2);
if (!folder) {
  console.error("usage: node generate.mjs FOLDER [TRAIN_PER_CLASS] [TEST_PER_CLASS]");
  process.exit(2);
}
write(folder, "train", Number(train));
write(folder, "test", Number(test));
