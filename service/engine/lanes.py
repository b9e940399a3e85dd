"""The jobs of each owner in their order, and the owners by turns. Pure, and part of the scheduler.

A lane is the queue of one owner. In every step the lanes share the rows max-min: the next row goes to the
lane that has the fewest so far, among equals to the one that has been without for longest, and what a lane
cannot use is left to the others. So with n lanes each gets at least ⌊R/n⌋ of R rows (one fewer where samples
take two), or all that it has samples for, whatever is in the other lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, takewhile

from service.engine.jobs import Job
from service.engine.order import Order, PrefixSums


@dataclass(eq=False)
class Lane:
    """The jobs of one owner, in the order of a policy.

    jobs: by id, in order of arrival. order: by key, smallest first; new: those without a committed step.
    first_work: evaluations of the first steps of those, under their remaining work. backlog: network
    evaluations of all of them. served: when it last had a row, in rows of all lanes.
    """

    policy: str
    jobs: dict[str, Job] = field(default_factory=dict)
    order: Order[Job] = field(default_factory=Order)
    new: Order[Job] = field(default_factory=Order)
    first_work: PrefixSums = field(default_factory=PrefixSums)
    backlog: int = 0
    served: int = 0

    def ahead(self, job: Job, next_arrival: int) -> tuple[int, int]:
        """(jobs, network evaluations) of this lane that go before one of its own; if shared, all others do.

        Does not look at every job. next_arrival: what the job would have, were it to come now.
        """
        here = job.id in self.jobs
        if self.policy == "sharing":
            return len(self.jobs) - here, self.backlog - (job.remaining if here else 0)
        if self.policy == "fifo":
            earlier = takewhile(lambda other: other is not job, self.jobs.values())
            return (
                self.order.before(job.key, job.arrival) if here else len(self.jobs),
                sum(other.remaining for other in earlier) if here else self.backlog,
            )
        key, arrival = (job.key, job.arrival) if here else (job.remaining, next_arrival)
        work = self.order.sum_below(key) + self.order.before_within(key, arrival) * key
        # Those behind it have their first step before its last.
        behind = self.first_work.total - self.first_work.below(key)
        equal_new = self.new.count(key)
        if equal_new:  # of those with as much to do, the part that did not come before it
            not_behind = self.new.before_within(key, arrival + 1)
            behind -= self.first_work.at(key) * not_behind // equal_new
        return self.order.before(key, arrival), work + behind

    def by_priority(self, *, in_order_of_arrival: bool) -> Iterator[Job]:
        """Its jobs, the next one first."""
        if self.policy == "fifo" or (self.policy == "remaining" and in_order_of_arrival):
            return iter(self.jobs.values())
        ordered = iter(self.order)
        if self.policy == "remaining" and self.new:
            return chain(self.new, (job for job in self.order if not job.first_step))
        return ordered

    def all_ahead(self) -> Iterator[tuple[Job, int]]:
        """Every job, and the network evaluations of this lane that go before it. The first to end first."""
        if self.policy == "sharing":
            for job in self.jobs.values():
                yield job, self.backlog - job.remaining
            return
        if self.policy == "fifo":
            work = 0
            for job in self.jobs.values():
                yield job, work
                work += job.remaining
            return
        work = self.first_work.total  # those behind have their first step before its last
        for job in self.order:
            work -= job.first_step
            yield job, work
            work += job.remaining

    def enter(self, job: Job, steps: int) -> None:
        """Put a job in its place, after so many steps of all lanes."""
        job.key = job.remaining if self.policy == "remaining" else steps if self.policy == "sharing" else 0
        self.order.add(job.key, job.arrival, job)

    def begin(self, job: Job, first_step: int) -> None:
        """Note that a job has entered, and what its first step takes."""
        self.jobs[job.id] = job
        self.backlog += job.remaining
        self.new.add(job.key, job.arrival, job)
        job.first_step = first_step
        self.first_work.add(job.remaining, first_step)

    def exit(self, job: Job) -> None:
        """Take a job out of its places, before it changes."""
        self.order.remove(job.key, job.arrival)
        if job.first_step:
            self.new.remove(job.key, job.arrival)
            self.first_work.add(job.remaining, -job.first_step)
            job.first_step = 0

    def end(self, job: Job) -> None:
        """Forget a job that has been taken out."""
        self.backlog -= job.remaining
        del self.jobs[job.id]
