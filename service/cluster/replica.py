"""A replica: the whole service, one API and its engines, as an actor of Ray Serve.

The app is made in the replica and not sent there. Ray's proxy hands it each request as ASGI messages, so that
streams are sent as they come and a client that leaves is seen, as behind uvicorn.
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve

from service.app import create_app
from service.engine.worker import Phase
from service.http.state import AppState
from service.settings import Settings
from service.telemetry import configure_logging

LOOK_S = 0.05


@serve.ingress()
class Replica:
    """One service of the settings that its process has in its environment."""

    def __init__(self) -> None:
        settings = Settings()
        configure_logging(settings.log_format)
        # It is reached through a proxy, under whatever name that has.
        self._app = create_app(settings.model_copy(update={"host": "0.0.0.0"}))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    @property
    def _state(self) -> AppState:
        state: AppState = self._app.state.ddpm
        return state

    async def check_health(self) -> None:
        """Wait until the model is loaded; Ray sends requests only after the first of these checks.

        Raises RuntimeError where the engine has been given up, so that Ray starts another replica.
        """
        engine = self._state.engine
        while engine.phase is Phase.LOADING:  # noqa: ASYNC110 - Ray calls this from a loop of its own
            await asyncio.sleep(LOOK_S)
        if engine.phase is Phase.DEAD:
            raise RuntimeError("the engine has been given up")

    def record_routing_stats(self) -> dict[str, float]:
        """What a router may know: the work that remains, at which rate it is done, and free slots."""
        engine = self._state.engine
        evaluations, slots = engine.left
        rows, seconds = engine.info.step_times[-1] if engine.info else (0, 1.0)
        devices = len(self._state.settings.engine_configs())
        return {
            "evaluations": float(evaluations),
            "rows_per_s": devices * rows / seconds,
            "slots_free": float(slots),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Seconds of work that remain."""
        stats = self.record_routing_stats()
        return {"seconds": stats["evaluations"] / stats["rows_per_s"] if stats["rows_per_s"] else 0.0}
