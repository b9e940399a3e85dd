"""A replica: the whole service of one model, an API and its engines, as an actor of Ray Serve.

It gets each request from the front (service/cluster/front.py) as ASGI messages, so that streams are sent as
they come and a client that leaves is seen, as behind uvicorn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from ray import serve
from starlette.types import Message

from service.app import create_app
from service.engine.connection import Connection, ProcessConnection
from service.engine.messages import EngineConfig
from service.engine.worker import Phase
from service.http.state import AppState
from service.settings import Settings
from service.telemetry import configure_logging

LOOK_S = 0.05
UNREAD = 16
"""Messages of an answer that wait to be taken."""


class Replica:
    """One service of the settings that its process has in its environment, and of those that are given.

    start: starts an engine, as for create_app.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, start: Callable[[EngineConfig], Connection] = ProcessConnection, **overrides: Any
    ) -> None:
        settings = Settings(**overrides)
        configure_logging(settings.log_format)
        # It is reached through a proxy, under whatever name that has.
        self._app = create_app(settings.model_copy(update={"host": "0.0.0.0"}), start)
        self._running: AbstractAsyncContextManager[Any] = self._app.router.lifespan_context(self._app)
        await self._running.__aenter__()

    async def __del__(self) -> None:
        await self._running.__aexit__(None, None, None)

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

    async def asgi(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """Answer a request. Yields the messages of the answer, those together that are there.

        A caller that cancels is a client that has left.
        """
        taken, gone = False, asyncio.Event()
        messages: asyncio.Queue[Message | None] = asyncio.Queue(UNREAD)

        async def receive() -> Message:
            nonlocal taken
            if not taken:
                taken = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not gone.is_set():
                await messages.put(message)

        async def answer() -> None:
            try:
                await self._app(scope, receive, send)
            finally:
                if not gone.is_set():
                    await messages.put(None)

        answering = asyncio.create_task(answer())
        try:
            over = False
            while not over:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                over = batch[-1] is None
                if found := [message for message in batch if message is not None]:
                    yield found
        finally:
            gone.set()
            while not messages.empty():  # or what waits to send would wait for ever
                messages.get_nowait()
            await answering

    def metrics(self) -> tuple[str, str]:
        """Id of the replica, and its metrics in Prometheus's text format."""
        return serve.get_replica_context().replica_id.unique_id, self._state.telemetry.render().decode()

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
