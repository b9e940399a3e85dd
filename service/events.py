"""What happens to a job, as frozen data. Pictures are uint8 [H, W, C] arrays, whole and independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import ServiceError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Measure:
    """What a probe found at a timestep: L_t in bits per dimension, mean squared error of x₀ in [-1, 1]."""

    timestep: int
    bits: float
    error: float


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of a job: a finished one, or a look at one in the making (`kind` x0 or xt).

    measure: of a probe's guess. latent: x itself, [C, H, W], where the job has a sequel that goes on from it.
    """

    index: int
    seed: int
    kind: str
    pixels: Pixels
    measure: Measure | None = None
    latent: Floats | None = None


@dataclass(frozen=True)
class Queued:
    """Taken in. position: jobs that go before it; eta_s: seconds until it is expected to be finished."""

    job_id: str
    position: int
    eta_s: float


@dataclass(frozen=True)
class Preview:
    """Some of a job's samples have just done row `step` of `steps`, at `timestep`."""

    job_id: str
    step: int
    steps: int
    timestep: int
    eta_s: float
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Finished:
    """All samples are done. Durations in seconds. measures: each sample's, row by row, if they are probes."""

    job_id: str
    pictures: tuple[Picture, ...]
    queue_s: float
    run_s: float
    measures: tuple[tuple[Measure, ...], ...] = ()


@dataclass(frozen=True)
class Failed:
    """It ended without a result; the error says why."""

    job_id: str
    error: ServiceError


@dataclass(frozen=True)
class Cancelled:
    """Somebody stopped it."""

    job_id: str


Terminal = Finished | Failed | Cancelled
Event = Queued | Preview | Terminal
