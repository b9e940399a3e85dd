"""Corruptions that turn images into outliers. All take and return uint8 [N, C, H, W]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from model.training.data import Pixels

NOISE = 25.0
"""Standard deviation of the noise, in levels of 255."""
BLUR = 1.0
"""Radius of the blur, in pixels."""


def noisy(images: Pixels) -> Pixels:
    """Gaussian noise of NOISE levels, the same in every run."""
    drawn = np.random.Generator(np.random.Philox(key=0)).standard_normal(images.shape, np.float32)
    noised: Pixels = np.rint(np.clip(images + NOISE * drawn, 0, 255)).astype(np.uint8)
    return noised


def blurred(images: Pixels) -> Pixels:
    """A Gaussian blur of radius BLUR."""
    blur = ImageFilter.GaussianBlur(BLUR)
    planes = images.reshape(-1, *images.shape[-2:])
    made = np.stack([np.asarray(Image.fromarray(plane).filter(blur)) for plane in planes])
    return made.reshape(images.shape)


def inverted(images: Pixels) -> Pixels:
    """Black for white."""
    return np.uint8(255) - images


def upside_down(images: Pixels) -> Pixels:
    """The top at the bottom."""
    return np.ascontiguousarray(images[..., ::-1, :])


CORRUPTIONS: dict[str, Callable[[Pixels], Pixels]] = {
    "noise": noisy,
    "blur": blurred,
    "inversion": inverted,
    "upside down": upside_down,
}
