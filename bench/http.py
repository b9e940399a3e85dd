"""HTTP/1.1 as cheaply as can be: clients that take little of the cores which they share with a server.

`request` is one request over a connection of its own. `saturate` is the rate of a service that many clients
keep busy; they run in a process of their own, `python -m bench.http URL ACCEPT CLIENTS BODY`, each sending
its next request over the same connection as soon as it has read an answer, until standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

BUFFER = bytearray(1 << 16)
"""Of all connections: what one has read is taken out before the next one reads."""
WARM_UP_S = 1.0
"""How long clients keep a service busy before anything is measured."""
IDLE_S = 30.0
"""How long a service may take to drop what its clients have left."""


def message(url: SplitResult, accept: str, body: object, *, keep: bool = False) -> bytes:
    """A POST of a JSON body, as it goes over the wire. keep: more of them follow."""
    content = json.dumps(body).encode()
    lines = (
        f"POST {url.path or '/'}{'?' if url.query else ''}{url.query} HTTP/1.1",
        f"Host: {url.netloc}",
        f"Accept: {accept}",
        f"Connection: {'keep-alive' if keep else 'close'}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class Connection(asyncio.BufferedProtocol):
    """A connection to a server: one request after another, as long as `open`."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[int] | None = None

    @classmethod
    async def to(cls, url: SplitResult) -> Connection:
        """Connect. Raises OSError."""
        assert url.hostname is not None
        loop, port = asyncio.get_running_loop(), url.port or 80
        _, connection = await loop.create_connection(cls, url.hostname, port)
        return connection

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def request(
        self,
        content: bytes,
        on_head: Callable[[int], None] = lambda _status: None,
        on_piece: Callable[[bytes], None] = lambda _piece: None,
    ) -> int:
        """Send a request. Its status, once its answer has been read to the end.

        on_head: called with the status when the head is there. on_piece: called with what comes of the body.
        Raises OSError or ValueError for what is no whole answer, and what the callbacks raise.
        """
        if self._transport is None:
            raise ConnectionError("the connection is closed")
        self._on_head, self._on_piece = on_head, on_piece
        self._rest = b""
        self._status = 0
        self._left: int | None = None  # of the body or of its chunk; None before the head
        self._chunked = self._last_chunk = self._to_the_end = False
        self._keep = True
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(content)
        return await self._answered

    def close(self) -> None:
        """End it, whatever is on its way."""
        if self._transport is not None:
            self._transport.abort()

    # ── What the event loop calls ──────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002 (its base's signature)
        """The buffer of all connections."""
        return BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Take out what has been read."""
        if self._answered is None or self._answered.done():
            return
        try:
            self._rest = self._parse(self._rest + BUFFER[:nbytes])
        except Exception as error:  # noqa: BLE001 (raised where the answer is awaited)
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of an answer that has no other, or of one that is not whole."""
        self._transport = None
        if self._answered is not None and not self._answered.done():
            whole = self._to_the_end and exc is None
            self._end(None if whole else exc or ConnectionError("the connection ended before the answer"))

    def _end(self, error: Exception | None = None) -> None:
        assert self._answered is not None
        if error is not None or not self._keep:
            self.close()
        if self._answered.done():
            return
        if error is not None:
            self._answered.set_exception(error)
        else:
            self._answered.set_result(self._status)

    def _parse(self, data: bytes) -> bytes:
        """Go through what has come; what is left of it has to wait for more."""
        at = 0
        while at < len(data):
            if self._left is None:
                end = data.find(b"\r\n\r\n", at)
                if end < 0:
                    return data[at:]
                self._read_head(data[at:end])
                at = end + 4
            elif self._to_the_end or self._left:
                piece = data[at:] if self._to_the_end else data[at : at + self._left]
                self._on_piece(piece)
                at += len(piece)
                self._left -= 0 if self._to_the_end else len(piece)
            elif self._chunked:
                end = data.find(b"\r\n", at)
                if end < 0:
                    return data[at:]
                line, at = data[at:end], end + 2
                if line:  # there is an empty one after each chunk
                    self._left = int(line.partition(b";")[0], 16)
                    self._last_chunk = self._left == 0
                elif self._last_chunk:
                    self._end()
                    break
            else:
                break
            if self._left == 0 and not self._chunked:
                self._end()
                break
        return b""

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        version, self._status = first.split()[0], int(first.split()[1])
        self._keep = version == "HTTP/1.1" and fields.get("connection", "").lower() != "close"
        self._chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        self._to_the_end = not self._chunked and "content-length" not in fields
        self._left = 0 if self._chunked else int(fields.get("content-length", 1))
        self._on_head(self._status)


async def request(
    url: str,
    accept: str,
    body: object,
    on_head: Callable[[int], None] = lambda _status: None,
    on_piece: Callable[[bytes], None] = lambda _piece: None,
) -> int:
    """Send a request over a connection of its own; otherwise as `Connection.request`."""
    where = urlsplit(url)
    connection = await Connection.to(where)
    try:
        return await connection.request(message(where, accept, body), on_head, on_piece)
    finally:
        connection.close()


# ── A service that is kept busy ────────────────────────────────────────────────────────────────


def saturate(url: str, accept: str, body: Mapping[str, object], seconds: float, clients: int) -> float:
    """Rows per second that the service at `url` counts while clients keep it busy.

    Raises RuntimeError when one of them got no answer.
    """
    with kept_busy(url, accept, body, clients):
        return row_rate(url, seconds)


@contextmanager
def kept_busy(url: str, accept: str, body: Mapping[str, object], clients: int) -> Iterator[int]:
    """Have so many clients request without a pause; gives the id of their process.

    Leaves the service idle. Raises RuntimeError when one of them got no answer.
    """
    arguments = [f"{url}/generate", accept, str(clients), json.dumps(body)]
    with subprocess.Popen(
        [sys.executable, "-m", "bench.http", *arguments],
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()  # they are connected, or one has failed
        time.sleep(WARM_UP_S)
        yield popen.pid
        if popen.poll() is not None:
            raise RuntimeError(f"a client got no answer: {popen.stdout.read().strip()}")
    give_up = time.monotonic() + IDLE_S
    while metric(url, "ddpm_samples_running") + metric(url, "ddpm_samples_waiting"):
        if time.monotonic() > give_up:
            raise RuntimeError("the service still works for clients that have left")
        time.sleep(0.02)  # cancelled requests are in flight for another step


def row_rate(url: str, seconds: float) -> float:
    """Rows per second that a service counts, over so many seconds."""
    return rate(url, "ddpm_batch_rows_sum", seconds)


def rate(url: str, name: str, seconds: float) -> float:
    """How much a counter of a service rises per second, over so many seconds."""
    before, begun = metric(url, name), time.perf_counter()
    time.sleep(seconds)
    return (metric(url, name) - before) / (time.perf_counter() - begun)


def metric(url: str, name: str) -> float:
    """A metric as a service has it now, summed over its labels."""
    where = urlsplit(url)
    assert where.hostname is not None
    connection = HTTPConnection(where.hostname, where.port)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    found = [line.rpartition(" ")[2] for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    if not found:
        raise LookupError(f"{url} has no metric {name}")
    return sum(map(float, found))


async def _keep_requesting(url: str, accept: str, clients: int, body: object) -> None:
    where = urlsplit(url)
    content = message(where, accept, body, keep=True)

    async def work(connection: Connection) -> None:
        while True:
            if not connection.open:
                connection = await Connection.to(where)
            status = await connection.request(content)
            if status != 200:
                raise RuntimeError(f"status {status}")

    connections = [await Connection.to(where) for _ in range(clients)]
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
    print("connected", flush=True)
    working = [asyncio.create_task(work(connection)) for connection in connections]
    ended = asyncio.create_task(over.wait())
    done, _ = await asyncio.wait([ended, *working], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    for task in working:
        task.cancel()


def main() -> int:
    """Run clients, as the command line says. Returns the exit code."""
    url, accept, clients, body = sys.argv[1:]
    try:
        asyncio.run(_keep_requesting(url, accept, int(clients), json.loads(body)))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
