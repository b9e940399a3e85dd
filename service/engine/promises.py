"""Deadlines that were accepted, all together: whether one more can be met, and when they go first. Pure.

A job with a deadline is accepted only if it can be met beside those accepted before it, and without making
one of them late. What shows that is a bound for serving them in the order of their deadlines (earliest
deadline first): let W be the network evaluations that are left of a job and of those due before it, L the
steps that are left of its own, m the rows of such a step at least, R the rows of any step, and R′ = R, or
R − 1 where samples take two rows and R > 1. In every step either the job advances by a step of all its
images, or at least R′ rows are of work due no later. So it is finished within W/R′ + L·(1 − m/R′) + 1 steps,
and within L if it comes first and fits into a step (docs/scheduling.md has the proof).

That order is kept to only when it has to be: while every deadline would still be met if it were kept to from
the next step on, the policy decides. From then on jobs go in the order of their deadlines and others fill the
step; and where only steps without others, which are quicker, are in time, nothing else goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from sortedcontainers import SortedList

from service.engine.estimates import StepTimes, steps_left
from service.engine.jobs import Job

MARGIN = 1.1
"""Steps are taken to be so much longer than estimated: an estimate is a mean."""
RECKONED_STEPS = 16
"""Steps after which it is reckoned again whether deadlines have to go first: step times change."""


class Urgency(Enum):
    """What the next step is made of."""

    NONE = "the policy decides"
    FIRST = "jobs in the order of their deadlines, then others"
    ONLY = "jobs in the order of their deadlines, and no others"


@dataclass(frozen=True, order=True)
class _Promise:
    """A job and its deadline.

    per_sample, rows: the most rows of a step of one sample, and of all of them. least: the fewest of all of
    them. Samples of a stage differ by one step at most, if they have as many.
    """

    deadline: float
    id: str
    job: Job = field(compare=False)
    per_sample: int = field(compare=False)
    rows: int = field(compare=False)
    least: int = field(compare=False)


def _promise(job: Job, deadline: float) -> _Promise:
    most, least = [], []
    of_plan: dict[int, tuple[int, int]] = {}  # images of a request share one
    for stage in job.spec.stages:
        for plan in (chain.plan for chain in stage.chains):
            if id(plan) not in of_plan:
                of_plan[id(plan)] = max(plan.evaluations), min(plan.evaluations)
        rows = [of_plan[id(chain.plan)] for chain in stage.chains]
        most.append([high for high, _ in rows])
        even = len({len(chain.plan) for chain in stage.chains}) == 1
        least.append(sum(low for _, low in rows) if even else 1)
    return _Promise(deadline, job.id, job, max(map(max, most)), max(map(sum, most)), min(least))


@dataclass(frozen=True)
class Load:
    """What a deadline is held against.

    start: when the next step can begin, in seconds on the scheduler's clock. rows: of a step at most.
    backlog: network evaluations that are left of everything in flight.
    """

    start: float
    times: StepTimes
    rows: int
    backlog: int

    @property
    def full(self) -> float:
        """Seconds of a full step, with the margin."""
        return MARGIN * _longest(self.times, self.rows)


@dataclass
class Promises:
    """The jobs with deadlines, the earliest first."""

    _order: SortedList[_Promise] = field(default_factory=SortedList)
    _by_job: dict[Job, _Promise] = field(default_factory=dict)
    _chain: int = 0  # no job has had more steps to do, since there was none with a deadline
    _calm_until: float = inf
    _steps: int = 0

    def add(self, job: Job) -> None:
        """Note a job's deadline; nothing for a job without one."""
        if job.spec.deadline is not None:
            promise = self._by_job[job] = _promise(job, job.spec.deadline)
            self._order.add(promise)
            self._chain = max(self._chain, _most_steps(job))
            self._calm_until = -inf

    def remove(self, job: Job) -> None:
        """Forget a job that has ended."""
        promise = self._by_job.pop(job, None)
        if promise is not None:
            self._order.remove(promise)
            self._chain *= bool(self._order)

    def expired(self, now: float) -> Job | None:
        """A job whose deadline has passed."""
        return self._order[0].job if self._order and self._order[0].deadline < now else None

    def in_order(self, load: Load) -> list[Job]:
        """The jobs in the order of their deadlines, without those that will be late whatever goes first."""
        return [promise.job for promise in self._hopeful(load)]

    def refusal(self, job: Job, load: Load, of_others: Callable[[int], int]) -> str | None:
        """Why a deadline cannot be promised; None where it can, or where there is none.

        of_others: evaluations of other owners that are done while one has so many done.
        """
        if job.spec.deadline is None:
            return None
        new = _promise(job, job.spec.deadline)
        if self._spare(load, new) >= load.start:
            return None  # everything would be done before any of the deadlines
        own = sum(each.job.remaining for each in self._order if each.job.spec.owner == job.spec.owner)
        own += job.remaining
        between = of_others(own)
        seconds = load.full * ((own + between) / max(1, load.rows - new.per_sample + 1) + _most_steps(job))
        if between and load.start + seconds > new.deadline:
            return f"The deadline cannot be met in this client's share: it takes up to {seconds:.1f} s."
        others = self._hopeful(load)
        # A pause of the machine must not refuse all work for good.
        times = load.times if others else load.times.quickest
        before = _seconds(others, times, load.rows)
        for promise, seconds in _seconds(sorted([*others, new]), times, load.rows).items():
            left = promise.deadline - load.start
            if promise is new:
                if (MARGIN if others else 1.0) * seconds > left:
                    return f"The deadline cannot be met: beside earlier ones it takes up to {seconds:.1f} s."
            elif any(margin * before[promise] <= left < margin * seconds for margin in (1.0, MARGIN)):
                return "The deadline cannot be met without making another request late."
        return None

    def urgency(self, load: Load) -> Urgency:
        """Whether deadlines have to go first in the next step."""
        self._steps += 1
        if not self._order or (load.start < self._calm_until and self._steps % RECKONED_STEPS):
            return Urgency.NONE
        # A step that the policy decides takes its time, and may leave a job's images unequally far.
        full = load.full
        self._calm_until = self._spare(load) - 2 * full
        if load.start < self._calm_until:
            return Urgency.NONE
        steps = _steps(self._hopeful(load), load.rows)
        spare = min((promise.deadline - most * full for promise, most in steps.items()), default=inf)
        self._calm_until = spare - 2 * full
        if load.start > spare:
            return Urgency.ONLY
        return Urgency.FIRST if load.start >= self._calm_until else Urgency.NONE

    def _spare(self, load: Load, new: _Promise | None = None) -> float:
        """Until when everything could wait, and be done before the first deadline. Looks at two jobs."""
        promises = [*self._order[:1], *([new] if new else [])]
        backlog = load.backlog + (new.job.remaining if new else 0)
        chain = max(self._chain, _most_steps(new.job) if new else 0)
        steps = backlog / max(1, load.rows - 1) + chain
        return min(promise.deadline for promise in promises) - load.full * steps

    def _hopeful(self, load: Load) -> list[_Promise]:
        alone = {rows: load.times.at(rows) for rows in {promise.per_sample for promise in self._order}}
        return [
            promise
            for promise in self._order
            if load.start + steps_left(promise.job) * alone[promise.per_sample] <= promise.deadline
        ]


def _most_steps(job: Job) -> int:
    """Steps of a job at most, with those that pass between and after its stages."""
    return sum(stage.steps + 2 for stage in job.spec.stages)


def _steps(promises: Sequence[_Promise], rows: int) -> dict[_Promise, float]:
    """Within how many steps of at most `rows` each is finished, in the order of their deadlines.

    Between stages passes one in which results are read, unless a job is alone, as the first is taken to be.
    """
    steps: dict[_Promise, float] = {}
    work, per_sample = 0, 1
    for promise in promises:
        job = promise.job
        work += job.remaining
        per_sample = max(per_sample, promise.per_sample)
        full = max(1, rows - per_sample + 1)
        steps[promise] = work / full + steps_left(job) * max(0.0, 1 - promise.least / full)
        even = len({sample.step for sample in job.samples}) == 1
        if promise is promises[0] and even and promise.rows <= rows:
            steps[promise] = steps_left(job)
        else:
            steps[promise] += 2 * (len(job.spec.stages) - job.place) - 1
    return steps


def _seconds(promises: Sequence[_Promise], times: StepTimes, rows: int) -> dict[_Promise, float]:
    """Within how many seconds, if nothing else goes: a step is as wide as these are together."""
    step_s = _longest(times, min(rows, sum(promise.rows for promise in promises)))
    return {promise: steps * step_s for promise, steps in _steps(promises, rows).items()}


def _longest(times: StepTimes, rows: int) -> float:
    """Seconds of a step of at most so many rows. One row may take longer than two."""
    return max(times.at(1), times.at(rows))
