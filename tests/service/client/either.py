"""Both clients behind one interface, and a proxy that cuts connections."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from inspect import isawaitable
from typing import Any

from service.client import AsyncClient, Client
from tests.service.fakes import PATIENCE_S


class Driven:
    """An AsyncClient, called like a Client: each call runs the event loop until there is an answer."""

    def __init__(self, *arguments: Any, transport: Any = None, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, transport=transport, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **fields: Any) -> Any:
            found = getattr(self._client, name)(*arguments, **fields)
            return self._run(found) if isawaitable(found) else self._iterate(found)

        return call

    def close(self) -> None:
        with self._runner:
            self._run(self._client.aclose())

    def _iterate(self, events: AsyncIterator[Any]) -> Iterator[Any]:
        with suppress(StopAsyncIteration):
            while True:
                yield self._run(anext(events))

    def _run(self, awaitable: Any) -> Any:
        async def awaited() -> Any:
            return await awaitable

        return self._runner.run(awaited())


Connect = Callable[..., Any]
KINDS: dict[str, Connect] = {"blocking": Client, "asynchronous": Driven}


def end_of_event(answer: bytes, number: int) -> int | None:
    """Where an answer's event ends, counted from 1; 0 is the head. None if it has not come yet."""
    ends = [match.end() for match in re.finditer(rb"\r\n\r\n(?=\w+\r\nevent)|\nid: \S+\n\n", answer)]
    return ends[number] if len(ends) > number else None


class Proxy:
    """Passes bytes between clients and a server, and closes connections after a number of events.

    cuts: for each connection the number of events after which it is cut; those that follow are not.
    """

    def __init__(self, target: tuple[str, int], cuts: list[int]) -> None:
        self.target, self.cuts = target, cuts
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._clients: list[socket.socket] = []
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _start(self, function: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                self._start(self._serve, client, self.cuts.pop(0) if self.cuts else None)

    def _serve(self, client: socket.socket, cut: int | None) -> None:
        with closing(client), socket.create_connection(self.target) as server, suppress(OSError):
            self._start(self._pass_requests, client, server)
            seen, sent, end = b"", 0, None
            while end is None and (data := server.recv(1 << 16)):
                seen += data
                end = None if cut is None else end_of_event(seen, cut)
                client.sendall(seen[sent:end])
                sent = len(seen)
            for peer in (client, server):  # a close alone would wait for the thread that reads
                peer.shutdown(socket.SHUT_RDWR)

    def _pass_requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                self.heads.append(data)
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)
