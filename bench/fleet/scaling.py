"""How many replicas there are: Ray Serve's control loop, over its own measure or over seconds of work.

Ray's default (`default_autoscaling_policy`): the requests that are queued or in progress, averaged over
`look_back_s`, as handles push them every `push_s`; over the target for a replica. A change is made once
it has been wanted for `upscale_delay_s` or `downscale_delay_s` without a break. Seconds of work go through
the same loop, and are pushed in the same way. tests/bench/test_fleet.py runs Ray's functions beside these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from service.cluster.policies import ReplicaLoad, desired_replicas


@dataclass(frozen=True)
class Scaling:
    """Options, with Ray's defaults. target: ongoing requests for a replica, or seconds of work."""

    measure: Literal["requests", "work"] = "requests"
    target: float = 2.0
    lower: int = 1
    upper: int = 100
    push_s: float = 10.0
    look_back_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0


@dataclass
class Delay:
    """A number that follows what is wanted once that has been on the same side of it for long enough."""

    up_s: float
    down_s: float
    _side: int = 0
    _since: float = 0.0

    def follow(self, wanted: int, target: int, now: float) -> int:
        """The next target."""
        side = (wanted > target) - (wanted < target)
        if side != self._side:
            self._side, self._since = side, now
        if side == 0 or now - self._since + 1e-6 < (self.up_s if side > 0 else self.down_s):
            return target
        self._side = 0
        return wanted if side > 0 or target == 1 else max(1, wanted)


@dataclass
class Scaler:
    """The control loop. Call `observe` more often than `push_s`, then `decide`."""

    options: Scaling
    _samples: deque[tuple[float, float, float]] = field(default_factory=deque)
    _pushed: tuple[float, float, int] = (0.0, 0.0, 0)
    _next_push: float = 0.0

    def __post_init__(self) -> None:
        self._delay = Delay(self.options.upscale_delay_s, self.options.downscale_delay_s)

    def observe(self, now: float, requests: int, evaluations: int) -> None:
        """Note what is in progress; what is older than the look-back period does not count."""
        self._samples.append((now, requests, evaluations))
        while self._samples[0][0] < now - self.options.look_back_s:
            self._samples.popleft()
        if now >= self._next_push:
            count = len(self._samples)
            means = (sum(each[i] for each in self._samples) / count for i in (1, 2))
            self._pushed = next(means), next(means), count
            self._next_push = now + self.options.push_s

    def decide(self, now: float, running: int, target: int, rows_per_s: float) -> int:
        """How many replicas there should be. running: those that serve; target: with those that start."""
        requests, evaluations, _ = self._pushed
        options = self.options
        if options.measure == "work":
            each = evaluations / max(1, running)
            loads: Sequence[ReplicaLoad] = [ReplicaLoad("", each, rows_per_s, 0, 1)] * running
            wanted = desired_replicas(loads, options.target, target, options.lower, options.upper)
        else:
            wanted = ray_desired(requests, running, target, options.target)
        return min(max(self._delay.follow(wanted, target, now), options.lower), options.upper)


def ray_desired(requests: float, running: int, target: int, target_ongoing: float) -> int:
    """What Ray's default policy wants, with scaling factors of 1."""
    if running == 0:
        return target
    desired = running * (requests / (target_ongoing * running))
    return ceil(running + (desired - running))
