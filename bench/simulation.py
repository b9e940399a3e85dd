"""The service's own scheduler, driven through traces of requests in virtual time.

A step of a batch takes what the curve says, a request joins at the first step boundary after its arrival, and
nothing else takes time. The arrivals are those of `bench/workload.py`, the same for every policy and batch
size. Every run lasts until all its jobs have ended. Load 1 is the most rows per second on the curve.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from bench.workload import Request, trace
from model.chain import Chain
from model.samplers import ROW, Plan
from service.engine.estimates import StepTimes
from service.engine.jobs import Job, JobSpec, Sample, Stage
from service.engine.messages import Event
from service.engine.scheduler import Batch, Policy, Scheduler

Curve = tuple[tuple[int, float], ...]
"""(batch size, seconds of a step), by batch size."""
CURVES: dict[str, Curve] = {
    # Measured: a step of the service, two cores, float32.
    "cpu": ((1, 0.0079), (2, 0.0070), (4, 0.0127), (8, 0.0232), (16, 0.0455)),
    # Assumed: nearly flat.
    "gpu": tuple((size, 0.005 + 0.003 * (size - 1) / 31) for size in (1, 2, 4, 8, 16, 32)),
}
POLICIES = ("remaining", "fifo", "sharing", "peer")


@cache
def plan_of(steps: int, evaluations: int = 1) -> Plan:
    """A plan of so many steps of 1 or 2 network evaluations each; it computes nothing."""
    table = np.zeros(steps, ROW)
    table["w"] = evaluations
    return Plan(table)


class RunToCompletion:
    """THE PEER, no part of the service: a batch is formed, then run to its end before the next one is.

    The batch is the oldest waiting image and those behind it with as many steps, up to `max_batch_size` rows.
    It is better than most such servers: a request's images may be spread over batches, guided and unguided
    ones share a batch, and it never waits for a batch to fill up. Jobs have one stage.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Sample] = []
        self._batch: list[Sample] = []

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def backlog(self) -> int:
        """Network evaluations still to be done for all jobs."""
        return sum(job.remaining for job in self._jobs.values())

    def add(self, spec: JobSpec, now: float) -> list[Event]:  # noqa: ARG002 - the scheduler's interface
        """Accept a job, behind those in flight."""
        job = self._jobs[spec.id] = Job(spec)
        self._waiting += job.samples
        return []

    def schedule(self, now: float) -> Batch:  # noqa: ARG002 - the scheduler's interface
        """Continue with the batch, or form the next one."""
        free = self.max_batch_size
        others: list[Sample] = []
        if not self._batch:
            for sample in self._waiting:
                fits = sample.steps == self._waiting[0].steps and sample.evaluations <= free
                (self._batch if fits else others).append(sample)
                free -= sample.evaluations if fits else 0
            self._waiting = others
        return Batch(tuple(self._batch), sum(sample.evaluations for sample in self._batch))

    def commit(self, samples: Sequence[Sample]) -> dict[Job, list[Sample]]:
        """Advance the batch by a step. Returns its jobs and their samples."""
        advanced: dict[Job, list[Sample]] = {}
        for sample in samples:
            sample.job.remaining -= sample.evaluations
            sample.step += 1
            advanced.setdefault(sample.job, []).append(sample)
        if not samples[0].remaining:
            self._batch = []
        return advanced

    def stage_done(self, job: Job) -> bool:
        """Whether every image of the job is finished."""
        return not job.remaining

    def finish(self, job: Job) -> None:
        """End a job that is done."""
        del self._jobs[job.id]


@dataclass(eq=False)
class Outcome:
    """How a job fared, in seconds of the virtual clock.

    plan: of each of its images. ahead_evaluations, ahead_steps: at its arrival, the network evaluations still
    to be done for it and the jobs in flight, and the steps of the longest chain among them.
    evaluations_per_step: the most that any of them takes for a step of an image. first: the end of the first
    step that advanced it.
    """

    created: float
    plan: Plan
    images: int
    ahead_evaluations: int
    ahead_steps: int
    evaluations_per_step: int
    first: float = 0.0
    ended: float = 0.0

    @property
    def evaluations(self) -> int:
        """Network evaluations that it took."""
        return self.plan.remaining[0] * self.images

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last image."""
        return self.ended - self.created

    def slowdown(self, curve: Curve) -> float:
        """Latency over the least that it takes with the machine to itself, at any batch size."""
        per_step = self.plan.evaluations[0]
        sizes = {min(size, self.images * per_step) for size, _ in curve if size >= per_step}
        return self.latency / (self.evaluations * min(StepTimes(curve).at(size) / size for size in sizes))

    def bound(self, max_batch_size: int, fifo_interval: int, times: StepTimes) -> float:
        """Most seconds it takes under `remaining`, whatever comes later; proved in docs/scheduling.md."""
        full = max(1, max_batch_size - self.evaluations_per_step + 1)
        fifo_steps = int(self.ahead_evaluations / full + self.ahead_steps * (1 - 1 / full))
        return (fifo_interval * fifo_steps + 1) * times.at(max(max_batch_size, self.evaluations_per_step))


def read_curve(path: Path) -> Curve:
    """Take `runtime.step_seconds`, {batch size: seconds}, from a file with the answer of /info."""
    return curve_of(json.loads(path.read_text()))


def curve_of(info: Mapping[str, Any]) -> Curve:
    """The same from the answer itself."""
    seconds = info["runtime"]["step_seconds"]
    return tuple(sorted((int(size), float(value)) for size, value in seconds.items()))


def job_of(name: str, created: float, steps: int, images: int = 1, evaluations_per_step: int = 1) -> JobSpec:
    """A job of `images` chains of `steps` steps that arrives at `created` seconds."""
    plan = plan_of(steps, evaluations_per_step)
    stage = Stage("denoise", tuple(Chain(plan, seed) for seed in range(images)))
    return JobSpec(name, "ddim", (stage,), created=created)


def jobs_of(requests: Iterable[Request]) -> list[JobSpec]:
    """The jobs of a trace, named by their places in it."""
    return [
        job_of(str(i), each.created, each.steps, each.images, each.evaluations_per_step)
        for i, each in enumerate(requests)
    ]


def drive(scheduler: Scheduler | RunToCompletion, jobs: Iterable[JobSpec], times: StepTimes) -> list[Outcome]:
    """Run jobs, given in order of arrival, until all have ended; their outcomes in the same order."""
    now, coming = 0.0, list(jobs)[::-1]
    outcomes: dict[str, Outcome] = {}
    plans: dict[str, Plan] = {}  # of the jobs in flight
    while coming or len(scheduler):
        while coming and coming[-1].created <= now:
            spec = coming.pop()
            scheduler.add(spec, now)
            (stage,) = spec.stages
            plan = plans[spec.id] = stage.chains[0].plan
            steps = max(map(len, plans.values()))
            per_step = max(each.evaluations[0] for each in plans.values())
            ahead = scheduler.backlog, steps, per_step
            outcomes[spec.id] = Outcome(spec.created, plan, len(stage.chains), *ahead)
        batch = scheduler.schedule(now)
        if not batch.samples:
            now = coming[-1].created
            continue
        now += times.at(batch.size)
        for job in scheduler.commit(batch.samples):
            outcome = outcomes[job.id]
            outcome.first = outcome.first or now
            if scheduler.stage_done(job):
                scheduler.finish(job)
                outcome.ended = now
                del plans[job.id]
    return list(outcomes.values())


@dataclass(frozen=True)
class Case:
    """One run. load: share of capacity; batch_size: most rows of a step, 0 for the usual one."""

    curve: Curve
    workload: str = "mix"
    policy: str = "remaining"
    batch_size: int = 0
    load: float = 0.7
    fifo_interval: int = 8
    arrivals: int = 1000
    seed: int = 0

    @property
    def max_batch_size(self) -> int:
        """The usual one is the curve's knee, as in the service, and at least 16 for the peer."""
        return self.batch_size or max(StepTimes(self.curve).knee(), 16 if self.policy == "peer" else 1)

    @property
    def capacity(self) -> float:
        """The most rows per second at any of the curve's points."""
        return max(size / seconds for size, seconds in self.curve)

    def drive(self, jobs: Iterable[JobSpec]) -> list[Outcome]:
        """Run these jobs under the case's policy, batch size and interval."""
        times, size = StepTimes(self.curve), self.max_batch_size
        if self.policy == "peer":
            return drive(RunToCompletion(size), jobs, times)
        return drive(Scheduler(size, times, cast("Policy", self.policy), self.fifo_interval), jobs, times)


@cache
def run(case: Case) -> list[Outcome]:
    """Simulate the case's trace; the result of an earlier call comes from memory."""
    requests = trace(case.workload, case.load * case.capacity, case.arrivals, case.seed)
    return case.drive(jobs_of(requests))
