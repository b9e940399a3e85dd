"""uvicorn with a drain: SIGTERM → not ready → refuse new work → finish running work → exit 0.

Plain uvicorn waits for open streams for ever, or cuts them. Here the signal only sets a flag; the server's
tick sees it, keeps the listener open while running work finishes, and then lets uvicorn stop.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from socket import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from service.engine.worker import Phase
from service.errors import DrainingError
from service.heap import freeze_heap
from service.http.state import AppState
from service.protocol import http_protocol
from service.settings import Settings
from service.startup import hangup_is_ignored, listen

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
"""How long readers get, after the drain's end, to take the last event of their stream."""

LEAVE_S = 10.0
"""How long the process may take to end, after that, whatever threads of it or of an engine hang."""


class DrainingServer(uvicorn.Server):
    """A uvicorn server that finishes what it has begun. A second signal leaves at once.

    leave: ends the process, whatever it is in: for that second signal, and where it hangs after a drain.
    Without it the server's next tick does what it can.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: AppState,
        drain_s: float,
        leave: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self.state, self.drain_s, self.leave = state, drain_s, leave
        self._signals = 0
        self._deadline: float | None = None
        self._flush_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (its base's signature)
        """Take note of a signal, and nothing else; of a second one, leave."""
        self._signals += 1
        if self._signals > 1 and self.leave:
            self.leave()

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (as above)
        """Drain once the terminal is gone. Both system and shell may say so: it never is a second signal."""
        self._signals = max(1, self._signals)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Start; say where, which its base leaves to whoever has bound the sockets."""
        await super().startup(sockets)
        if sockets:
            host, port = self.config.host, sockets[0].getsockname()[1]
            address = f"[{host}]" if ":" in host else host
            logger.info("Uvicorn running on http://%s:%d (Press CTRL+C to quit)", address, port)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Stop, in a limited time: the interpreter would wait for its threads for as long as they take."""
        if self.leave:
            leave_within(LEAVE_S, self.leave)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Carry the drain forward; called ten times a second."""
        self._drain()
        return await super().on_tick(counter)

    def _drain(self) -> None:
        engine, now = self.state.engine, time.monotonic()
        if self._signals > 1:
            self.force_exit = self.should_exit = True
        elif self._flush_until is not None:
            if self.state.streams.followed == 0 or now > self._flush_until:
                self.should_exit = True
        elif engine.phase is Phase.DEAD or (self._deadline is not None and engine.idle):
            self._flush_until = now + FLUSH_S
        elif self._signals and self._deadline is None:
            logger.info("draining: new work is refused, running work has %.0f s", self.drain_s)
            engine.drain()
            self._deadline = now + self.drain_s
        elif self._deadline is not None and now > self._deadline:
            engine.abort(DrainingError("The service stopped before this was finished.", 5.0))
            self._flush_until = now + FLUSH_S


def serve(app: ASGIApp, state: AppState, settings: Settings, sockets: list[socket]) -> int:
    """Run until told to stop. Returns the exit code: 0 after a drain, or why the engine was given up.

    sockets: bound ones. Raises StartError where nobody can be let in there.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=http_protocol(settings),
        log_config=None,
        access_log=False,
        proxy_headers=False,  # nobody asks who the client is
        timeout_graceful_shutdown=int(FLUSH_S) + 1,
    )

    def leave() -> None:
        state.engine.kill()
        os._exit(state.engine.exit_code)

    server = DrainingServer(config, state, settings.drain_s, leave)
    listen(sockets, config.backlog)
    freeze_heap()
    if not hangup_is_ignored():
        signal.signal(signal.SIGHUP, server.handle_hangup)
    server.run(sockets)
    return state.engine.exit_code


def leave_within(seconds: float, leave: Callable[[], None]) -> None:
    """Leave after so long, unless this process has ended by then."""

    def late() -> None:
        logger.error("something hangs: the process leaves without it after %.0f s", seconds)
        leave()

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
