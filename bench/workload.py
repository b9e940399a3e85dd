"""What is requested, and when: one trace for the simulation and for the load on real servers.

Arrivals are Poisson, drawn from a seeded Philox generator: the same seed gives the same requests at any rate,
only closer together, and a longer trace begins with a shorter one. "uniform" is one image of 50 steps each
time; "mix" is 70 % of 20 steps, 25 % of 50 and 5 % of 250, one to eight images, 30 % of them guided (two
network evaluations for a step of an image).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

WORKLOADS = ("uniform", "mix")
GUIDED = 0.3  # share of the mix's requests that are guided
MAX_IMAGES = 8
CLASSES = 10
DRAWN = 10_000  # requests of any trace at least, so that a shorter one is the beginning of a longer one
MEAN_EVALUATIONS = {"uniform": 50.0, "mix": 39 * 4.5 * (1 + GUIDED)}
"""Of a request: for the mix, the means of steps, images and evaluations per step multiplied."""


@dataclass(frozen=True)
class Request:
    """One request: DDIM, of a class. created: seconds after the trace's start. Image i has seed + i."""

    created: float
    steps: int
    images: int = 1
    guided: bool = False
    label: int = 0
    seed: int = 0

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of a step of one image."""
        return 2 if self.guided else 1

    @property
    def evaluations(self) -> int:
        """Network evaluations in all, each of which is a row of a network call."""
        return self.steps * self.images * self.evaluations_per_step


def trace(
    workload: str, rows_per_s: float, arrivals: int, seed: int = 0, classes: int = CLASSES
) -> list[Request]:
    """Draw `arrivals` requests, in order, that need `rows_per_s` network evaluations a second on average.

    Raises ValueError for an unknown workload.
    """
    if workload not in WORKLOADS:
        raise ValueError(f"a workload is one of {', '.join(WORKLOADS)}, not {workload!r}")
    rng = np.random.Generator(np.random.Philox(seed))
    drawn = max(arrivals, DRAWN)
    gaps = rng.exponential(size=drawn)
    if workload == "uniform":
        steps, images = np.full(drawn, 50), np.ones(drawn, np.int64)
        guided = np.zeros(drawn, bool)
    else:
        steps = rng.choice([20, 50, 250], size=drawn, p=[0.7, 0.25, 0.05])
        images = rng.integers(1, MAX_IMAGES, size=drawn, endpoint=True)
        guided = rng.random(drawn) < GUIDED
    created = np.cumsum(gaps) * MEAN_EVALUATIONS[workload] / rows_per_s
    labels = rng.integers(classes, size=drawn)
    seeds = range(0, MAX_IMAGES * drawn, MAX_IMAGES)  # no two images share one
    columns = (created.tolist(), steps.tolist(), images.tolist(), guided.tolist(), labels.tolist(), seeds)
    return [Request(*each) for each in islice(zip(*columns, strict=True), arrivals)]
