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
from typing import Literal

from model.chain import Chain

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
    preview_every: steps between previews, after that of the first step; None: as many as an eye can follow.
    owner: whom its slots and its part of every step are counted for; it decides when, and not what.
    """

    id: str
    sampler: str
    stages: tuple[Stage, ...]
    deadline: float | None = None
    created: float = 0.0
    preview: PreviewKind = "none"
    preview_every: int | None = 1
    owner: str = ""

    @cached_property
    def evaluations(self) -> int:
        """Network evaluations of all stages."""
        return sum(stage.evaluations for stage in self.stages)

    @cached_property
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
    """One sample of a job's current stage.

    step: the next one of its plan, which has `steps`. slot: where its state is kept.
    """

    job: Job
    index: int
    chain: Chain
    step: int = 0
    slot: int | None = None
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.steps = len(self.chain.plan)

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
    over: whether nothing more will happen to it. remaining: network evaluations until it is finished, later
    stages included. key, arrival, first_step: its place in the scheduler's order; evaluations of its first
    step until it has had it.
    """

    spec: JobSpec
    state: State = State.WAITING
    started: float | None = None
    place: int = 0
    over: bool = False
    key: int = 0
    arrival: int = 0
    first_step: int = 0
    id: str = field(init=False)
    samples: list[Sample] = field(init=False)
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.id, self.remaining = self.spec.id, self.spec.evaluations
        self._enter_stage()

    def _enter_stage(self) -> None:
        self.samples = [Sample(self, index, chain) for index, chain in enumerate(self.stage.chains)]

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
        self.state, self.over = state, not LEGAL[state]
