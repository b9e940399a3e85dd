"""Who gets a request. A router sees only what it has sent itself, and what replicas have reported.

random       any replica, as a balancer of connections does it
ray          Ray Serve's default, PowerOfTwoChoicesRequestRouter: of two replicas drawn at random, the one
             with fewer ongoing requests. Each router has a cache of their numbers, whose entries count for
             ten seconds: it adds what it sends, subtracts what ends, and takes the replica's number from its
             acceptance. What it does not know or takes for full it asks for; where the other one will do,
             only for the next time.
requests     `service.cluster.policies.choose`: the same numbers, and among equals the least remaining work
work         of two, the one with the least remaining work, from the last report, less what it has done since
             and with what this router has sent since
work of all  the same without the draw: the least of all replicas
known work   the least of all with everything known at every moment: what no real router can do
known rows   likewise by rows that would like to be in the next step, and only then by remaining work
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import overload

from bench.fleet.replica import Replica
from service.cluster.policies import ReplicaLoad, by_requests, by_work, choose

CACHE_S = 10.0
"""RAY_SERVE_QUEUE_LENGTH_CACHE_TIMEOUT_S."""


class AnyReplica:
    """Chooses without a look at them."""

    def __init__(self, replicas: list[Replica], random: Random) -> None:
        self.replicas, self.random = replicas, random

    def choose(self, router: int, now: float, max_ongoing: int) -> Replica | None:  # noqa: ARG002
        """A replica for a request that has come to a router, by number; None: try again later."""
        return self.random.choice(self.replicas)

    def sent(self, router: int, replica: Replica, now: float, evaluations: float) -> None:
        """A replica has accepted a request of so many evaluations; it is counted already."""

    def done(self, router: int, replica: Replica, now: float) -> None:
        """A request has ended that came through this router."""


class RayDefault(AnyReplica):
    """By ongoing requests, as this router knows them."""

    def __init__(self, replicas: list[Replica], random: Random) -> None:
        super().__init__(replicas, random)
        self._cache: dict[tuple[int, int], tuple[int, float]] = {}

    def _known(self, router: int, replica: Replica, now: float) -> int | None:
        length, at = self._cache.get((router, replica.name), (0, -CACHE_S))
        return length if now - at < CACHE_S else None

    def choose(self, router: int, now: float, max_ongoing: int) -> Replica | None:
        """One of two by the cache; by asking where the cache has nothing to go by."""
        drawn = self.random.sample(self.replicas, min(2, len(self.replicas)))
        lengths = [self._known(router, each, now) for each in drawn]
        cached = [
            (length, each)
            for length, each in zip(lengths, drawn, strict=True)
            if length is not None and length < max_ongoing
        ]
        for length, each in zip(lengths, drawn, strict=True):
            if length is None or length >= max_ongoing:  # asked, if only for the next time
                self._cache[router, each.name] = each.ongoing, now
        usable = cached or [(each.ongoing, each) for each in drawn if each.ongoing < max_ongoing]
        return min(usable, key=lambda pair: pair[0])[1] if usable else None

    def sent(self, router: int, replica: Replica, now: float, evaluations: float) -> None:  # noqa: ARG002
        """Its acceptance carries the number of its requests."""
        self._cache[router, replica.name] = replica.ongoing, now

    def done(self, router: int, replica: Replica, now: float) -> None:
        """One fewer."""
        length = self._known(router, replica, now)
        if length is not None:
            self._cache[router, replica.name] = max(0, length - 1), now


class _Loads(Sequence[ReplicaLoad]):
    """What a router knows of each replica, made when it is looked at: there may be 10,000 of them."""

    def __init__(self, of: Policy, router: int, now: float, max_ongoing: int) -> None:
        self._of, self._router, self._now, self._most = of, router, now, max_ongoing

    def __len__(self) -> int:
        return len(self._of.replicas)

    @overload
    def __getitem__(self, place: int) -> ReplicaLoad: ...
    @overload
    def __getitem__(self, place: slice) -> list[ReplicaLoad]: ...
    def __getitem__(self, place: int | slice) -> ReplicaLoad | list[ReplicaLoad]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        work, ongoing = self._of.load(self._router, self._of.replicas[place], self._now)
        return ReplicaLoad(str(place), work, self._of.rows_per_s, ongoing, self._most - ongoing)


class Policy(RayDefault):
    """The service's policy over what a router knows.

    rows_per_s: of a replica. among: how many are looked at, 0 for all. expected: network evaluations of a
    request that has not been reported: a router does not read bodies. work: rank by work alone.
    """

    def __init__(
        self,
        replicas: list[Replica],
        random: Random,
        rows_per_s: float,
        expected: float,
        *,
        among: int = 2,
        work: bool = False,
    ) -> None:
        super().__init__(replicas, random)
        self.rows_per_s, self._among, self._expected, self._work = rows_per_s, among, expected, work
        self._sent: dict[tuple[int, int], tuple[float, float, int]] = {}  # report's time, work, requests

    def load(self, router: int, replica: Replica, now: float) -> tuple[float, int]:
        """(network evaluations, requests) of a replica, as far as this router can know."""
        work, reported, at = replica.report
        more, requests = self._since(router, replica)
        if not self._work:
            known = self._known(router, replica, now)
            if known is None:
                known = replica.ongoing  # asked
                self._cache[router, replica.name] = known, now
            reported, requests = known, 0
        return max(0.0, work + more - self.rows_per_s * (now - at)), reported + requests

    def choose(self, router: int, now: float, max_ongoing: int) -> Replica | None:
        """The first that accepts of those that the policy ranks."""
        loads, key = _Loads(self, router, now, max_ongoing), by_work if self._work else by_requests
        for place in choose(loads, self.random, self._among or len(loads), key):
            if self.replicas[int(place)].ongoing < max_ongoing:
                return self.replicas[int(place)]
        return None

    def sent(self, router: int, replica: Replica, now: float, evaluations: float) -> None:
        """Add what is expected of a request."""
        super().sent(router, replica, now, evaluations)
        more, requests = self._since(router, replica)
        self._sent[router, replica.name] = replica.report[2], more + self._expected, requests + 1

    def _since(self, router: int, replica: Replica) -> tuple[float, int]:
        """(network evaluations, requests) that this router has sent to a replica since its report."""
        at, more, requests = self._sent.get((router, replica.name), (-1.0, 0.0, 0))
        return (more, requests) if at == replica.report[2] else (0.0, 0)


class Known(AnyReplica):
    """The best of all at this moment. by_rows: by what wants to run in the next step, before the work."""

    def __init__(self, replicas: list[Replica], random: Random, *, by_rows: bool) -> None:
        super().__init__(replicas, random)
        self._by_rows = by_rows

    def choose(self, router: int, now: float, max_ongoing: int) -> Replica | None:  # noqa: ARG002
        """The first of the least loaded ones."""
        if self._by_rows:
            best = min(self.replicas, key=lambda each: (each.rows, each.evaluations))
        else:
            best = min(self.replicas, key=lambda each: each.evaluations)
        return best if best.ongoing < max_ongoing else None
