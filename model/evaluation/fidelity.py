"""How similar two sets of images are, given as features: pure functions, with their papers.

Features are [N, D] float64, a row per image. Which network they come from decides what the numbers mean:
values of different networks cannot be compared, and the Fréchet distance falls with N, so only
sets of the same size can.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
NEIGHBOURS = 3
"""k of the k-nearest-neighbour manifolds, as Kynkäänniemi et al. 2019 recommend."""


def frechet_distance(a: Features, b: Features) -> float:
    """d² between the Gaussians with the moments of two sets (Heusel et al. 2017, eq. 6), in [0, ∞).

    a: [N, D], b: [M, D], N and M at least 2. Like FID it is the squared distance,
    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), with covariances over N − 1.
    """
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    means = float(np.square(a.mean(0) - b.mean(0)).sum())
    # tr (Σ_a Σ_b)^½ = tr (Σ_a^½ Σ_b Σ_a^½)^½: the second is symmetric, so its eigenvalues are real.
    root_a = _square_root(cov_a)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0)).sum()
    # The true value is never negative; rounding can make it so for equal sets.
    return max(0.0, means + float(np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def _square_root(matrix: Features) -> Features:
    """The symmetric root of a positive semi-definite matrix [D, D], by its eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    # Covariances of few images are singular; rounding leaves some eigenvalues just below zero.
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def precision_recall(real: Features, fake: Features, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), each in [0, 1].

    real, fake: [N, D], of the same size N > k. Precision is the share of `fake` inside the manifold of
    `real` (are samples realistic?), recall the share of `real` inside that of `fake` (do samples cover the
    real images?). Raises ValueError when the sizes differ, because both measures depend on them.
    """
    if len(real) != len(fake):
        raise ValueError(f"precision and recall compare sets of one size, not {len(real)} and {len(fake)}")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Features, manifold: Features, k: int) -> float:
    """The share of `points` within the distance of some point of `manifold` to its k-th nearest other one."""
    # The nearest is the point itself, at distance 0, hence the k-th other is at place k from 0.
    radii = np.concatenate(
        [np.partition(_squared_distances(rows, manifold), k, axis=1)[:, k] for rows in _chunks(manifold)]
    )
    inside = [(_squared_distances(rows, manifold) <= radii).any(axis=1) for rows in _chunks(points)]
    return float(np.concatenate(inside).mean())


def _chunks(rows: Features, size: int = 500) -> list[Features]:
    """Pieces small enough that their distances to everything fit in memory."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _squared_distances(a: Features, b: Features) -> Features:
    """[N, D], [M, D] → [N, M]; never negative, and up to rounding zero between equal points."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    return np.asarray(np.maximum(squares - 2 * a @ b.T, 0))


def wilson_interval(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The interval for a probability seen `hits` times in `trials` (Wilson 1927); z = 1.96 for 95 %."""
    p, n = hits / trials, trials
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)
