"""Who runs in the next step. Pure: no tensors, no threads, no clock; the simulation drives the same code.

Samples, not requests, are scheduled: a step takes any samples whose evaluations fit into `max_batch_size`
rows of one network call, whatever their samplers, step counts and timesteps. Policies:

remaining  the job with the least remaining work first, so that a request for one image overtakes a request
           for 64; but before all others those that have had no step yet, so that every request shows
           something at once. Every `fifo_interval`-th step goes in order of arrival instead, which bounds
           starvation: whatever comes later, a job is finished within `fifo_interval` times the full-width
           steps, plus one, that serving everybody in order of arrival could take (docs/scheduling.md has
           the proof).
fifo       in order of arrival.
sharing    whoever has waited longest for a step.

Within a job the least advanced sample goes first, so that all its images sharpen together.

Jobs with deadlines are accepted only as far as all of them can be met, and go before others when it is time
(promises.py).

The policy orders the jobs of one owner. Several owners share the rows of every step (lanes.py), so that none
waits for another's queue; for each the bound on starvation is that of its own jobs in its part of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from service.engine import arrivals, estimates
from service.engine.arrivals import Arrivals
from service.engine.estimates import StepTimes
from service.engine.jobs import Job, JobSpec, Sample, State
from service.engine.lanes import Lane
from service.engine.messages import Cancelled, Event, Failed, Located, Queued
from service.engine.promises import Load, Promises, Urgency
from service.errors import CancelledError, DeadlineError, ServiceError

Policy = Literal["remaining", "fifo", "sharing"]
ARRIVALS_S = 1.0
"""Between two looks at how much work arrives."""


@dataclass(frozen=True)
class Batch:
    """The samples of one step, and the rows of its network call."""

    samples: tuple[Sample, ...]
    size: int


@dataclass
class Scheduler:
    """Holds every job from arrival to end. `max_batch_size` may change while running.

    in_flight: rows of a step whose samples are committed, but whose results are not there yet.
    """

    max_batch_size: int
    times: StepTimes
    policy: Policy = "remaining"
    fifo_interval: int = 8
    in_flight: int = 0
    _jobs: dict[str, Job] = field(default_factory=dict)  # in order of arrival
    _arrivals: int = 0
    _steps: int = 0

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.fifo_interval < 2:
            raise ValueError("max_batch_size must be at least 1 and fifo_interval at least 2")
        self._lanes: dict[str, Lane] = {}  # by owner, of those with jobs
        self._served = self._free = 0
        self._active: dict[str, list[Sample]] = {}  # unfinished ones, the least advanced first
        self._promises = Promises()
        self._inflow = Arrivals()
        self._slower, self._slower_at = self._inflow.slower(1.0, 1.0, 0.0), -math.inf
        self._backlog = self._running = self._unfinished = 0

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def backlog(self) -> int:
        """Network evaluations still to be done for all jobs."""
        return self._backlog

    @property
    def backlog_s(self) -> float:
        """Seconds that they take at the full batch's rate."""
        return self._backlog * self.times.at(self.max_batch_size) / self.max_batch_size

    @property
    def running(self) -> int:
        """Samples of the step that was scheduled last, as far as they can still be among the unfinished."""
        return min(self._running, self._unfinished)

    @property
    def waiting(self) -> int:
        """Unfinished samples that are not running."""
        return self._unfinished - self.running

    def add(self, spec: JobSpec, now: float, *, again: bool = False) -> list[Event]:
        """Accept a job, or fail it at once when its deadline cannot be met beside those accepted before it.

        again: it was accepted before, by an engine that died, and is failed only if it is certain to be late.
        """
        job = Job(spec)
        self._look_at_arrivals(now)
        eta = self.eta(job)
        if spec.deadline is not None:
            reason = self._too_late(job, now) or (None if again else self._not_beside_others(job, now))
            if reason:
                return [Failed(job.id, DeadlineError(reason))]
            eta = min(eta, spec.deadline - now)
        queued = Queued(job.id, self._ahead(job)[0], eta)
        self._arrivals += 1
        self._jobs[job.id] = job
        self._promises.add(job)
        self._inflow.add(job.remaining, now)
        self._backlog += job.remaining
        self._begin_stage(job)
        job.arrival = self._arrivals
        lane = self._lanes.get(spec.owner)
        if lane is None:
            lane = self._lanes[spec.owner] = Lane(self.policy)
        lane.enter(job, self._steps)
        # Should it have the batch to itself.
        lane.begin(job, min(self.max_batch_size, sum(sample.evaluations for sample in job.samples)))
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
        return [Failed(job_id, error, started=job.started is not None)]

    def cancel_all(self) -> list[Event]:
        """Drop every job."""
        return [event for job_id in list(self._jobs) for event in self.cancel(job_id)]

    def expire(self, now: float) -> list[Event]:
        """Fail the jobs whose deadline has passed, before more is computed for them."""
        events: list[Event] = []
        while (job := self._promises.expired(now)) is not None:
            events += self.fail(job.id, DeadlineError("The deadline has passed."))
        return events

    def schedule(self, now: float) -> Batch:
        """Choose the samples of the step that begins now. Empty when there is nothing to do."""
        self._free = self.max_batch_size
        chosen: dict[Sample, None] = {}

        def choose(sample: Sample) -> bool:
            # A guided sample takes two rows, and has to run even where only one fits.
            evaluations = sample.evaluations
            fits = (evaluations <= self._free or not chosen) and sample not in chosen
            if fits:
                self._start(sample.job, now)
                chosen[sample] = None
                self._free -= evaluations
            return fits

        self._look_at_arrivals(now)
        load = self._load(now)
        urgency = self._promises.urgency(load)
        if urgency is not Urgency.NONE:
            self._in_line(self._of_promised(load), choose)
        if urgency is not Urgency.ONLY or not chosen:
            if len(self._lanes) == 1:
                (lane,) = self._lanes.values()
                self._in_line(self._samples(lane), choose)
            else:
                self._in_turns(choose, chosen)
        self._running = len(chosen)
        return Batch(tuple(chosen), self.max_batch_size - self._free)

    def commit(self, samples: Sequence[Sample]) -> dict[Job, list[Sample]]:
        """Advance samples by a step, but for those whose jobs have ended since it was scheduled.

        A step counts when it is launched, before its results are there: what is left is known without them.
        Returns the jobs that were advanced and which of their samples. A job whose stage is done waits to be
        finished, failed or given its next stage.
        """
        self._steps += 1
        advanced: dict[Job, list[Sample]] = {}
        for sample in samples:
            if not sample.job.over:
                advanced.setdefault(sample.job, []).append(sample)
        for job, its in advanced.items():
            lane = self._lanes[job.spec.owner]
            lane.exit(job)
            before = job.remaining
            for sample in its:
                self._advance(sample)
            lane.backlog -= before - job.remaining
            lane.enter(job, self._steps)
        return advanced

    def stage_done(self, job: Job) -> bool:
        """Whether every sample of the job's current stage is finished."""
        return not self._active[job.id]

    def next_stage(self, job: Job) -> None:
        """Begin the stage after one that is done."""
        job.next_stage()
        self._begin_stage(job)

    def finish(self, job: Job) -> None:
        """End a job whose last stage is done."""
        self._leave(job, State.FINISHED)

    def eta(self, job: Job) -> float:
        """Seconds until `job` is expected to be finished, if others come as they did in the last minute."""
        return self._until_finished(job, self._ahead(job)[1])

    def locate(self, job_id: str) -> Located | None:
        """How far a job is; None when it is over."""
        job = self._jobs.get(job_id)
        if job is None:
            return None
        progress = 1 - job.remaining / max(1, job.spec.evaluations)
        running = job.state is State.RUNNING
        return Located(job_id, running, self._ahead(job)[0], self.eta(job), progress)

    def forecast(self) -> list[tuple[str, float]]:
        """Every job, and the seconds until it is expected to be finished, as in `eta`."""
        return [
            (job.id, self._until_finished(job, ahead + self._of_others(lane, ahead + job.remaining)))
            for lane in self._lanes.values()
            for job, ahead in lane.all_ahead()
        ]

    @property
    def _running_s(self) -> float:
        """Seconds of the step that is on its way, from its begin."""
        return self.times.at(self.in_flight) if self.in_flight else 0.0

    def _too_late(self, job: Job, now: float) -> str | None:
        """Why a deadline is certain to pass, whatever else there is."""
        deadline = job.spec.deadline
        alone = estimates.shortest(job, self.times, self.max_batch_size)
        if deadline is not None and now + alone > deadline:
            # A pause of the machine must not refuse all work for good: certain is what was never quicker.
            alone = estimates.shortest(job, self.times.quickest, self.max_batch_size)
        if deadline is not None and now + alone > deadline:
            return f"The deadline cannot be met: the request takes {alone:.1f} s even when alone."
        return None

    def _not_beside_others(self, job: Job, now: float) -> str | None:
        """Why a deadline cannot be met beside what was accepted."""
        lane = self._lanes.get(job.spec.owner) or Lane(self.policy)
        return self._promises.refusal(job, self._load(now), lambda work: self._of_others(lane, work))

    def _load(self, now: float) -> Load:
        return Load(now + self._running_s, self.times, self.max_batch_size, self._backlog)

    def _look_at_arrivals(self, now: float) -> None:
        """Note how much of the device arriving work takes, from time to time."""
        if self.policy == "remaining" and abs(now - self._slower_at) >= ARRIVALS_S:
            rate = self.max_batch_size / self.times.at(self.max_batch_size)
            self._slower, self._slower_at = self._inflow.slower(rate, self.fifo_interval, now), now

    def _until_finished(self, job: Job, ahead: int) -> float:
        backlog = self._backlog + (0 if job.id in self._jobs else job.remaining)
        work = arrivals.evaluations(ahead, job.remaining, self._slower)
        return self._running_s + estimates.until_finished(job, work, backlog, self.times, self.max_batch_size)

    def _ahead(self, job: Job) -> tuple[int, int]:
        """(jobs, network evaluations) that go before a job; when sharing, all others do."""
        lane = self._lanes.get(job.spec.owner) or Lane(self.policy)
        jobs, work = lane.ahead(job, self._arrivals + 1)
        before = jobs + sum(min(len(other.jobs), jobs) for other in self._others(lane))
        return before, work + self._of_others(lane, work + job.remaining)

    def _of_others(self, lane: Lane, work: int) -> int:
        """Network evaluations that other owners have while one has so many: as many, or all they need."""
        return sum(min(other.backlog, work) for other in self._others(lane))

    def _others(self, lane: Lane) -> list[Lane]:
        return [other for other in self._lanes.values() if other is not lane]

    def _samples(self, lane: Lane) -> Iterator[Sample]:
        """Those of a lane, the next one first, up to a bound: a last odd row is not worth a long walk."""
        bound = 4 * self.max_batch_size
        in_order_of_arrival = self._steps % self.fifo_interval == self.fifo_interval - 1
        for job in islice(lane.by_priority(in_order_of_arrival=in_order_of_arrival), bound):
            yield from self._active[job.id][:bound]

    def _of_promised(self, load: Load) -> Iterator[Sample]:
        """Those of jobs with deadlines, in that order."""
        for job in self._promises.in_order(load):
            yield from self._active[job.id]

    def _in_line(self, samples: Iterator[Sample], choose: Callable[[Sample], bool]) -> None:
        """Offer samples one after the other while there is room."""
        for sample in samples:
            if self._free <= 0:
                break
            choose(sample)

    def _in_turns(self, choose: Callable[[Sample], bool], chosen: Iterable[Sample]) -> None:
        """Offer the samples of all lanes, each time one of the lane with the fewest rows in this step.

        choose: takes a sample, or says that there is no room for it. chosen: those that are in the step.
        """
        waiting = {lane: self._samples(lane) for lane in self._lanes.values()}
        rows = dict.fromkeys(waiting, 0)
        for sample in chosen:
            rows[self._lanes[sample.job.spec.owner]] += sample.evaluations
        while waiting and self._free > 0:
            lane = min(waiting, key=lambda lane: (rows[lane], lane.served))
            for sample in waiting[lane]:
                if choose(sample):
                    rows[lane] += sample.evaluations
                    self._served += 1
                    lane.served = self._served
                    break
            else:
                del waiting[lane]

    def _start(self, job: Job, now: float) -> None:
        if job.state is State.WAITING:
            job.move_to(State.RUNNING)
            job.started = now

    def _begin_stage(self, job: Job) -> None:
        self._active[job.id] = list(job.samples)
        self._unfinished += len(job.samples)

    def _advance(self, sample: Sample) -> None:
        job, evaluations = sample.job, sample.evaluations
        active = self._active[job.id]
        active.remove(sample)
        job.remaining -= evaluations
        self._backlog -= evaluations
        sample.step += 1
        if sample.step < sample.steps:
            active.append(sample)
        else:
            self._unfinished -= 1

    def _leave(self, job: Job, state: State) -> None:
        lane = self._lanes[job.spec.owner]
        lane.exit(job)
        lane.end(job)
        if not lane.jobs:
            del self._lanes[job.spec.owner]
        self._promises.remove(job)
        job.move_to(state)
        self._unfinished -= len(self._active[job.id])
        self._backlog -= job.remaining
        del self._jobs[job.id], self._active[job.id]
