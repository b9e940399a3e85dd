"""The service's own scheduler, driven through traces of requests in virtual time.

A step of r rows takes what the curve says, a request joins at the first step boundary after it came, and
nothing else takes time. The arrivals are those of `bench/workload.py`, the same for every policy and width.
Every run lasts until all its jobs have ended. Load 1 is the most rows per second on the curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from service.events import Event, Finished, Picture
from service.jobs import Job, Sample
from service.scheduler import Draw, Policy, Scheduler, StepPlan, StepTimes

from bench.workload import Ask, trace

Curve = tuple[tuple[int, float], ...]
"""(rows, seconds of a step), by rows."""
CURVES: dict[str, Curve] = {
    # Measured: a step of the service, two cores, float32.
    "cpu": ((1, 0.0079), (2, 0.0070), (4, 0.0127), (8, 0.0232), (16, 0.0455)),
    # Assumed: nearly flat.
    "gpu": tuple((rows, 0.005 + 0.003 * (rows - 1) / 31) for rows in (1, 2, 4, 8, 16, 32)),
}
POLICIES = ("remaining", "fifo", "sharing", "peer")
EMPTY = np.empty((0, 0, 1), np.uint8)


@dataclass(frozen=True)
class Course:
    """A chain and its plan in one; only length and cost matter here."""

    steps: int
    cost: int = 1
    seed: int = 0
    probe = False

    def __len__(self) -> int:
        return self.steps

    @property
    def plan(self) -> Course:
        """Itself."""
        return self

    @property
    def timesteps(self) -> Sequence[int]:
        """Any will do."""
        return range(self.steps)

    @property
    def rows(self) -> Sequence[int]:
        """The same for each step."""
        return _same(self.steps, self.cost)

    @property
    def work(self) -> Sequence[int]:
        """In proportion to the steps left."""
        return range(self.steps * self.cost, -1, -self.cost)


@cache
def _same(steps: int, cost: int) -> Sequence[int]:
    return (cost,) * steps


class RunToCompletion:
    """THE PEER, no part of the service: a batch is formed, then run to its end before the next one is.

    The batch is the oldest waiting image and those behind it with as many steps, up to `width` rows.
    A kind peer: a request's images may be spread over batches, guided and unguided ones share a batch, and it
    never waits for a batch to fill up.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._jobs: set[str] = set()
        self._waiting: list[Sample] = []
        self._batch: list[Sample] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, now: float) -> list[Event]:  # noqa: ARG002 - the scheduler's interface
        """Take a job in, behind those that are there."""
        self._jobs.add(job.id)
        self._waiting += job.samples
        return []

    def schedule(self, now: float) -> StepPlan:  # noqa: ARG002 - the scheduler's interface
        """Go on with the batch, or form the next one."""
        free = self.width
        others: list[Sample] = []
        if not self._batch:
            for sample in self._waiting:
                fits = sample.steps == self._waiting[0].steps and sample.cost <= free
                (self._batch if fits else others).append(sample)
                free -= sample.cost if fits else 0
            self._waiting = others
        return StepPlan(tuple(self._batch), sum(sample.cost for sample in self._batch))

    def commit(self, plan: StepPlan, now: float, draw: Draw) -> list[Event]:  # noqa: ARG002 - the same
        """Advance the batch by a step; after its last, end the jobs that lack no other image."""
        for sample in plan.samples:
            sample.job.remaining -= sample.cost
            sample.row += 1
        if plan.samples[0].remaining:
            return []
        self._batch = []
        over = {sample.job.id: sample.job for sample in plan.samples if not sample.job.remaining}
        self._jobs -= over.keys()
        return [Finished(job_id, (), 0.0, now - job.created) for job_id, job in over.items()]


@dataclass(eq=False)
class Outcome:
    """How a job fared, in seconds of the virtual clock."""

    created: float
    course: Course  # of each of its images
    images: int
    ahead_rows: int  # still to be done at its arrival, for it and the jobs there
    ahead_steps: int  # of the longest chain among them
    cost: int  # rows of a step of the widest
    first: float = 0.0  # end of the first step that advanced it
    ended: float = 0.0

    @property
    def rows(self) -> int:
        """Rows of network calls that it took."""
        return self.course.work[0] * self.images

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last image."""
        return self.ended - self.created

    def slowdown(self, curve: Curve) -> float:
        """Latency over the least that it takes with the machine to itself, at any width."""
        cost = self.course.cost
        widths = {min(rows, self.images * cost) for rows, _ in curve if rows >= cost}
        return self.latency / (self.rows * min(StepTimes(curve).at(rows) / rows for rows in widths))

    def bound(self, width: int, turn: int, times: StepTimes) -> float:
        """Most seconds it takes under `remaining`, whatever comes later; proved in docs/scheduling.md."""
        full = max(1, width - self.cost + 1)
        turns = int(self.ahead_rows / full + self.ahead_steps * (1 - 1 / full))
        return (turn * turns + 1) * times.at(max(width, self.cost))


def read_curve(path: Path) -> Curve:
    """Take `runtime.step_seconds`, {rows: seconds}, from a file with the answer of /info."""
    return curve_of(json.loads(path.read_text()))


def curve_of(info: Mapping[str, Any]) -> Curve:
    """The same from the answer itself."""
    seconds = info["runtime"]["step_seconds"]
    return tuple(sorted((int(rows), float(value)) for rows, value in seconds.items()))


def request(name: str, created: float, steps: int, images: int = 1, rows: int = 1) -> Job:
    """Build a job of `images` chains of `steps` steps and `rows` rows, that arrives at `created` seconds."""
    job = Job(name, "ddim", created=created)
    for seed in range(images):
        job.add(Course(steps, rows, seed))
    return job


def jobs_of(asks: Iterable[Ask]) -> list[Job]:
    """Build the jobs of a trace, named by their places in it."""
    return [request(str(i), ask.created, ask.steps, ask.images, ask.width) for i, ask in enumerate(asks)]


def draw(looks: Iterable[tuple[Sample, str]]) -> list[Picture]:
    """Return empty pictures."""
    return [Picture(sample.index, sample.chain.seed, kind, EMPTY) for sample, kind in looks]


def drive(serving: Scheduler | RunToCompletion, jobs: Iterable[Job], times: StepTimes) -> list[Outcome]:
    """Run jobs, given in order of arrival, until all have ended; their outcomes in the same order."""
    now, coming = 0.0, list(jobs)[::-1]
    outcomes: dict[str, Outcome] = {}
    there: dict[str, Job] = {}
    while coming or len(serving):
        while coming and coming[-1].created <= now:
            job = coming.pop()
            there[job.id] = job
            serving.add(job, now)
            courses = [cast("Course", other.samples[0].chain) for other in there.values()]
            work = sum(other.remaining for other in there.values())
            ahead = work, max(map(len, courses)), max(course.cost for course in courses)
            outcomes[job.id] = Outcome(job.created, courses[-1], len(job.samples), *ahead)
        plan = serving.schedule(now)
        if not plan.samples:
            now = coming[-1].created
            continue
        now += times.at(plan.rows)
        for outcome in {sample.job.id: outcomes[sample.job.id] for sample in plan.samples}.values():
            outcome.first = outcome.first or now
        for event in serving.commit(plan, now, draw):
            if isinstance(event, Finished):
                outcomes[event.job_id].ended = now
                del there[event.job_id]
    return list(outcomes.values())


@dataclass(frozen=True)
class Case:
    """One run. load: share of capacity; width: most rows of a step, 0 for the usual one."""

    curve: Curve
    workload: str = "mix"
    policy: str = "remaining"
    width: int = 0
    load: float = 0.7
    turn: int = 8
    arrivals: int = 1000
    seed: int = 0

    @property
    def rows(self) -> int:
        """The width; the usual one is the curve's knee, as in the service, and at least 16 for the peer."""
        return self.width or max(StepTimes(self.curve).knee(), 16 if self.policy == "peer" else 1)

    @property
    def capacity(self) -> float:
        """The most rows per second at any of the curve's points."""
        return max(rows / seconds for rows, seconds in self.curve)

    def drive(self, jobs: Iterable[Job]) -> list[Outcome]:
        """Run these jobs under the case's policy, width and turn."""
        times = StepTimes(self.curve)
        if self.policy == "peer":
            return drive(RunToCompletion(self.rows), jobs, times)
        return drive(Scheduler(self.rows, times, cast("Policy", self.policy), self.turn), jobs, times)


@cache
def run(case: Case) -> list[Outcome]:
    """Simulate the case's trace; asked again, the same answer comes from memory."""
    asks = trace(case.workload, case.load * case.capacity, case.arrivals, case.seed)
    return case.drive(jobs_of(asks))
