"""Who may have how many of the slots, and when there will be some. Pure: no clock of its own.

An owner is a client, as far as it can be told: an API key, or an address where there are no keys. While only
one of them asks, it may have every slot, up to `most`. While k of them have slots or have been refused a
moment ago, no request may take one of them beyond a k-th of all, so what it had more of goes to the others as
its jobs end. An owner without slots may always have one request that fits into what is free, however large.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from service.errors import ClientLimitError, QueueFullError, RefusedError

COMES_BACK_S = 5.0
"""An owner that was refused counts as asking for so long after the time that it was told to come back."""
REMEMBERED = 1024
"""Owners that were refused, at most: addresses are an open set."""


@dataclass
class _Held:
    owner: str
    slots: int
    due: float


@dataclass
class Slots:
    """Slots, and which job has them. most: those that one owner may have, at least 1."""

    capacity: int
    most: int
    taken: int = 0
    _jobs: dict[str, _Held] = field(default_factory=dict)
    _by_owner: Counter[str] = field(default_factory=Counter)
    _asking: dict[str, float] = field(default_factory=dict)  # owners that were refused, until when they count

    def of(self, owner: str) -> int:
        """Slots that an owner has."""
        return self._by_owner[owner]

    def share(self, owner: str, now: float) -> int:
        """Slots that an owner may have at this moment."""
        for other in [other for other, until in self._asking.items() if until <= now]:
            del self._asking[other]
        owners = len({owner, *self._by_owner, *self._asking})
        return min(self.most, max(1, self.capacity // owners))

    def refusal(self, owner: str, slots: int, now: float) -> RefusedError | None:
        """Why a request for so many slots is not accepted, and when it would be; None where it is.

        An owner that is refused is one of those that ask, until it should have come back.
        """
        own, share = self.of(owner), self.share(owner, now)
        lacking = self.taken + slots - self.capacity
        beyond = own + slots - share if own and share < self.capacity else 0
        if lacking <= 0 and beyond <= 0:
            return None
        wait = max(self._free_in(lacking, now), self._free_in(beyond, now, owner), 1.0)
        error: RefusedError
        if beyond > 0:
            reason = f"This client has {own} images in flight, and may have {share}; {slots} more do not fit."
            error = ClientLimitError(reason, wait)
        else:
            reason = f"{self.taken} of {self.capacity} images are in flight; {slots} more do not fit."
            error = QueueFullError(reason, wait)
        if owner in self._asking or len(self._asking) < REMEMBERED:
            self._asking[owner] = now + wait + COMES_BACK_S
        return error

    def pressed(self, now: float) -> bool:
        """Whether anybody has been refused who may still come back."""
        return any(until > now for until in self._asking.values())

    def take(self, job_id: str, owner: str, slots: int, due: float) -> None:
        """Give a job slots, until it ends at about `due`. Its owner has got what it asked for."""
        self._asking.pop(owner, None)
        self._jobs[job_id] = _Held(owner, slots, due)
        self.taken += slots
        self._by_owner[owner] += slots

    def expect(self, job_id: str, due: float) -> None:
        """Note when a job is now expected to end, if it has not ended."""
        held = self._jobs.get(job_id)
        if held is not None:
            held.due = due

    def give_back(self, job_id: str) -> None:
        """Free the slots of a job."""
        held = self._jobs.pop(job_id)
        self.taken -= held.slots
        self._by_owner[held.owner] -= held.slots
        if not self._by_owner[held.owner]:
            del self._by_owner[held.owner]

    def _free_in(self, slots: int, now: float, owner: str | None = None) -> float:
        """Seconds until so many slots will have been freed; by one owner's jobs, if it is given.

        All of them where there are not so many. Jobs free their slots in the order in which they are due.
        """
        jobs = (held for held in self._jobs.values() if owner in (None, held.owner))
        wait = 0.0
        for held in sorted(jobs, key=lambda held: held.due):
            if slots <= 0:
                break
            wait, slots = held.due - now, slots - held.slots
        return wait
