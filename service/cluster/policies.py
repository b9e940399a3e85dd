"""Which replica gets a request, and how many replicas there should be. Pure.

**Routing.** A short request overtakes long ones inside a replica, and a step with free rows takes one more
nearly for nothing. So what a new request waits for is less the work that remains on a replica than how many
others share its steps: one chain of 1000 steps is much work, and hardly in the way. `by_requests` ranks by
requests in progress, and by remaining work among equals; `by_work` by the work. docs/scale.md compares them.

`choose` looks at two replicas drawn at random and not at all of them. What a router knows is seconds old, and
it does not hear of what others send: if each looked at all, all would send everything to one replica until
the next report (Mitzenmacher 2000, "How useful is old information?"). With two choices a replica is drawn for
2/n of the requests at most, and most of the gain of looking at all is there (Mitzenmacher 2001, "The power of
two choices in randomized load balancing").

**Scaling.** `desired_replicas` shares out the seconds of work. In simulation it is no better than sharing out
requests with the same delays, and costs more devices: one chain of 1000 steps is much work, which a second
replica cannot take over (docs/scale.md). What counts are the delays, which are options of Ray Serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil, inf
from random import Random

TOLERANCE = 0.1
"""Share of the replicas by which their number may be off before it is changed."""


@dataclass(slots=True)
class ReplicaLoad:
    """What is known of a replica.

    evaluations: network evaluations that remain for all its requests. rows_per_s: what it does of them in a
    second when its steps are full. ongoing: requests. slots_free: images that it can still take.
    """

    replica_id: str
    evaluations: float
    rows_per_s: float
    ongoing: int
    slots_free: int

    @property
    def seconds(self) -> float:
        """Seconds of work that remain; infinite where it does none."""
        return self.evaluations / self.rows_per_s if self.rows_per_s > 0 else inf


def by_requests(load: ReplicaLoad) -> tuple[bool, float, float]:
    """A free slot first, then the fewest requests, then the least work."""
    return load.slots_free <= 0, load.ongoing, load.seconds


def by_work(load: ReplicaLoad) -> tuple[bool, float, float]:
    """A free slot first, then the least work, then the fewest requests."""
    return load.slots_free <= 0, load.seconds, load.ongoing


def choose(
    loads: Sequence[ReplicaLoad],
    random: Random,
    among: int = 2,
    key: Callable[[ReplicaLoad], tuple[bool, float, float]] = by_requests,
) -> list[str]:
    """Ids of `among` replicas drawn at random, the best first; of all where there are no more.

    Equals stay in the order in which they were drawn, so that idle replicas are used alike. Looks at no
    others; where none of them takes the request, call it again. Raises ValueError unless among ≥ 1.
    """
    if among < 1:
        raise ValueError("among must be at least 1")
    drawn = [loads[place] for place in random.sample(range(len(loads)), min(among, len(loads)))]
    return [load.replica_id for load in sorted(drawn, key=key)]


def ranked(session: str, names: Sequence[str]) -> list[str]:
    """Ids of replicas as a session ranks them: the first one that takes the request has its jobs.

    By a hash of both names (rendezvous hashing, Thaler & Ravishankar 1998), so that of all sessions only
    those move whose replica goes, or that rank a new one first.
    """
    return sorted(names, key=lambda name: blake2b(f"{session}\n{name}".encode(), digest_size=8).digest())


def desired_replicas(
    loads: Sequence[ReplicaLoad], target_s: float, current: int, lower: int, upper: int
) -> int:
    """How many replicas would have `target_s` seconds of work each, between `lower` and `upper`.

    loads: of the replicas that run. current: those that run or start; their number stays while it is within
    TOLERANCE of what is wanted. The answer follows from the work alone and not from `current`, so replicas
    that are still starting are not ordered a second time. Raises ValueError for a target or bounds that
    make no sense.
    """
    if target_s <= 0 or not 0 <= lower <= upper:
        raise ValueError("target_s must be positive, and lower no more than upper")
    rates = [load.rows_per_s for load in loads if load.rows_per_s > 0]
    if not rates:  # nothing is known: of a fleet that is starting, or has lost all its replicas
        return min(max(current, lower), upper)
    seconds = sum(load.evaluations for load in loads) * len(rates) / sum(rates)
    wanted = seconds / target_s
    if abs(wanted - current) > TOLERANCE * current:
        current = ceil(wanted)
    return min(max(current, lower), upper)
