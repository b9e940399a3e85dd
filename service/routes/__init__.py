"""HTTP in and out. A route never touches a tensor; the engine never hears of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from service.errors import ServiceError
from service.schemas import Catalogue, Problem
from service.streams import Streams
from service.telemetry import Telemetry
from service.worker import Worker


@dataclass
class House:
    """What the routes share, wired up in app.py. `facts` are filled in once the network is warm."""

    catalogue: Catalogue
    worker: Worker
    streams: Streams
    telemetry: Telemetry
    to_problem: Callable[[ServiceError], Problem]
    facts: dict[str, Any]


def house(request: Request) -> House:
    """The app's one House."""
    found: House = request.app.state.house
    return found


InHouse = Annotated[House, Depends(house)]
