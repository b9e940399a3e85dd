"""What the service promises at a request's arrival, and what comes of it, in virtual time.

The requests of a trace ask a service of 256 slots: one that finds none free, or whose deadline is refused,
does not come back. Of those accepted, the time to completion that was announced stands beside the actual
one; and with deadlines, what was computed beside what was in time. Each run is made by the service's own
scheduler, and beside it by one that expects no further arrivals, or that looks at every deadline alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from bench.simulation import Case, jobs_of
from bench.workload import Request, trace
from service.engine.estimates import StepTimes
from service.engine.jobs import Job, JobSpec
from service.engine.messages import Failed, Queued
from service.engine.promises import Load, Promises, Urgency
from service.engine.scheduler import Policy, Scheduler

SLOTS = 256
PATIENCE = (1.5, 6.0)
"""Deadlines: so many times what the request takes alone at the full batch's rate, uniform between the two."""


class Unsuspecting(Scheduler):
    """Expects no further arrivals."""

    def _look_at_arrivals(self, now: float) -> None:
        pass


class Unhurried(Promises):
    """Never lets a deadline go first."""

    def urgency(self, load: Load) -> Urgency:  # noqa: ARG002 - the interface
        """What the next step is made of."""
        return Urgency.NONE


class OneByOne(Scheduler):
    """Looks at each deadline alone, and never lets one go first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._promises = Unhurried()

    def _not_beside_others(self, job: Job, now: float) -> None:
        pass


@dataclass
class Promised:
    """A request. Seconds of the virtual clock; infinite where it did not end.

    eta: what was announced. computed: network evaluations that were done for it.
    """

    spec: JobSpec
    accepted: bool = False
    slots_free: bool = True
    eta: float = math.inf
    ended: float = math.inf
    computed: int = 0

    @property
    def latency(self) -> float:
        """Seconds from arrival to end."""
        return self.ended - self.spec.created


def serve(scheduler: Scheduler, specs: Sequence[JobSpec], times: StepTimes) -> list[Promised]:
    """Serve requests, given in order of arrival, until all have ended."""
    now, waiting = 0.0, list(specs)[::-1]
    found = {spec.id: Promised(spec) for spec in specs}
    taken: dict[str, int] = {}
    while waiting or len(scheduler):
        while waiting and waiting[-1].created <= now:
            spec = waiting.pop()
            images = len(spec.stages[0].chains)
            found[spec.id].slots_free = sum(taken.values()) + images <= SLOTS
            if found[spec.id].slots_free:
                (event,) = scheduler.add(spec, now)
                if isinstance(event, Queued):
                    found[spec.id].accepted = True
                    found[spec.id].eta = event.eta_s + now - spec.created
                    taken[spec.id] = images
        for event in scheduler.expire(now):
            assert isinstance(event, Failed)
            del taken[event.job_id]
        batch = scheduler.schedule(now)
        if not batch.samples:
            now = max(now, waiting[-1].created) if waiting else now
            continue
        now += times.at(batch.size)
        for job, samples in scheduler.commit(batch.samples).items():
            found[job.id].computed += sum(s.chain.plan.evaluations[s.step - 1] for s in samples)
            if scheduler.stage_done(job):
                scheduler.finish(job)
                found[job.id].ended = now
                del taken[job.id]
    return list(found.values())


def announced(case: Case, kind: type[Scheduler] = Scheduler) -> list[Promised]:
    """The accepted requests of a trace, without deadlines."""
    done = _serve(case, kind, jobs_of(_trace(case)))
    return [promised for promised in done if promised.accepted]


def with_deadlines(case: Case, kind: type[Scheduler] = Scheduler) -> list[Promised]:
    """All requests of a trace, each with a deadline."""
    draw = np.random.Generator(np.random.Philox(case.seed + 1)).uniform(*PATIENCE, case.arrivals)
    times = StepTimes(case.curve)
    step_s, rows = times.at(case.max_batch_size), case.max_batch_size
    specs = []
    for spec, patience in zip(jobs_of(_trace(case)), draw.tolist(), strict=True):
        (stage,) = spec.stages
        alone = step_s * max(stage.steps, spec.evaluations / rows)
        specs.append(
            JobSpec(spec.id, spec.sampler, spec.stages, spec.created + patience * alone, created=spec.created)
        )
    return _serve(case, kind, specs)


def _trace(case: Case) -> list[Request]:
    return trace(case.workload, case.load * case.capacity, case.arrivals, case.seed)


def _serve(case: Case, kind: type[Scheduler], specs: Sequence[JobSpec]) -> list[Promised]:
    times = StepTimes(case.curve)
    policy = cast("Policy", case.policy)
    return serve(kind(case.max_batch_size, times, policy, case.fifo_interval), specs, times)


def eta_rows(base: Case) -> list[list[object]]:
    """Announced and actual times to completion: by load and policy, and without a look at arrivals."""
    rows: list[list[object]] = []
    for load in (0.5, 0.9, 2.0):
        for name, policy, kind in (
            ("remaining", "remaining", Scheduler),
            ("remaining, no more expected", "remaining", Unsuspecting),
            ("fifo", "fifo", Scheduler),
        ):
            done = announced(replace(base, load=load, policy=policy), kind)
            late = np.array([promised.latency - promised.eta for promised in done])
            ratio = np.array([promised.latency / promised.eta for promised in done])
            shown = [f"{np.percentile(late, q):+.1f}" for q in (5, 50, 95)]
            shown += [f"{np.percentile(ratio, q):.2f}" for q in (5, 50, 95)]
            mean = np.mean([promised.latency for promised in done])
            rows.append([load, name, len(done), *shown, f"{np.mean(np.abs(late)):.2f}", f"{mean:.2f}"])
    return rows


def deadline_rows(base: Case) -> list[list[object]]:
    """What deadlines do with the device: all together, and each for itself."""
    rows: list[list[object]] = []
    for load in (0.7, 1.2, 2.0):
        for name, kind in (("together", Scheduler), ("one by one", OneByOne)):
            done = with_deadlines(replace(base, load=load), kind)
            accepted = [promised for promised in done if promised.accepted]
            met = [promised for promised in accepted if promised.ended < math.inf]
            computed = sum(promised.computed for promised in done)
            delivered = sum(promised.computed for promised in met)
            full = sum(not promised.slots_free for promised in done)
            refused = len(done) - len(accepted) - full
            row: list[object] = [load, name, len(done), full, refused, len(accepted) - len(met), len(met)]
            rows.append([*row, computed, f"{delivered / computed:.3f}"])
    return rows
