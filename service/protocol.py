"""HTTP over a connection: limits on heads, bodies and patience, and on how many connections there are.

uvicorn keeps what it is sent for as long as its client likes, and takes connections until there are no more
descriptors; then nobody can ask how the service is.
"""

from __future__ import annotations

import math
import resource
from asyncio import TimerHandle, Transport
from typing import ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.settings import Settings

SEND_TIMEOUT_S = 60.0
"""A client that has not read a byte for so long, of what waits for it, is gone for all that is known."""
MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, and of all else that comes before there is anything to do; as with h11."""


SLOWEST = 16 << 10
"""Bytes a second, after the first READ_S, at which a body must come: about what a modem on ISDN sends."""
MOST_SMALL_CHUNKS, SMALL_CHUNK = 4096, 64
"""So many chunks of a body may have less than so many bytes each: parsing one costs as much as a kilobyte."""
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


RESERVED = 48
"""Descriptors that connections leave to the rest: files, an engine that has to be started, health checks."""
SPARE = 16
"""Of these, so many serve connections for which no other can give way."""


class Connections:
    """How many connections there may be, so that one more can always be answered.

    Where there are more, the one closes that has waited for its client longest: for a request to begin, or to
    end. Those whose request is there are served. most: connections at once.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.open = 0
        self._waiting: dict[HttpProtocol, None] = {}  # the longest first

    def enter(self, connection: HttpProtocol) -> None:
        """Count a new one. Closes one, where there are too many, at worst this."""
        self.open += 1
        self.wait(connection)
        if self.open > self.most:
            longest = next(iter(self._waiting))
            if longest is not connection or self.open > self.most + SPARE:
                self._waiting.pop(longest)
                longest.transport.abort()

    def leave(self, connection: HttpProtocol) -> None:
        """One has ended."""
        self.open -= 1
        self._waiting.pop(connection, None)

    def wait(self, connection: HttpProtocol) -> None:
        """It is its client's turn."""
        self._waiting[connection] = None

    def serve(self, connection: HttpProtocol) -> None:
        """It is the service's turn."""
        self._waiting.pop(connection, None)


class HttpProtocol(HttpToolsProtocol):
    """HTTP by httptools, at two thirds of h11's cost per request, but with a limit on what it keeps.

    By itself it collects headers for as long as they come, before anybody has looked for a key, and waits for
    the rest of a request for ever. Each head has READ_S to come. A body has as long again, and more time with
    what comes of it; a connection that is paused, because its client has sent ahead, has all the time of the
    answer before. read_s: that time, and connections_open: all there are, both set by `http_protocol`.
    """

    read_s: ClassVar[float] = 30.0
    connections_open: ClassVar[Connections] = Connections(math.inf)
    _pending = 0
    _chunks = _received = 0
    _in_body = _unwanted = False
    _due: float | None = None
    """When what is being received must have come; None between two requests."""
    _timer: TimerHandle | None = None
    _stalled: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head. Where there are too many connections, one gives way."""
        super().connection_made(transport)
        self._expect()
        self.connections_open.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        self.connections_open.leave(self)
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
        if not self.cycle.response_complete:
            self.connections_open.serve(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, unless it has come."""
        waits = not self.pipeline
        super().on_response_complete()
        if waits and not self.transport.is_closing():
            self.connections_open.wait(self)

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
    """The protocol with what the settings say of it, and as many connections as there are descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if soft == resource.RLIM_INFINITY else max(SPARE, soft - RESERVED)

    class Configured(HttpProtocol):
        read_s = settings.read_s
        connections_open = Connections(most)

    return Configured
