"""Jobs and their samples, and which changes of state are legal.

A job is one request: n samples that share their parameters but for the seed. A job moves

    WAITING ──▶ RUNNING ──▶ FINISHED
       │           │
       └───────────┴──────▶ FAILED, CANCELLED

An illegal change raises and changes nothing. A sample's whole state is its row and its latent, which only
the engine looks into; its remaining work is therefore known exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

PreviewKind = Literal["x0", "xt", "both", "none"]


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


class Plan(Protocol):
    """A sampler's course: one row per step."""

    def __len__(self) -> int:
        """Rows."""

    @property
    def timesteps(self) -> Sequence[int]:
        """The timestep of each row."""

    @property
    def rows(self) -> Sequence[int]:
        """Rows of the network call that each row costs."""

    @property
    def work(self) -> Sequence[int]:
        """Rows of network calls still to be done before each row, and 0 after the last."""

    @property
    def probe(self) -> bool:
        """Whether its guesses are to be measured."""


class Chain(Protocol):
    """What the engine runs for a sample; the scheduler only needs its length and cost."""

    @property
    def plan(self) -> Plan:
        """One row per step."""

    @property
    def seed(self) -> int:
        """The seed of the sample's noise."""


@dataclass(eq=False, slots=True)
class Sample:
    """One image in the making. `row` is the next row of its plan; `result` is set once it is finished.

    latent: what the engine goes on from; None before the first step and once there is no next one. measures:
    what a probe has found, row by row.
    """

    job: Job
    index: int
    chain: Chain
    row: int = 0
    latent: Any = None
    result: Any = None
    measures: Any = ()

    @property
    def steps(self) -> int:
        """Rows of the whole plan."""
        return len(self.chain.plan)

    @property
    def remaining(self) -> int:
        """Rows of network calls until it is finished."""
        return self.chain.plan.work[self.row]

    @property
    def cost(self) -> int:
        """Rows of the network call of its next step."""
        return self.chain.plan.rows[self.row]


@dataclass(frozen=True, eq=False)
class Sequel:
    """What a job goes on with in its place: under its id, in its room, by its deadline, for its reader.

    job: what it will be; its samples are there from the start, so that what it takes is known. chains: from
    the finished pictures, which carry their latents then, the chains of its samples, by the same plans.
    """

    job: Job
    chains: Callable[[Sequence[Any]], Sequence[Chain]]


@dataclass(eq=False, slots=True)
class Job:
    """One request, or the first part of one. Times are on the caller's monotonic clock, in seconds."""

    id: str
    sampler: str
    deadline: float | None = None
    preview: PreviewKind = "none"
    preview_every: int = 1
    created: float = 0.0
    started: float | None = None
    state: State = State.WAITING
    samples: list[Sample] = field(default_factory=list)
    remaining: int = 0
    sequel: Sequel | None = None

    def add(self, chain: Chain) -> None:
        """Append a sample."""
        sample = Sample(self, len(self.samples), chain)
        self.samples.append(sample)
        self.remaining += sample.remaining

    def move_to(self, state: State) -> None:
        """Change state. Raises IllegalTransitionError, and changes nothing, when the change is not legal."""
        if state not in LEGAL[self.state]:
            raise IllegalTransitionError(f"job {self.id}: {self.state.value} → {state.value}")
        self.state = state

    def go_on(self, pictures: Sequence[Any]) -> Job:
        """The job that follows this finished one, running as if it had been this one all the time."""
        assert self.sequel is not None
        job = self.sequel.job
        for sample, chain in zip(job.samples, self.sequel.chains(pictures), strict=True):
            sample.chain = chain
        job.started = self.started
        job.move_to(State.RUNNING)
        return job

    @property
    def later(self) -> int:
        """Rows of network calls that its sequel will take."""
        return 0 if self.sequel is None else self.sequel.job.remaining

    @property
    def room(self) -> int:
        """Samples it holds room for: its own or its sequel's, whichever are more."""
        later = 0 if self.sequel is None else len(self.sequel.job.samples)
        return max(len(self.samples), later)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return not LEGAL[self.state]
