"""What is requested of a fleet, and when. The same seed gives the same requests.

Steps are heavy-tailed: most requests have 20, one in 67 has 1000, and those have a quarter of all steps.
30 % are guided, which doubles their evaluations, and some ask for two or four images. The rate follows a
shape: constant, a day (here of any length) or a flash crowd. Times of a Poisson process of rate 1 are taken
through the inverse of the rate's integral (Çinlar 1975, "Introduction to Stochastic Processes", ch. 4.7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.workload import Request

STEPS, STEPS_P = (20, 50, 100, 250, 1000), (0.60, 0.25, 0.09, 0.045, 0.015)
IMAGES, IMAGES_P = (1, 2, 4), (0.7, 0.2, 0.1)
GUIDED = 0.3
MEAN_EVALUATIONS = float(np.dot(STEPS, STEPS_P) * np.dot(IMAGES, IMAGES_P) * (1 + GUIDED))
MEAN_IMAGES = float(np.dot(IMAGES, IMAGES_P))

Rate = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Times the usual rate, by seconds since the start: [N] → [N]."""


def constant(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """The usual rate."""
    return np.ones_like(times)


@dataclass(frozen=True)
class Diurnal:
    """A day: a sine around 1, lowest at its start and end. day_s: how long it is here."""

    day_s: float
    swing: float = 0.6

    def __call__(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times the usual rate."""
        return 1 - self.swing * np.cos(2 * np.pi * times / self.day_s)


@dataclass(frozen=True)
class Flash:
    """A crowd: from one moment to the next `times` the usual rate, for `lasts_s` seconds."""

    begins_s: float
    lasts_s: float
    times: float = 4.0

    def __call__(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times the usual rate."""
        inside = (times >= self.begins_s) & (times < self.begins_s + self.lasts_s)
        return np.where(inside, self.times, 1.0)


def arrivals(rows_per_s: float, duration_s: float, seed: int = 0, rate: Rate = constant) -> list[Request]:
    """Requests of `duration_s` seconds, in order, that need `rows_per_s` evaluations a second at rate 1."""
    rng = np.random.Generator(np.random.Philox(seed))
    grid = np.linspace(0, duration_s, 10_001)
    per_s = rate(grid[:-1]) * rows_per_s / MEAN_EVALUATIONS
    integral = np.concatenate([[0.0], np.cumsum(per_s * np.diff(grid))])
    count = rng.poisson(integral[-1])
    created = np.interp(np.sort(rng.uniform(0, integral[-1], count)), integral, grid)
    steps = rng.choice(STEPS, count, p=STEPS_P)
    images = rng.choice(IMAGES, count, p=IMAGES_P)
    guided = rng.random(count) < GUIDED
    columns = created.tolist(), steps.tolist(), images.tolist(), guided.tolist()
    return [Request(*each, seed=4 * i) for i, each in enumerate(zip(*columns, strict=True))]
