"""How much work arrives that goes before a job, from what has arrived of late. Pure.

Under `remaining` a job waits for all that has less to do than it has left, also for what is yet to come. If
such work arrives at a rate that keeps a share ρ of the device busy, everything takes 1/(1 − ρ) times as long
(Schrage & Miller 1966, shortest remaining time first: waiting and residence have that factor, the latter with
a ρ that falls as the job gets on).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WINDOW_S = 60.0
"""Arrivals count less by e for each such time that has passed."""
FIRST_S = 20.0
"""Arrivals of less time than this are taken to be those of so long."""
FEW = 2
"""Of so many arrivals only half is believed: a few jobs are no rate."""
SIZES = 48


@dataclass
class Arrivals:
    """Jobs that have arrived and their network evaluations, by size: up to 1, 3, 7, 15 … evaluations."""

    _work: list[float] = field(default_factory=lambda: [0.0] * SIZES)
    _jobs: list[float] = field(default_factory=lambda: [0.0] * SIZES)
    _since: float | None = None
    _now: float = 0.0

    def add(self, work: int, now: float) -> None:
        """Count a job of so many evaluations. A clock that goes back stands still."""
        self._age(now)
        self._work[_size(work)] += work
        self._jobs[_size(work)] += 1

    def slower(self, rate: float, most: float, now: float) -> list[float]:
        """How many times as long a job takes with so much left, for each size.

        rate: evaluations per second that the device does. most: what is never exceeded. Of jobs of about its
        own size, without itself, half have less left.
        """
        if self._since is None:
            return [1.0] * SIZES
        self._age(now)
        seen = WINDOW_S * (1 - math.exp(-max(FIRST_S, self._now - self._since) / WINDOW_S))
        slower, work, jobs = [], 0.0, 0.0
        for its_work, its_jobs in zip(self._work, self._jobs, strict=True):
            others = max(0.0, its_jobs - 1) / 2
            smaller = work + (its_work / its_jobs * others if its_jobs else 0.0)
            count = jobs + others
            share = smaller / seen / rate * count / (count + FEW)
            slower.append(1 / max(1 - share, 1 / most))
            work, jobs = work + its_work, jobs + its_jobs
        return slower

    def _age(self, now: float) -> None:
        if self._since is None:
            self._since = self._now = now
        faded = math.exp(-max(0.0, now - self._now) / WINDOW_S)
        self._work = [work * faded for work in self._work]
        self._jobs = [jobs * faded for jobs in self._jobs]
        self._now = max(self._now, now)


def _size(work: int) -> int:
    return min(SIZES - 1, work.bit_length())


def evaluations(ahead: int, remaining: int, slower: list[float]) -> float:
    """Network evaluations that are done before a job is finished, with those that will overtake it.

    ahead: that go before it now. remaining: its own.
    """
    total, below = ahead * slower[_size(remaining)], 0
    for size, factor in enumerate(slower[: _size(remaining) + 1]):
        upto = min(remaining, (1 << size) - 1)
        total += (upto - below) * factor
        below = upto
    return total
