"""Paths from where one chain begins to where another does: weights from (1, 0) to (0, 1), and their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from model.chain import Image, InitialLatent

COLLINEAR = 1e-6
"""Sine of an angle below which no single great circle passes through two vectors."""


def linear(share: float) -> tuple[float, float]:
    """Weights on the straight line, as Ho et al. (2020, §4.4) mix two noisy images; share in [0, 1]."""
    return 1 - share, share


def spherical(share: float, angle: float = math.pi / 2) -> tuple[float, float]:
    """Weights on the great circle between two vectors an angle apart (Song et al. 2021, eq. 67).

    angle: in radians, from 0 to π. The default is that of two independent noises: cosine and sine keep their
    variance. Collinear vectors are mixed on the straight line. share in [0, 1].
    """
    if math.sin(angle) < COLLINEAR:
        return linear(share)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def angle_between(a: Image, b: Image) -> float:
    """The angle between two latents [C, H, W] as vectors, in radians from 0 to π."""
    u, v = a.astype(np.float64), b.astype(np.float64)
    cosine = (u * v).sum() / math.sqrt((u * u).sum() * (v * v).sum())
    return math.acos(min(1.0, max(-1.0, float(cosine))))


def mixed(weights: Sequence[float], starts: Sequence[InitialLatent]) -> InitialLatent:
    """The weighted sum of where chains begin. Terms of weight 0 are left out."""
    weighted = [(weight, start) for weight, start in zip(weights, starts, strict=True) if weight]
    return InitialLatent(
        tuple((weight * share, image) for weight, start in weighted for share, image in start.images),
        tuple((weight * share, seed) for weight, start in weighted for share, seed in start.noises),
    )
