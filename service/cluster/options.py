"""What Ray Serve has to be told of a replica. Pure.

Ray's defaults are for functions that do one thing at a time: five requests in progress starve a service that
batches what is in flight, an endless queue in the proxy breaks its word about waiting, and a replica that is
stopped after 20 s loses chains.
"""

from __future__ import annotations

from typing import TypedDict

from service.settings import Settings

BESIDE = 64
"""Requests beside those that have slots: health, metrics, refusals, readers of jobs."""
OPEN = 4096
"""Requests of a front, streams for the most part, each a few kilobytes and a coroutine or two."""
FLUSH_S = 5.0
"""For answers that are being read when their chain is done."""
START_S = 600.0
"""That loading a model and its first steps may take."""


class ReplicaOptions(TypedDict):
    """As Ray Serve names them. Requests, and seconds."""

    max_ongoing_requests: int
    max_queued_requests: int
    graceful_shutdown_timeout_s: float
    graceful_shutdown_wait_loop_s: float
    health_check_period_s: float
    health_check_timeout_s: float
    request_router_config: dict[str, str]


class FrontOptions(TypedDict):
    """The same of what answers for all replicas."""

    max_ongoing_requests: int
    max_queued_requests: int
    graceful_shutdown_timeout_s: float


def replica_options(settings: Settings) -> ReplicaOptions:
    """Options of the deployment, from what a replica does by itself.

    max_ongoing_requests: one for each slot (a request has an image at least), and as many streams again that
    wait for a reader to come back. max_queued_requests: as many wait in a proxy at most, where nobody knows
    for how long; before that replicas refuse, with a `Retry-After`. graceful_shutdown_timeout_s: no request
    outlasts its deadline. health_check_timeout_s: the first check waits for the model.
    """
    return {
        "max_ongoing_requests": 2 * settings.max_queue + BESIDE,
        "max_queued_requests": settings.max_queue,
        "graceful_shutdown_timeout_s": settings.deadline_s + FLUSH_S,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": START_S,
        "request_router_config": {"request_router_class": "service.cluster.routing.SessionRouter"},
    }


def front_options(settings: Settings) -> FrontOptions:
    """Options of the front, which only passes on: replicas say when it is too much."""
    return {
        "max_ongoing_requests": OPEN,
        "max_queued_requests": OPEN,
        "graceful_shutdown_timeout_s": settings.deadline_s + FLUSH_S,
    }
