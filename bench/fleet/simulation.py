"""A fleet under one virtual clock: requests come to routers, routers choose replicas, replicas run steps.

A step takes what the curve says; nothing else takes time but what is said here: a replica's start, a retry
after all drawn replicas were full (Ray's back-off), reports that are old. A request that was on a
replica which is lost begins again on another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.fleet.arrivals import MEAN_EVALUATIONS
from bench.fleet.replica import Batching, Replica, engine_of
from bench.fleet.routers import AnyReplica, Known, Policy, RayDefault
from bench.fleet.scaling import Scaler, Scaling
from bench.simulation import Curve, job_of
from bench.workload import Request
from service.engine.estimates import StepTimes

Routing = Literal["random", "ray", "requests", "work", "work of all", "known work", "known rows"]
REPLICAS_PER_ROUTER = 8
"""A node of eight devices has a proxy, which routes."""
BACKOFF_S = (0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.5)
"""Ray's, before the first and every later attempt; the last one stays."""
TICK_S = 1.0
"""Of the autoscaling loop: Ray's is 0.1 s, under numbers that change every 10."""


@dataclass(frozen=True)
class Fleet:
    """What is simulated. max_ongoing: requests on a replica; more are rejected there.

    report_s: between two reports of a replica (request_routing_stats_period_s); Ray varies it by a tenth.
    losses: when a replica is lost, drawn at random; it is replaced at once, which takes startup_s.
    """

    curve: Curve
    replicas: int = 1
    routing: Routing = "work"
    batching: Batching = "steps"
    max_batch_size: int = 0
    max_ongoing: int = 256
    report_s: float = 10.0
    startup_s: float = 30.0
    losses: tuple[float, ...] = ()
    scaling: Scaling | None = None
    seed: int = 0

    @property
    def capacity(self) -> float:
        """Rows per second of a replica, at most."""
        return max(size / seconds for size, seconds in self.curve)


@dataclass
class Result:
    """What became of every request, and what it took.

    created, ended: [N] seconds. attempts: [N] replicas that began it. computed, lost: network evaluations
    in all, and those of replicas that were lost. in_system: requests in flight, integrated over time.
    mean_work: network evaluations that remained, where there is autoscaling. device_s: that devices were
    held. replicas: (time, those that serve), at every change.
    """

    created: NDArray[np.float64]
    ended: NDArray[np.float64]
    attempts: NDArray[np.int64]
    evaluations: NDArray[np.int64]
    images: int
    computed: int = 0
    lost: int = 0
    in_system: float = 0.0
    device_s: float = 0.0
    mean_work: float = 0.0
    replicas: list[tuple[float, int]] = field(default_factory=list)

    @property
    def latency(self) -> NDArray[np.float64]:
        """[N] seconds."""
        return self.ended - self.created


def simulate(fleet: Fleet, requests: Sequence[Request]) -> Result:
    """Run requests, in order of arrival, until all have ended."""
    return _Run(fleet, requests).run()


class _Run:
    def __init__(self, fleet: Fleet, requests: Sequence[Request]) -> None:
        self.fleet, self.requests = fleet, requests
        self.random = Random(fleet.seed)
        self.times = StepTimes(fleet.curve)
        self.serving: list[Replica] = []
        self.held: dict[int, Replica] = {}  # every replica that takes up a device
        self.target = fleet.replicas
        self.router = self._router()
        self.scaler = Scaler(fleet.scaling) if fleet.scaling else None
        self.events: list[tuple[float, int, str, Any]] = []
        self.numbered = self.named = 0
        self.open: dict[int, tuple[int, Replica]] = {}  # router and replica of each request in flight
        self.waiting = 0
        self.unfinished = len(requests)
        self.now = self.work_s = 0.0
        self.result = Result(
            np.array([each.created for each in requests]),
            np.full(len(requests), np.nan),
            np.zeros(len(requests), np.int64),
            np.array([each.evaluations for each in requests], np.int64),
            sum(each.images for each in requests),
        )

    def _router(self) -> AnyReplica:
        fleet = self.fleet
        match fleet.routing:
            case "random":
                return AnyReplica(self.serving, self.random)
            case "ray":
                return RayDefault(self.serving, self.random)
            case "known work" | "known rows":
                return Known(self.serving, self.random, by_rows=fleet.routing == "known rows")
        return Policy(
            self.serving,
            self.random,
            fleet.capacity,
            MEAN_EVALUATIONS,
            among=0 if fleet.routing == "work of all" else 2,
            work=fleet.routing != "requests",
        )

    def run(self) -> Result:
        for _ in range(self.fleet.replicas):
            self._ready(self._order())
        for at in self.fleet.losses:
            self._at(at, "lose", None)
        if self.scaler:
            self._at(0.0, "scale", None)
        requests, coming = self.requests, 0
        while self.unfinished:
            at = self.events[0][0] if self.events else np.inf
            if coming < len(requests) and requests[coming].created <= at:  # before a step that ends then
                self._pass(requests[coming].created)
                self.waiting += 1
                self._route(coming, 0)
                coming += 1
                continue
            when, _, kind, what = heappop(self.events)
            self._pass(when)
            getattr(self, f"_{kind}")(what)
        for replica in self.held.values():
            self.result.device_s += self.now - replica.started
        self.result.mean_work = self.work_s / self.now if self.now else 0.0
        return self.result

    def _at(self, when: float, kind: str, what: Any) -> None:
        self.numbered += 1
        heappush(self.events, (when, self.numbered, kind, what))

    def _pass(self, now: float) -> None:
        self.result.in_system += (now - self.now) * (self.waiting + len(self.open))
        self.now = now

    # ── Requests ──

    def _retry(self, what: tuple[int, int]) -> None:
        self._route(*what)

    def _route(self, number: int, attempt: int) -> None:
        routers = max(1, len(self.serving) // REPLICAS_PER_ROUTER)
        router = self.random.randrange(routers) if routers > 1 else 0
        limit = self.fleet.max_ongoing
        chosen = self.router.choose(router, self.now, limit) if self.serving else None
        if chosen is None or chosen.ongoing >= limit:
            delay = BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] or 0.001
            self._at(self.now + delay, "retry", (number, attempt + 1))
            return
        each = self.requests[number]
        spec = job_of(str(number), each.created, each.steps, each.images, each.evaluations_per_step)
        chosen.accept(spec)
        self.router.sent(router, chosen, self.now, spec.evaluations)
        self.result.attempts[number] += 1
        self.waiting -= 1
        self.open[number] = router, chosen
        if chosen.batch is None:
            self._begin(chosen)

    def _begin(self, replica: Replica) -> None:
        batch = replica.begin(self.now)
        if batch is not None:
            self._at(self.now + self.times.at(batch.size), "step", replica)

    def _step(self, replica: Replica) -> None:
        if not replica.alive:
            return
        assert replica.batch is not None
        self.result.computed += replica.batch.size
        for name in replica.end():
            number = int(name)
            router, _ = self.open.pop(number)
            self.router.done(router, replica, self.now)
            self.result.ended[number] = self.now
            self.unfinished -= 1
        self._begin(replica)
        if replica.draining and not replica.ongoing:
            self._release(replica)

    # ── Replicas ──

    def _order(self) -> Replica:
        fleet = self.fleet
        engine = engine_of(fleet.batching, fleet.curve, fleet.max_batch_size)
        replica = self.held[self.named] = Replica(self.named, engine, self.now)
        self.named += 1
        return replica

    def _ready(self, replica: Replica) -> None:
        if replica.name not in self.held:
            return  # no longer wanted by the time it was ready
        self.serving.append(replica)
        self.result.replicas.append((self.now, len(self.serving)))
        replica.report = 0.0, 0, self.now
        if isinstance(self.router, Policy):
            self._at(self.now + self.fleet.report_s * self.random.random(), "report", replica)

    def _report(self, replica: Replica) -> None:
        if replica.alive and not replica.draining:
            replica.report = replica.evaluations, replica.ongoing, self.now
            self._at(self.now + self.fleet.report_s * self.random.uniform(0.9, 1.1), "report", replica)

    def _release(self, replica: Replica) -> None:
        del self.held[replica.name]
        self.result.device_s += self.now - replica.started
        replica.alive = False

    def _leave(self, replica: Replica) -> None:
        self.serving.remove(replica)
        self.result.replicas.append((self.now, len(self.serving)))

    def _lose(self, nothing: None) -> None:  # noqa: ARG002 - as every event's
        if not self.serving:
            return
        replica = self.random.choice(self.serving)
        self._leave(replica)
        self._release(replica)
        numbers = [number for number, (_, on) in self.open.items() if on is replica]
        done = sum(self.requests[number].evaluations for number in numbers) - replica.evaluations
        self.result.lost += done
        for number in numbers:
            del self.open[number]
            self.waiting += 1
        self._at(self.now + self.fleet.startup_s, "ready", self._order())
        for number in numbers:
            self._route(number, 0)

    def _scale(self, nothing: None) -> None:  # noqa: ARG002 - as every event's
        assert self.scaler is not None
        work = sum(replica.evaluations for replica in self.held.values())
        self.work_s += work * TICK_S
        self.scaler.observe(self.now, self.waiting + len(self.open), work)
        target = self.scaler.decide(self.now, len(self.serving), self.target, self.fleet.capacity)
        self.target = target
        serving = {replica.name for replica in self.serving}
        current = [replica for replica in self.held.values() if not replica.draining]
        for _ in range(target - len(current)):
            self._at(self.now + self.fleet.startup_s, "ready", self._order())
        # Those that start first, then the youngest: as Ray stops them.
        current.sort(key=lambda replica: (replica.name in serving, -replica.name))
        for replica in current[: max(0, len(current) - target)]:
            if replica.name in serving:
                self._leave(replica)
                replica.draining = True
            if not replica.ongoing:
                self._release(replica)
        if self.unfinished:
            self._at(self.now + TICK_S, "scale", None)
