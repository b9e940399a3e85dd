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
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from socket import socket
from types import FrameType
from typing import ClassVar

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.engine.worker import Phase
from service.errors import DrainingError
from service.heap import freeze_heap
from service.http.state import AppState
from service.settings import Settings
from service.startup import hangup_is_ignored, listen

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
"""How long readers get, after the drain's end, to take the last event of their stream."""

LEAVE_S = 10.0
"""How long the process may take to end, after that, whatever threads of it or of an engine hang."""

SEND_TIMEOUT_S = 60.0
"""A client that has not read a byte for so long, of what waits for it, is gone for all that is known."""
MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, and of all else that comes before there is anything to do; as with h11."""


SLOWEST = 16 << 10
"""Bytes a second, after the first READ_S, at which a body must come: about what a modem on ISDN sends."""
MOST_SMALL_CHUNKS, SMALL_CHUNK = 4096, 64
"""So many chunks of a body may have less than so many bytes each: parsing one costs as much as a kilobyte."""
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HttpProtocol(HttpToolsProtocol):
    """HTTP by httptools, at two thirds of h11's cost per request, but with a limit on what it keeps.

    By itself it collects headers for as long as they come, before anybody has looked for a key, and waits for
    the rest of a request for ever. Each head has READ_S to come. A body has as long again, and more time with
    what comes of it; a connection that is paused, because its client has sent ahead, has all the time of the
    answer before. read_s: that time, set by `http_protocol`.
    """

    read_s: ClassVar[float] = 30.0
    _pending = 0
    _chunks = _received = 0
    _in_body = _unwanted = False
    _due: float | None = None
    """When what is being received must have come; None between two requests."""
    _timer: TimerHandle | None = None
    _stalled: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to. It is let go when it reads nothing at all."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read on, or is gone."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch_reader(self, unread: int) -> None:
        self._stalled = self.loop.call_later(SEND_TIMEOUT_S, self._check_reader, unread)

    def _check_reader(self, before: int) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch_reader(unread)
        else:
            self._stalled = None
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what has been read. Answers by 400 where a head does not end."""
        if self._due is None:
            self._expect()
        self._pending += len(data)
        super().data_received(data)
        if self._pending > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        """A head begins, perhaps in what has been read with the request before."""
        if self._due is None:
            self._expect()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head has ended; it may have been longer if a single read has brought it whole.

        A target in absolute form may have no path, which means `/` (RFC 9112, §3.2.2); uvicorn needs one.
        """
        self._pending = self._chunks = self._received = 0
        self._in_body, self._due = True, self.loop.time() + self.read_s
        if not self.url.startswith(b"/"):
            target = httptools.parse_url(self.url)
            path: bytes | None = target.path  # whatever its annotation says
            if path is None:
                self.url = b"/?" + target.query if target.query else b"/"
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body, which the routes limit. What may follow a chunked one are headers again.

        Raises ValueError, which is answered by 400, where very many chunks bring next to nothing.
        """
        self._pending = 0
        self._chunks += 1
        self._received += len(body)
        if self._chunks > MOST_SMALL_CHUNKS and self._received < SMALL_CHUNK * self._chunks:
            raise ValueError("The chunks of the body are too small.")
        if not self.cycle.response_complete:
            assert self._due is not None
            self._due += len(body) / SLOWEST
        elif not self._unwanted:  # what has come before is no reason to take more of it
            self._unwanted = True
            self._expect()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next one may begin."""
        self._pending = 0
        self._in_body, self._unwanted, self._due = False, False, None
        super().on_message_complete()

    def _expect(self) -> None:
        """Something is to come from now on."""
        self._due = self.loop.time() + self.read_s
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._due, self._check)

    def _check(self) -> None:
        """Close a connection that is too slow. One timer serves many requests: it looks when it is due."""
        self._timer = None
        if self._due is None or self.transport.is_closing():
            return
        begun = self.cycle is not None and self.cycle.response_started
        over = begun and self.cycle.response_complete
        if (begun and not over) or self.flow.read_paused:  # nobody reads, or the answer ends by itself
            self._due = max(self._due, self.loop.time() + self.read_s)
        if self._due > self.loop.time():
            self._timer = self.loop.call_at(self._due, self._check)
            return
        if self._pending or (self._in_body and not over):  # and not where nothing has come, or all is said
            self.transport.write(TOO_SLOW)
        self.transport.close()


def http_protocol(settings: Settings) -> type[HttpProtocol]:
    """The protocol with what the settings say of it."""

    class Configured(HttpProtocol):
        read_s = settings.read_s

    return Configured


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
