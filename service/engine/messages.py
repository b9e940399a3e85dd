"""What goes into the engine and what comes out, as frozen data.

Commands change what is in flight; events say what happened to a job; reports are all that an engine sends.
Pictures are uint8 [H, W, C] arrays, read-only where they have come from another process.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from model.condition import Part
from model.schedule import NoiseSchedule
from model.typicality import Typicality
from service.engine.jobs import JobSpec, SnapshotKind
from service.errors import ServiceError

Pixels = NDArray[np.uint8]

# ── Commands ───────────────────────────────────────────────────────────────────────────────────


class EngineConfig(Struct, frozen=True, tag=True):
    """What an engine is to run, sent to it once, first of all. As the settings of the same names.

    sample_size: (height, width). slots: samples in flight at once, at most.
    """

    model: str
    device: str = "auto"
    runtime: str = "auto"
    dtype: str = "auto"
    max_batch: int = 0
    slots: int = 256
    policy: str = "remaining"
    batch_invariant: bool = True
    log_format: str = "text"
    sample_size: tuple[int, int] | None = None


class AddJob(Struct, frozen=True, tag=True):
    """Run this job, whose slots are reserved.

    again: an engine that died had it, so its deadline has been promised.
    """

    spec: JobSpec
    again: bool = False


class CancelJob(Struct, frozen=True, tag=True):
    """Stop a job; nothing happens when it is already over."""

    job_id: str


class Locate(Struct, frozen=True, tag=True):
    """Say how far a job is, in a Located; nothing happens when it is already over."""

    job_id: str


class AbortAll(Struct, frozen=True, tag=True):
    """Drop every job in flight."""


class Drain(Struct, frozen=True, tag=True):
    """Stop the engine as soon as nothing is in flight. No AddJob follows it."""


Command = AddJob | CancelJob | Locate | AbortAll | Drain

# ── Events ─────────────────────────────────────────────────────────────────────────────────────


class Measurement(Struct, frozen=True, tag=True):
    """What a measuring step found: L_t in bits per dimension, mean squared error of x₀ in [-1, 1]."""

    timestep: int
    bits: float
    mse: float


class Picture(Struct, frozen=True, eq=False, tag=True):
    """A finished sample, or a snapshot of one in progress. measurement: of the step that it shows."""

    index: int
    seed: int
    kind: SnapshotKind
    pixels: Pixels
    measurement: Measurement | None = None


class Queued(Struct, frozen=True, tag=True):
    """Accepted. position: jobs that go before it; eta_s: seconds until it is expected to be finished."""

    job_id: str
    position: int
    eta_s: float


class Preview(Struct, frozen=True, tag=True):
    """Some of a job's samples have just done step `step` of `steps` (from 1), at `timestep`."""

    job_id: str
    step: int
    steps: int
    timestep: int
    eta_s: float
    pictures: tuple[Picture, ...]


class Finished(Struct, frozen=True, tag=True):
    """All samples are done. Durations in seconds. measurements: by sample and step, of a measuring stage."""

    job_id: str
    pictures: tuple[Picture, ...]
    queue_s: float
    run_s: float
    measurements: tuple[tuple[Measurement, ...], ...] = ()


class Failed(Struct, frozen=True, tag=True):
    """It ended without a result; the error says why. started: whether it had had a step."""

    job_id: str
    error: ServiceError
    started: bool = False


class Cancelled(Struct, frozen=True, tag=True):
    """It was stopped on request."""

    job_id: str


Terminal = Finished | Failed | Cancelled
Event = Queued | Preview | Terminal

# ── Reports ────────────────────────────────────────────────────────────────────────────────────


class Invariance(Struct, frozen=True, tag=True):
    """How far batch neighbours changed a result when it was tried: the most over these batch sizes."""

    batch_sizes: tuple[int, ...]
    max_abs_difference: float

    @property
    def holds(self) -> bool:
        """Whether every result was the same to the last bit."""
        return self.max_abs_difference == 0.0


class SelfTestResult(Struct, frozen=True, tag=True):
    """How far a known result was missed: the largest difference, in standard deviations of the result."""

    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it was not missed by more than allowed. A difference that is no number is none that is."""
        return self.difference <= self.tolerance


class EngineInfo(Struct, frozen=True, tag=True):
    """What runs, and what was measured at its start.

    step_times: (batch size, seconds). self_test: None where the model has no known result.
    """

    model: str
    runtime: str
    device: str
    dtype: str
    max_batch_size: int
    step_times: tuple[tuple[int, float], ...]
    invariance: Invariance
    self_test: SelfTestResult | None = None

    @property
    def fit(self) -> bool:
        """Whether the engine computes what it should, as far as that is known."""
        return self.self_test is None or self.self_test.passed


class ModelInfo(Struct, frozen=True, eq=False, tag=True):
    """The model that an engine has loaded.

    class_names: each means one class only. conditional: its network takes class labels; guided: it has a null
    class; classified: there is a classifier for guidance. typicality: of its training images, where it is
    known. condition: what the network takes beside x, in order. sampler: the nearest to the scheduler that
    the model came with. lowest_timestep: the first that its network has a value at. checksum: sha256 of the
    files that decide its results.
    """

    name: str
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    conditional: bool
    guided: bool
    classified: bool
    typicality: Typicality | None
    parameters: int
    condition: tuple[Part, ...] = ()
    sampler: str = "dpmpp_2m"
    lowest_timestep: int = 0
    checksum: str = ""


class Load(Struct, frozen=True, tag=True):
    """What is in flight. running: samples of the latest step; backlog: network evaluations left."""

    running: int = 0
    waiting: int = 0
    backlog: int = 0
    backlog_s: float = 0.0


class StepReport(Struct, frozen=True, tag=True):
    """One step, or no step where batch_size is 0.

    batch_size: rows of the network call. samples: how many were advanced. seconds: of the denoiser's work, to
    its end on the device. nonfinite: samples that came out with a NaN or an infinity.
    """

    events: list[Event]
    batch_size: int = 0
    samples: int = 0
    seconds: float = 0.0
    nonfinite: int = 0


class Loaded(Struct, frozen=True, tag=True):
    """The engine has its model, and is about to warm up. folder: where it is; of the Hub's, that commit's."""

    folder: str


class Ready(Struct, frozen=True, tag=True):
    """The engine is loaded and warm. devices: how many of its kind this machine has."""

    info: EngineInfo
    model: ModelInfo
    devices: int = 1


class Progress(Struct, frozen=True, tag=True):
    """What has happened since the last report, and what is in flight now.

    launched: the jobs of a step that has just been launched, where these are others than before.
    """

    step: StepReport
    load: Load
    launched: tuple[str, ...] | None = None


class Located(Struct, frozen=True, tag=True):
    """How far a job is, to whom it may concern.

    running: whether it has had a step. position: jobs that go before it; eta_s: seconds until it is expected
    to be finished; None where that is not known yet. progress: the share of its network evaluations.
    """

    job_id: str
    running: bool = False
    position: int | None = None
    eta_s: float | None = None
    progress: float = 0.0


class Forecast(Struct, frozen=True, tag=True):
    """When jobs in flight are expected to end, should no other come: (id, seconds from now)."""

    ends: tuple[tuple[str, float], ...]


class Stopped(Struct, frozen=True, tag=True):
    """The engine has ended: after a drain, or because it cannot continue."""

    failed: bool


Report = Loaded | Ready | Progress | Located | Forecast | Stopped
