"""One client that asks for all there is, beside one that asks for little, in virtual time.

The greedy one has six requests of 64 images of 50 steps each at any moment: as soon as one is done, it sends
the next. The other sends single images of 20 steps now and then. Both try again when they are told to. It is
the service's own admission and scheduler that decide: with both clients as one, as if there were no shares,
and with each as its own.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import cast

from bench.simulation import Case, job_of
from bench.workload import trace
from service.engine.admission import Slots
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec
from service.engine.scheduler import Policy, Scheduler

SLOTS = 256
GREEDY, MODEST = "greedy", "modest"
GREEDY_AT_ONCE, GREEDY_IMAGES, GREEDY_STEPS = 6, 64, 50
MODEST_STEPS = 20
MODEST_LOAD = 0.1


@dataclass
class Asked:
    """A request, from the first time it is sent. Seconds of the virtual clock."""

    client: str
    images: int
    steps: int
    sent: float
    refusals: int = 0
    admitted: float = 0.0
    ended: float = math.inf


@dataclass
class Contest:
    """Clients, admission and scheduler on one clock. shared: whether each client has its share."""

    case: Case
    shared: bool
    greedy: bool
    slots: Slots = field(default_factory=lambda: Slots(SLOTS, SLOTS))
    requests: list[Asked] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=lambda: {GREEDY: 0, MODEST: 0})
    now: float = 0.0

    def __post_init__(self) -> None:
        times, policy = StepTimes(self.case.curve), cast("Policy", self.case.policy)
        self.times = times
        self.scheduler = Scheduler(self.case.max_batch_size, times, policy, self.case.fifo_interval)
        self._coming: list[tuple[float, int, Asked]] = []
        self._numbers = count()
        self._running: dict[str, Asked] = {}

    def run(self) -> list[Asked]:
        """Until the modest client has had all of its requests, or twice their time is over. Returns them."""
        rate = MODEST_LOAD * self.case.capacity * 50 / MODEST_STEPS  # that trace is of 50 steps each
        for each in trace("uniform", rate, self.case.arrivals, self.case.seed):
            self._send(Asked(MODEST, 1, MODEST_STEPS, each.created), each.created)
        modest = [asked for _, _, asked in self._coming]
        for _ in range(GREEDY_AT_ONCE if self.greedy else 0):
            self._send(Asked(GREEDY, GREEDY_IMAGES, GREEDY_STEPS, 0.0), 0.0)
        end, open_ = 2 * modest[-1].sent, len(modest)
        while self.now < end and open_ > 0:
            while self._coming and self._coming[0][0] <= self.now:
                self._ask(heapq.heappop(self._coming)[2])
            batch = self.scheduler.schedule(self.now)
            if not batch.samples:
                self.now = self._coming[0][0]
                continue
            self.now += self.times.at(batch.size)
            for sample in batch.samples:
                self.rows[self._running[sample.job.id].client] += 1
            for job in self.scheduler.commit(batch.samples):
                if self.scheduler.stage_done(job):
                    self.scheduler.finish(job)
                    open_ -= self._running[job.id].client == MODEST
                    self._end(job.id)
        return modest

    def _send(self, asked: Asked, when: float) -> None:
        heapq.heappush(self._coming, (when, next(self._numbers), asked))

    def _ask(self, asked: Asked) -> None:
        owner = asked.client if self.shared else ""
        refusal = self.slots.refusal(owner, asked.images, self.now)
        if refusal is not None:
            for job_id, seconds in self.scheduler.forecast():
                self.slots.expect(job_id, self.now + seconds)
            refusal = self.slots.refusal(owner, asked.images, self.now)
        if refusal is not None:
            asked.refusals += 1
            self._send(asked, self.now + min(120, math.ceil(refusal.retry_after_s)))
            return
        spec = self._spec(asked, owner)
        self.scheduler.add(spec, self.now)
        due = dict(self.scheduler.forecast())[spec.id]
        self.slots.take(spec.id, owner, asked.images, self.now + due)
        self._running[spec.id] = asked
        asked.admitted = self.now

    def _spec(self, asked: Asked, owner: str) -> JobSpec:
        return replace(job_of(str(next(self._numbers)), self.now, asked.steps, asked.images), owner=owner)

    def _end(self, job_id: str) -> None:
        asked = self._running.pop(job_id)
        self.slots.give_back(job_id)
        asked.ended = self.now
        if asked.client == GREEDY:
            self._send(Asked(GREEDY, GREEDY_IMAGES, GREEDY_STEPS, self.now), self.now)


def contests(case: Case) -> Iterator[tuple[str, Contest, list[Asked]]]:
    """(what it is, the contest, the modest client's requests): alone, beside the other, with shares."""
    for name, shared, greedy in (
        ("alone", True, False),
        ("beside the greedy one, without shares", False, True),
        ("beside the greedy one, with shares", True, True),
    ):
        contest = Contest(case, shared, greedy)
        yield name, contest, contest.run()
