"""A fleet of simulated devices on a real Ray Serve: `python -m bench.fleet.on_ray PORT …`.

Beside what `service.cluster` has: a router by remaining work, and an autoscaling policy on seconds of work.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import serve
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, RunningReplica

from bench.fleet.check import ROWS, STEP_MS
from service.cluster.front import Front
from service.cluster.options import front_options, replica_options
from service.cluster.policies import ReplicaLoad, by_work, choose, desired_replicas
from service.cluster.replica import Replica
from service.engine.connection import ProcessConnection
from service.settings import Settings

ROUTERS = {
    "ray": "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter",
    "hash": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "sessions": "service.cluster.routing.SessionRouter",
    "work": "bench.fleet.on_ray.WorkRouter",
}
SCALING = ("requests", "work")
LOWEST, MOST = 1, 3
LOOK_BACK_S, UP_S, DOWN_S = 5.0, 2.0, 10.0
TARGET_REQUESTS, TARGET_S = 8.0, 2.0
"""For a replica: a full batch of one image each, and as much work as keeps one busy for so long."""


class WorkRouter(PowerOfTwoChoicesRequestRouter):
    """Of two replicas drawn at random the one with less work, by its last report."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,  # noqa: ARG002 (its base's signature)
    ) -> list[list[RunningReplica]]:
        """Two, the better first."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = []
        for name, replica in by_id.items():
            stats = replica.routing_stats
            work, rows, free = (stats.get(each, 0.0) for each in ("evaluations", "rows_per_s", "slots_free"))
            loads.append(ReplicaLoad(name, work, rows or 1.0, 0, int(free or 1)))
        return [[by_id[name]] for name in choose(loads, Random(), key=by_work)]


def by_seconds_of_work(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """So many replicas that each has TARGET_S seconds of work; the delays are Ray's own, around this."""
    seconds = (context.aggregated_metrics or {}).get("seconds", {})
    loads = [ReplicaLoad(str(name), value, 1.0, 0, 1) for name, value in seconds.items()]
    wanted = desired_replicas(loads, TARGET_S, context.target_num_replicas, LOWEST, MOST)
    return wanted, {}


def application(
    routing: str, replicas: int, scaling: str | None, report_s: float, device: tuple[int, float]
) -> Any:
    """Front and replicas; with `scaling` as many of them as its policy wants. device: (rows, ms a step)."""
    settings = Settings(_env_file=None, max_queue=512)
    options: dict[str, Any] = {
        **replica_options(settings),
        "num_replicas": replicas,
        "ray_actor_options": {"num_cpus": 0},
        "request_router_config": {
            "request_router_class": ROUTERS[routing],
            "request_routing_stats_period_s": report_s,
        },
    }
    if scaling is not None:
        del options["num_replicas"]
        options["autoscaling_config"] = {
            "min_replicas": LOWEST,
            "max_replicas": MOST,
            "target_ongoing_requests": TARGET_REQUESTS,
            "metrics_interval_s": 1.0,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UP_S,
            "downscale_delay_s": DOWN_S,
        }
        if scaling == "work":
            policy = {"policy_function": "bench.fleet.on_ray:by_seconds_of_work"}
            options["autoscaling_config"]["policy"] = policy
    given = "--rows", str(device[0]), "--step-ms", str(device[1]), "--engine"
    start = partial(ProcessConnection, command=(sys.executable, "-m", "bench.overload", *given))
    model = serve.deployment(name="simulated", **options)(Replica).bind(
        start, device="cuda:0", max_queue=512, resume_secret="of a benchmark, no secret"
    )
    front = serve.deployment(name="front", ray_actor_options={"num_cpus": 0}, **front_options(settings))
    return front(Front).bind({"": model})


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser("python -m bench.fleet.on_ray")
    parser.add_argument("port", type=int)
    parser.add_argument("--routing", choices=ROUTERS, default="sessions")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--scaling", choices=SCALING)
    parser.add_argument("--report-s", type=float, default=10.0, help="between two reports of a replica")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step")
    parser.add_argument("--step-ms", type=float, default=STEP_MS)
    args = parser.parse_args()
    with TemporaryDirectory(prefix="ray-") as folder:
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        serve.run(
            application(args.routing, args.replicas, args.scaling, args.report_s, (args.rows, args.step_ms))
        )
        sys.stdin.read()
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main()
