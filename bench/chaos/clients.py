"""Clients that a service should not be left alone with: they vanish, stall and trickle, over bare sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from bench import http
from bench.chaos.load import EVENTS, JSON, Kind
from bench.http import message

LONG = {
    "sampler": "ddpm",
    "num_inference_steps": 1000,
    "n": 8,
    "preview_every": 1,
    "class_label": "a",
    "seed": 0,
}
"""A request that is still running when its client leaves."""
STATES = ("connected", "in the head", "in the body", "sent", "queued", "running")
"""In which a client can leave; the last two as a stream's reader."""
READ_S = 30.0


@asynccontextmanager
async def connected(url: str, buffer: int | None = None) -> AsyncIterator[socket.socket]:
    """A socket that does not block. buffer: bytes that it receives ahead of its reader."""
    where = urlsplit(url)
    with socket.socket() as client:
        client.setblocking(False)
        if buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(client, (where.hostname, where.port))
        yield client


async def read_until(client: socket.socket, word: bytes) -> bytes:
    """What comes until a word is in it. Raises ConnectionError at an end before that."""
    loop, content = asyncio.get_running_loop(), b""
    async with asyncio.timeout(READ_S):
        while word not in content:
            piece = await loop.sock_recv(client, 1 << 16)
            if not piece:
                raise ConnectionError(f"the end came before {word!r}: {content[:200]!r}")
            content += piece
    return content


async def leave(url: str, state: str, *, reset: bool) -> None:
    """Connect and leave in a state. reset: by RST, as a machine that has lost power, and not by FIN."""
    streams = state in ("queued", "running")
    content = message(urlsplit(url + "/generate"), EVENTS if streams else JSON, LONG)
    head = content.index(b"\r\n\r\n")
    sent = {"connected": 0, "in the head": head // 2, "in the body": head + 10}.get(state, len(content))
    async with connected(url) as client:
        await asyncio.get_running_loop().sock_sendall(client, content[:sent])
        if streams:
            await read_until(client, b"event: queued" if state == "queued" else b"event: preview")
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def stall(url: str, seconds: float) -> None:
    """Have a job of many pictures streamed, and read nothing of it."""
    content = message(urlsplit(url + "/generate"), EVENTS, {**LONG, "scale": 16})
    async with connected(url, buffer=4096) as client:
        await asyncio.get_running_loop().sock_sendall(client, content)
        await asyncio.sleep(seconds)


async def trickle(url: str, seconds: float) -> int:
    """Send a small request over so many seconds, byte by byte. The status of its answer."""
    content = message(urlsplit(url + "/generate"), JSON, {"num_inference_steps": 2, "class_label": "a"})
    loop = asyncio.get_running_loop()
    async with connected(url) as client:
        for i in range(len(content)):
            await loop.sock_sendall(client, content[i : i + 1])
            await asyncio.sleep(seconds / len(content))
        return int((await read_until(client, b"\r\n")).split()[1])


async def resume(url: str, kind: Kind, times: int) -> bytes:
    """Read a stream whose connection is lost so many times. All events that have come, in order."""
    loop, content = asyncio.get_running_loop(), b""
    request = message(urlsplit(url + kind.path), kind.accept, kind.body)
    for _ in range(times):
        async with connected(url) as client:
            await loop.sock_sendall(client, request)
            content += _whole_events(await read_until(client, b"\nid: "))
        last = content.rpartition(b"\nid: ")[2].partition(b"\n")[0].decode()
        headers = f"Host: localhost\r\nConnection: close\r\nLast-Event-ID: {last}\r\n"
        request = f"GET /stream HTTP/1.1\r\n{headers}\r\n".encode()
    async with connected(url) as client:
        await loop.sock_sendall(client, request)
        return content + _whole_events(await read_until(client, b"\r\n0\r\n\r\n"))


def _whole_events(answer: bytes) -> bytes:
    """The events that have come whole: each is a chunk of the answer, or several are."""
    _, _, rest = answer.partition(b"\r\n\r\n")
    content = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length or len(rest) < length:
            break
        content, rest = content + rest[:length], rest[length + 2 :]
    return content


async def post(url: str, fields: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer to POST /generate."""
    content = bytearray()
    status = await http.request(url + "/generate", JSON, fields, on_piece=content.extend)
    return status, json.loads(content)
