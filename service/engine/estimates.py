"""How long things take: seconds of a step by batch size, and of a job from the work that lies before it.

Remaining work is known exactly, in network evaluations; what a step of so many costs is measured. Pure, like
the scheduler, which says what goes before a job.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from service.engine.jobs import Job


class StepTimes:
    """Seconds a step takes by batch size: measured points, kept up to date, straight lines between."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        known = dict(sorted(points))
        self._sizes, self._seconds = list(known), list(known.values())
        self._least = list(known.values())

    def observe(self, batch_size: int, seconds: float) -> None:
        """Move the estimate at `batch_size` by a tenth towards what was just measured."""
        old = self.at(batch_size)
        place = bisect_left(self._sizes, batch_size)
        if place == len(self._sizes) or self._sizes[place] != batch_size:
            self._least.insert(place, min(old, self.quickest.at(batch_size)))
            self._sizes.insert(place, batch_size)
            self._seconds.insert(place, old)
        self._seconds[place] = old + 0.1 * (seconds - old)
        self._least[place] = min(self._least[place], self._seconds[place])

    @property
    def quickest(self) -> StepTimes:
        """The lowest estimates so far: what the device has shown that it can do."""
        return StepTimes(list(zip(self._sizes, self._least, strict=True)))

    def at(self, batch_size: int) -> float:
        """Expected seconds of a step; beyond the last point, in proportion."""
        place = bisect_left(self._sizes, batch_size)
        if place == len(self._sizes):
            return self._seconds[-1] * batch_size / self._sizes[-1]
        high = self._sizes[place]
        if place == 0 or high == batch_size:
            return self._seconds[place]
        low = self._sizes[place - 1]
        share = (batch_size - low) / (high - low)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def knee(self, tolerance: float = 0.07) -> int:
        """The smallest measured batch whose rows per second are within `tolerance` of the best."""
        rates = [size / seconds for size, seconds in zip(self._sizes, self._seconds, strict=True)]
        enough = (1 - tolerance) * max(rates)
        return next(size for size, rate in zip(self._sizes, rates, strict=True) if rate >= enough)


def shortest(job: Job, times: StepTimes, max_batch_size: int) -> float:
    """Seconds `job` would still take alone, each stage in steps as wide as its own work makes them."""
    seconds = 0.0
    for steps, evaluations in _stages_left(job):
        size = min(max_batch_size, max(1, evaluations // steps))
        seconds += max(steps, evaluations / size) * times.at(size)
    return seconds


def until_finished(job: Job, work: float, backlog: int, times: StepTimes, max_batch_size: int) -> float:
    """Seconds until `job` is expected to be finished.

    work: network evaluations that are done by then, its own among them. backlog: those of everything in
    flight, `job` included. All that work at the full batch's rate; but no less than its own steps take when
    they are as wide as all the work in flight makes them.
    """
    alone = shortest(job, times, max_batch_size)
    steps = sum(steps for steps, _ in _stages_left(job))
    if steps == 0:
        return alone
    size = min(max_batch_size, max(1, backlog // steps))
    rate = max_batch_size / times.at(max_batch_size)
    return max(work / rate, steps * times.at(size), alone)


def steps_left(job: Job) -> int:
    """Steps until `job` is finished, if all its images advance in each."""
    left = max([sample.steps - sample.step for sample in job.samples], default=0)
    later = job.spec.stages[job.place + 1 :]
    return left + sum(stage.steps for stage in later) if later else left


def _stages_left(job: Job) -> Iterator[tuple[int, int]]:
    """(steps of the longest chain, network evaluations) that are left of each stage not yet done."""
    later = job.spec.stages[job.place + 1 :]
    steps = max((sample.steps - sample.step for sample in job.samples), default=0)
    if steps:
        yield steps, job.remaining - sum(stage.evaluations for stage in later)
    for stage in later:
        yield stage.steps, stage.evaluations
