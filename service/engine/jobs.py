"""Jobs. `JobSpec` is what was asked for, immutable data; `Job` is how far the engine has got with it.

A job is a list of stages, each of which advances n samples that share a step's network call with everybody
else's. A stage starts from noise, from pictures, or from a mix of what the stage before it left. A job moves

    WAITING ──▶ RUNNING ──▶ FINISHED
       │           │
       └───────────┴──────▶ FAILED, CANCELLED

An illegal change raises and changes nothing. Remaining work is known exactly at every moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import msgspec
import numpy as np

from model.chain import Chain
from model.samplers import ROW

PreviewKind = Literal["x0", "xt", "both", "none"]
SnapshotKind = Literal["x0", "xt"]
"""A picture of a sample between steps: of its x₀ prediction, or of x_t itself."""
StageKind = Literal["denoise", "invert", "measure"]


@dataclass(frozen=True, eq=False)
class Stage:
    """Samples that are advanced side by side.

    denoise: down to images. invert: up to the noise that they come from. measure: each step evaluates a known
    image at another timestep, and what it found is part of the result.
    """

    kind: StageKind
    chains: tuple[Chain, ...]

    @cached_property
    def evaluations(self) -> int:
        """Network evaluations of all its samples."""
        return sum(chain.plan.remaining[0] for chain in self.chains)

    @cached_property
    def steps(self) -> int:
        """Steps of its longest chain."""
        return max(len(chain.plan) for chain in self.chains)

    @property
    def result(self) -> SnapshotKind:
        """What is shown of a finished sample: a measurement leaves its last x₀ prediction."""
        return "x0" if self.kind == "measure" else "xt"


@dataclass(frozen=True, eq=False)
class JobSpec:
    """Everything that decides a job's result, as data: it can be stored, sent, run again and compared.

    sampler: what its images are counted by. deadline, created: seconds on the machine's monotonic clock.
    preview_every: steps between previews, after that of the first step.
    """

    id: str
    sampler: str
    stages: tuple[Stage, ...]
    deadline: float | None = None
    created: float = 0.0
    preview: PreviewKind = "none"
    preview_every: int = 1

    @cached_property
    def evaluations(self) -> int:
        """Network evaluations of all stages."""
        return sum(stage.evaluations for stage in self.stages)

    @property
    def slots(self) -> int:
        """Samples in flight at once, at most."""
        return max(len(stage.chains) for stage in self.stages)


class State(Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


LEGAL: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    State.RUNNING: frozenset({State.FINISHED, State.FAILED, State.CANCELLED}),
    State.FINISHED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class IllegalTransitionError(RuntimeError):
    """A job was moved to a state it cannot reach from where it is."""


@dataclass(eq=False, slots=True)
class Sample:
    """One sample of a job's current stage. step: the next one of its plan."""

    job: Job
    index: int
    chain: Chain
    step: int = 0

    @property
    def steps(self) -> int:
        """Steps of the whole plan."""
        return len(self.chain.plan)

    @property
    def remaining(self) -> int:
        """Network evaluations until it is finished."""
        return self.chain.plan.remaining[self.step]

    @property
    def evaluations(self) -> int:
        """Network evaluations of its next step: the rows it takes of a network call."""
        return self.chain.plan.evaluations[self.step]


@dataclass(eq=False, slots=True)
class Job:
    """A job in flight.

    started: when its first step was scheduled. place: index of the current stage, whose samples these are.
    remaining: network evaluations until the job is finished, later stages included.
    """

    spec: JobSpec
    state: State = State.WAITING
    started: float | None = None
    place: int = 0
    samples: list[Sample] = field(init=False)
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.remaining = self.spec.evaluations
        self._enter_stage()

    def _enter_stage(self) -> None:
        self.samples = [Sample(self, index, chain) for index, chain in enumerate(self.stage.chains)]

    @property
    def id(self) -> str:
        """The id of its spec."""
        return self.spec.id

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.spec.stages[self.place]

    @property
    def last_stage(self) -> bool:
        """Whether no stage follows the current one."""
        return self.place == len(self.spec.stages) - 1

    def next_stage(self) -> None:
        """Begin the following stage with new samples."""
        self.place += 1
        self._enter_stage()

    def move_to(self, state: State) -> None:
        """Change state. Raises IllegalTransitionError, and changes nothing, when the change is not legal."""
        if state not in LEGAL[self.state]:
            raise IllegalTransitionError(f"job {self.id}: {self.state.value} → {state.value}")
        self.state = state

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return not LEGAL[self.state]


# ── Specs as bytes ─────────────────────────────────────────────────────────────────────────────

Frame = bytes | memoryview
DTYPES = (np.dtype(np.float32), np.dtype(np.bool_), ROW)
"""Of a spec's arrays; the header names them by their place here."""


def to_frames(spec: JobSpec) -> list[Frame]:
    """A spec as a header and the memory of its arrays, uncopied; an array that is shared goes once."""
    places: dict[int, int] = {}  # id of an array → its place among the frames
    arrays: list[np.ndarray[Any, Any]] = []

    def store(value: object) -> tuple[object, ...]:
        if not isinstance(value, np.ndarray) or value.dtype not in DTYPES:
            raise NotImplementedError(f"{type(value).__name__} is not part of a job")
        if id(value) not in places:
            places[id(value)] = len(arrays)
            arrays.append(value)
        return places[id(value)], DTYPES.index(value.dtype), value.shape

    header = msgspec.msgpack.encode(spec, enc_hook=store)
    return [header, *(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays)]


def from_frames(frames: list[Frame]) -> JobSpec:
    """The spec that `to_frames` was given. Its arrays are read-only views of the frames.

    Raises msgspec.MsgspecError or ValueError for frames that are no spec.
    """
    header, *buffers = frames
    arrays: dict[int, np.ndarray[Any, Any]] = {}

    def load(_: type, value: list[Any]) -> np.ndarray[Any, Any]:
        place, dtype, shape = value
        try:
            if place not in arrays:
                arrays[place] = np.frombuffer(buffers[place], DTYPES[dtype]).reshape(shape)
                arrays[place].flags.writeable = False
        except (IndexError, OverflowError) as error:  # msgspec wraps a ValueError, but none of these
            raise ValueError(f"no such array: {error}") from error
        return arrays[place]

    return msgspec.msgpack.decode(header, type=JobSpec, dec_hook=load)
