"""What one sample is to become, as data: its plan, its seed, and where it begins.

Nothing here needs torch, so a chain can be made, stored and sent by a process that has no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.samplers import Plan
from model.schedule import DATA_RANGE, DataRange

Image = NDArray[np.float32]
"""[C, H, W], pixels in the model's data range, [-1, 1] with most."""
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class SphericalMix:
    """A point on the great circle between two latents that the stage before this one left.

    first, second: indices of that stage's samples; share: 0 is the first, 1 the second (Song et al. 2021,
    eq. 67).
    """

    first: int
    second: int
    share: float


@dataclass(frozen=True, eq=False)
class InitialLatent:
    """Where a chain begins: a weighted sum of images and of starting noises, given by their seeds.

    carried: begin with what the previous stage left instead; then there are neither images nor noises.
    """

    images: tuple[tuple[float, Image], ...] = ()
    noises: tuple[tuple[float, int], ...] = ()
    carried: SphericalMix | None = None


@dataclass(frozen=True, eq=False)
class KnownPixels:
    """Pixels that are given: `image` where `mask`, [1 or C, H or 1, W or 1] bool, is true."""

    image: Image
    mask: Mask


@dataclass(frozen=True, eq=False)
class Chain:
    """Everything a step needs to know about a sample besides its latent and its step.

    label: class index, or None for the unconditional branch. start: None for the noise of its own seed.
    condition: what the network is given beside x, [K, H, W], if it takes that (model/condition.py).
    """

    plan: Plan
    seed: int
    label: int | None = None
    start: InitialLatent | None = None
    known: KnownPixels | None = None
    condition: Image | None = None


def noised(plan: Plan, image: Image, seed: int) -> InitialLatent:
    """The image with as much noise as the plan's first step expects (Ho et al. 2020, eq. 4)."""
    return InitialLatent(((plan.start, image),), ((math.sqrt(1 - plan.start**2), seed),))


def measuring(plan: Plan, image: Image, seed: int, label: int | None = None) -> Chain:
    """A chain that measures an image: it begins with the image under noise, and all its pixels are known."""
    known = KnownPixels(image, np.ones((1, 1, 1), np.bool_))
    return Chain(plan, seed, label, noised(plan, image, seed), known)


def from_pixels(pixels: NDArray[np.uint8], data_range: DataRange = DATA_RANGE) -> Image:
    """An 8-bit image [H, W, C] as a sample [C, H, W] in data_range. `denoiser.to_pixels` inverts it."""
    low, high = data_range
    levels = pixels.transpose(2, 0, 1).astype(np.float32)
    return np.ascontiguousarray(levels / np.float32(255 / (high - low)) + np.float32(low))
