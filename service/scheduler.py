"""Who runs in the next step. Pure: no tensors, no threads, no clock; the simulation drives the same code.

Samples, not requests, are scheduled: a step takes any samples whose rows fit into `max_rows` of one network
call, whatever their samplers, step counts and timesteps. Policies:

remaining  the job with the least remaining work first, so that a request for one image overtakes a request
           for 64; but before all others those that have had no step yet, so that every request shows
           something at once. Every `turn`-th step goes in order of arrival instead, which
           bounds starvation: whatever comes later, a job is finished within `turn` times the full-width
           steps, plus one, that serving everybody in order of arrival could take (docs/scheduling.md has
           the proof).
fifo       in order of arrival.
sharing    whoever has waited longest for a step.

Within a job the least advanced sample goes first, so that all its images sharpen together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from typing import Literal

import numpy as np
from sortedcontainers import SortedList

from service.errors import CancelledError, DeadlineError, ServiceError
from service.events import Cancelled, Event, Failed, Finished, Picture, Preview, Queued
from service.jobs import Job, Sample, State

Policy = Literal["remaining", "fifo", "sharing"]
Draw = Callable[[Sequence[tuple[Sample, str]]], Sequence[Picture]]
"""For each (sample, "x0" or "xt"), what it looks like after the step being committed."""


class StepTimes:
    """Seconds a step takes by rows: measured points, kept up to date, straight lines between."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        known = dict(sorted(points))
        self._rows, self._seconds = list(known), list(known.values())

    def observe(self, rows: int, seconds: float) -> None:
        """Move the estimate at `rows` a tenth of the way to what was just seen."""
        old = self.at(rows)
        place = bisect_left(self._rows, rows)
        if place == len(self._rows) or self._rows[place] != rows:
            self._rows.insert(place, rows)
            self._seconds.insert(place, old)
        self._seconds[place] = old + 0.1 * (seconds - old)

    def at(self, rows: int) -> float:
        """Expected seconds of a step of `rows` rows; beyond the last point, in proportion."""
        place = bisect_left(self._rows, rows)
        if place == len(self._rows):
            return self._seconds[-1] * rows / self._rows[-1]
        high = self._rows[place]
        if place == 0 or high == rows:
            return self._seconds[place]
        low = self._rows[place - 1]
        share = (rows - low) / (high - low)
        return self._seconds[place - 1] * (1 - share) + self._seconds[place] * share

    def knee(self, tolerance: float = 0.07) -> int:
        """The narrowest measured batch whose rows per second are within `tolerance` of the best."""
        rates = [rows / seconds for rows, seconds in zip(self._rows, self._seconds, strict=True)]
        enough = (1 - tolerance) * max(rates)
        return next(rows for rows, rate in zip(self._rows, rates, strict=True) if rate >= enough)


class KeyedSums:
    """Sums of whole numbers under small keys, and over all the keys below one."""

    def __init__(self) -> None:
        self._sums = np.zeros(1024, np.int64)
        self.total = 0

    def add(self, key: int, value: int) -> None:
        """Add to the sum under a key ≥ 0."""
        if key >= len(self._sums):
            self._sums = np.concatenate((self._sums, np.zeros(key, np.int64)))
        self._sums[key] += value
        self.total += value

    def at(self, key: int) -> int:
        """The sum under a key."""
        return int(self._sums[key]) if key < len(self._sums) else 0

    def below(self, key: int) -> int:
        """The sum under all smaller keys."""
        return int(self._sums[:key].sum())


@dataclass(frozen=True)
class StepPlan:
    """The samples of one step, and the rows their network call has."""

    samples: tuple[Sample, ...]
    rows: int


@dataclass
class Scheduler:
    """Holds every job from arrival to end. `max_rows` may be lowered while running (out of memory)."""

    max_rows: int
    times: StepTimes
    policy: Policy = "remaining"
    turn: int = 8
    _jobs: dict[str, Job] = field(default_factory=dict)  # in order of arrival
    _arrivals: int = 0
    _steps: int = 0

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.turn < 2:
            raise ValueError("max_rows must be at least 1 and turn at least 2")
        # (key, arrival, job), smallest first; a job's entries are taken out before its remaining rows change.
        self._order: SortedList[tuple[int, int, str]] = SortedList()
        self._entries: dict[str, tuple[int, int, str]] = {}
        self._active: dict[str, list[Sample]] = {}  # unfinished ones, the least advanced first
        self._new: SortedList[tuple[int, int, str]] = SortedList()  # entries without a committed step
        self._first: dict[str, int] = {}  # rows of their first steps
        # Under a job's remaining rows: those rows, and if it has had no step yet, those of the first.
        self._rows, self._first_rows = KeyedSums(), KeyedSums()
        self._deadlines: SortedList[tuple[float, str]] = SortedList()
        self._backlog = self._running = self._unfinished = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def backlog(self) -> int:
        """Rows of network calls still to be done for everybody."""
        return self._backlog

    @property
    def running(self) -> int:
        """Samples of the step that was scheduled last, as far as they can still be among the unfinished."""
        return min(self._running, self._unfinished)

    @property
    def waiting(self) -> int:
        """Unfinished samples that are not running."""
        return self._unfinished - self.running

    def add(self, job: Job, now: float) -> list[Event]:
        """Take a job in, or fail it at once when its deadline is certain to pass."""
        queued = Queued(job.id, self._ahead(job)[0], self.eta(job))
        if job.deadline is not None and now + self.shortest(job) > job.deadline:
            job.move_to(State.FAILED)
            needed = f"it needs {self.shortest(job):.1f} s even alone"
            return [Failed(job.id, DeadlineError(f"The deadline cannot be met: {needed}."))]
        self._arrivals += 1
        self._jobs[job.id] = job
        self._active[job.id] = list(job.samples)
        if job.deadline is not None:
            self._deadlines.add((job.deadline, job.id))
        self._backlog += job.remaining
        self._unfinished += len(job.samples)
        self._enter(job, self._arrivals)
        self._new.add(self._entries[job.id])
        # Rows of its first step, should it have the batch to itself.
        self._first[job.id] = min(self.max_rows, sum(sample.cost for sample in job.samples))
        self._first_rows.add(job.remaining, self._first[job.id])
        return [queued]

    def cancel(self, job_id: str) -> list[Event]:
        """Drop a job; nothing when it is already over."""
        job = self._jobs.get(job_id)
        if job is None:
            return []
        self._leave(job, State.CANCELLED)
        return [Cancelled(job_id)]

    def fail(self, job_id: str, error: ServiceError) -> list[Event]:
        """End a job with an error; nothing when it is already over."""
        job = self._jobs.get(job_id)
        if job is None:
            return []
        self._leave(job, State.CANCELLED if isinstance(error, CancelledError) else State.FAILED)
        return [Failed(job_id, error)]

    def fail_all(self, error: ServiceError) -> list[Event]:
        """End every job with an error."""
        return [event for job_id in list(self._jobs) for event in self.fail(job_id, error)]

    def expire(self, now: float) -> list[Event]:
        """Fail the jobs whose deadline has passed, before more is computed for them."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] < now:
            events += self.fail(self._deadlines[0][1], DeadlineError("The deadline has passed."))
        return events

    def schedule(self, now: float) -> StepPlan:
        """Choose the samples of the step that begins now. Empty when there is nothing to do."""
        free = self.max_rows
        chosen: list[Sample] = []
        # A bounded look ahead: a last odd row is not worth walking a long queue for.
        for job in islice(self._by_priority(), 4 * self.max_rows):
            for sample in islice(self._active[job.id], 4 * self.max_rows):
                # A guided sample costs two rows, and has to run even where one row is all there is.
                if sample.cost <= free or not chosen:
                    self._start(job, now)
                    chosen.append(sample)
                    free -= sample.cost
                if free <= 0:
                    break
            if free <= 0:
                break
        self._running = len(chosen)
        return StepPlan(tuple(chosen), self.max_rows - free)

    def commit(self, plan: StepPlan, now: float, draw: Draw) -> list[Event]:
        """Advance the plan's samples by a row, but for those whose jobs have ended since."""
        self._steps += 1
        events: list[Event] = []
        touched: dict[str, list[Sample]] = {}
        for sample in plan.samples:
            if sample.job.id in self._jobs:
                touched.setdefault(sample.job.id, []).append(sample)
        for job_id, samples in touched.items():
            job = self._jobs[job_id]
            arrival = self._exit(job)
            for sample in samples:
                self._advance(sample, draw)
            if self._active[job_id]:
                self._enter(job, arrival)
            events += self._previews(job, samples, draw)
            for sample in samples:
                if sample.row == sample.steps:
                    sample.latent = None
            if not self._active[job_id]:
                self._leave(job, State.FINISHED)
                events.append(self._finished(job, now))
        return events

    def eta(self, job: Job) -> float:
        """Seconds until `job` is expected to be finished, should nobody else come.

        The work that goes before it and its own, at the full batch's rate; never less than `shortest`.
        """
        rate = self.max_rows / self.times.at(self.max_rows)
        return max((self._ahead(job)[1] + job.remaining + job.later) / rate, self.shortest(job))

    def shortest(self, job: Job) -> float:
        """Seconds `job` would take with the machine to itself, what it goes on with included."""
        later = 0.0 if job.sequel is None else self.shortest(job.sequel.job)
        longest = max((sample.steps - sample.row for sample in job.samples), default=0)
        if longest == 0:
            return later
        rows = min(self.max_rows, max(1, job.remaining // longest))  # as wide as its steps are on average
        return later + max(longest, job.remaining / rows) * self.times.at(rows)

    def _ahead(self, job: Job) -> tuple[int, int]:
        """(jobs, rows) that go before a job; when sharing, all the others do. Does not look at every job."""
        entry = self._entries.get(job.id)
        if self.policy == "sharing":
            return len(self) - (entry is not None), self._backlog - (job.remaining if entry else 0)
        if self.policy == "fifo":
            earlier = takewhile(lambda other: other is not job, self._jobs.values())
            return (
                self._order.bisect_left(entry) if entry else len(self),
                sum(other.remaining for other in earlier) if entry else self._backlog,
            )
        entry = entry or (job.remaining, self._arrivals + 1, job.id)
        key = entry[0]
        before = self._order.bisect_left(entry)
        equal_before = before - self._order.bisect_left((key, 0, ""))
        rows = self._rows.below(key) + equal_before * key
        # Those behind it have their first step before its last.
        behind = self._first_rows.total - self._first_rows.below(key)
        equal_new = self._new.bisect_left((key + 1, 0, "")) - self._new.bisect_left((key, 0, ""))
        if equal_new:  # of those with as much to do, the part that did not come before it
            not_behind = self._new.bisect_right(entry) - self._new.bisect_left((key, 0, ""))
            behind -= self._first_rows.at(key) * not_behind // equal_new
        return before, rows + behind

    def _by_priority(self) -> Iterator[Job]:
        if self.policy == "fifo" or (self.policy == "remaining" and self._steps % self.turn == self.turn - 1):
            return iter(self._jobs.values())
        ordered = iter(self._order)
        if self.policy == "remaining" and self._new:
            ordered = chain(self._new, (entry for entry in self._order if entry[2] not in self._first))
        return (self._jobs[job_id] for _, _, job_id in ordered)

    def _start(self, job: Job, now: float) -> None:
        if job.state is State.WAITING:
            job.move_to(State.RUNNING)
            job.started = now

    def _advance(self, sample: Sample, draw: Draw) -> None:
        active = self._active[sample.job.id]
        active.remove(sample)
        sample.job.remaining -= sample.cost
        self._backlog -= sample.cost
        sample.row += 1
        if sample.row < sample.steps:
            active.append(sample)
        else:
            # What a probe leaves behind is its last guess; its latent is the image that it was asked about.
            (sample.result,) = draw([(sample, "x0" if sample.chain.plan.probe else "xt")])
            self._unfinished -= 1

    def _previews(self, job: Job, samples: Sequence[Sample], draw: Draw) -> Iterator[Preview]:
        """One event per row that some of the job's samples have reached and that is due a look.

        The first and the last are, and every `preview_every`-th.
        """
        if job.preview == "none":
            return
        kinds = ("x0", "xt") if job.preview == "both" else (job.preview,)
        by_row: dict[int, list[Sample]] = {}
        for sample in samples:
            if sample.row in (1, sample.steps) or sample.row % job.preview_every == 0:
                by_row.setdefault(sample.row, []).append(sample)
        eta = self.eta(job) if by_row else 0.0
        for row, group in by_row.items():
            timestep = group[0].chain.plan.timesteps[row - 1]
            pictures = tuple(draw([(sample, kind) for sample in group for kind in kinds]))
            yield Preview(job.id, row, group[0].steps, timestep, eta, pictures)

    def _finished(self, job: Job, now: float) -> Finished:
        started = job.started if job.started is not None else now
        pictures = tuple(sample.result for sample in job.samples)
        measures = tuple(sample.measures for sample in job.samples)
        return Finished(job.id, pictures, started - job.created, now - started, measures)

    def _enter(self, job: Job, arrival: int) -> None:
        key = {"remaining": job.remaining, "fifo": 0, "sharing": self._steps}[self.policy]
        self._entries[job.id] = (key, arrival, job.id)
        self._order.add(self._entries[job.id])
        self._rows.add(job.remaining, job.remaining)

    def _exit(self, job: Job) -> int:
        """Take a job's entries out, before it changes. Returns its arrival, for the next entry."""
        entry = self._entries.pop(job.id)
        self._order.remove(entry)
        self._rows.add(job.remaining, -job.remaining)
        first = self._first.pop(job.id, None)
        if first is not None:
            self._new.remove(entry)
            self._first_rows.add(job.remaining, -first)
        return entry[1]

    def _leave(self, job: Job, state: State) -> None:
        if job.id in self._entries:
            self._exit(job)
        if job.deadline is not None:
            self._deadlines.remove((job.deadline, job.id))
        job.move_to(state)
        for sample in job.samples:
            sample.latent = None
        self._unfinished -= len(self._active[job.id])
        self._backlog -= job.remaining
        del self._jobs[job.id], self._active[job.id]
