"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from service.engine.client import EngineClient
from service.engine.streams import Streams
from service.http.answers import EventPresenter
from service.settings import Settings
from service.tasks.sampling import ModelCapabilities
from service.telemetry import Telemetry


@dataclass
class AppState:
    """The application's state, wired up in app.py.

    streams: each with the presenter of its events, for a client that reconnects, or None where a job is not
    streamed.
    """

    capabilities: ModelCapabilities
    engine: EngineClient
    streams: Streams[EventPresenter | None]
    telemetry: Telemetry
    settings: Settings


def app_state(request: Request) -> AppState:
    """The state of the app that serves a request."""
    found: AppState = request.app.state.ddpm
    return found


State = Annotated[AppState, Depends(app_state)]
