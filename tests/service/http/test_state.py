"""What routes share is found on the event loop."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import iscoroutinefunction

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from service.app import ROUTERS


def dependants(of: Dependant) -> Iterator[Dependant]:
    yield of
    for dependency in of.dependencies:
        yield from dependants(dependency)


def test_no_request_waits_for_a_thread_to_look_something_up() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    called = [each.call for route in routes for each in dependants(route.dependant)]
    assert {"generate", "stream", "score"} <= {getattr(call, "__name__", "") for call in called}
    assert [call for call in called if not iscoroutinefunction(call)] == []
