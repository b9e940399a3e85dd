"""How many rows a network call has at most: fewer once one has run out of memory, more where that pays. Pure.

The limit with which an engine starts is what was found then, on a machine that may have been busy, and memory
that another program held may be free later. So a wider limit is tried again and again, while there is more
work than fits into a step. Every try that fails doubles the time to the next one.
"""

from __future__ import annotations

from collections import deque
from statistics import median

PATIENCE, LONGEST_PATIENCE = 100, 12_800
"""Full steps before a wider limit is tried: at first, and after many tries that failed."""
STEPS = 16
"""By how many steps two limits are compared."""
GAIN = 1.05
"""By how much more rows per second a limit wider than the one at the start has to bring."""


class BatchLimit:
    """rows: the limit now. It began as that, and is never more than `widest`."""

    def __init__(self, rows: int, widest: int) -> None:
        self.rows = self.initial = rows
        self.widest = max(rows, widest)
        self._patience, self._full = PATIENCE, 0
        self._before: int | None = None  # the limit before the one that is being tried
        self._rates: deque[float] = deque(maxlen=STEPS)  # rows per second of full steps
        self._tried: list[float] = []  # of those that the limit before would not have allowed

    def ran_out(self, fits: int) -> None:
        """A step has run out of memory, and not for a single sample of it. fits: how many rows are safe."""
        if self._before is not None:
            self._settle(self._before, worked=False)
        self._settle(min(self.rows, fits))

    def made(self, size: int, seconds: float, *, more: bool) -> None:
        """A step of so many rows has taken so long. more: whether there was work beyond it."""
        if self._before is not None:
            if size > self._before:
                self._tried.append(size / seconds)
            if len(self._tried) == STEPS:
                gain = median(self._tried) > GAIN * median(self._rates)
                worked = gain or self.rows <= self.initial
                self._settle(self.rows if worked else self._before, worked=worked)
        elif more and self.rows - 1 <= size <= self.rows:  # a guided image may leave one row empty
            self._rates.append(size / seconds)
            self._full += 1
            if self._full >= self._patience and self.rows < self.widest:
                self._before, self.rows = self.rows, min(2 * self.rows, self.widest)

    def _settle(self, rows: int, *, worked: bool = True) -> None:
        """Stay with a limit for a while."""
        if not worked:
            self._patience = min(LONGEST_PATIENCE, 2 * self._patience)
        self.rows, self._before, self._full = rows, None, 0
        self._rates.clear()
        self._tried.clear()
