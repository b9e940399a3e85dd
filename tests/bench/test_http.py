"""A client against bytes: answers of every form, in any pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from bench import http
from bench.http import Connection, message

LENGTH = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
EMPTY = b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n"
TO_THE_END = b"HTTP/1.0 200 OK\r\n\r\nhello"
CLOSING = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"


async def exchange(
    answers: Sequence[bytes], piece: int = 1 << 16, close: bool = False
) -> tuple[list[tuple[int, bytes]], int]:
    """(status, body) of each request, and how many connections they took."""
    left, opened, served = list(answers), 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        while head := await _head(reader):
            assert b'{"a": 1}' in head
            answer = left.pop(0)
            for start in range(0, len(answer), piece):
                writer.write(answer[start : start + piece])
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        served.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = urlsplit(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x")
        connection = await Connection.to(url)
        found = []
        for _ in answers:
            if not connection.open:
                connection = await Connection.to(url)
            pieces: list[bytes] = []
            heads: list[int] = []
            content = message(url, "*/*", {"a": 1}, keep=True)
            served.clear()
            try:
                status = await connection.request(content, heads.append, pieces.append)
            finally:
                if close or left == []:
                    connection.close()
                    await served.wait()
            assert heads == [status]
            found.append((status, b"".join(pieces)))
    return found, opened


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(len('{"a": 1}'))
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_a_connection_is_used_again(piece: int) -> None:
    found, opened = asyncio.run(exchange([LENGTH, CHUNKS, EMPTY, CHUNKS, LENGTH], piece))
    assert found == [(200, b"hello"), (200, b"hello"), (204, b""), (200, b"hello"), (200, b"hello")]
    assert opened == 1


def test_unless_the_server_says_that_it_closes_it() -> None:
    found, opened = asyncio.run(exchange([CLOSING, CLOSING]))
    assert found == [(200, b"hello")] * 2
    assert opened == 2


@pytest.mark.parametrize("piece", [1, 1 << 16])
def test_an_answer_may_last_until_the_connection_ends(piece: int) -> None:
    assert asyncio.run(exchange([TO_THE_END], piece, close=True))[0] == [(200, b"hello")]


@pytest.mark.parametrize("answer", [b"", LENGTH[:-2], CHUNKS[:-4], b"HTTP/1.1 200"])
def test_an_answer_that_is_cut_is_an_error(answer: bytes) -> None:
    with pytest.raises(ConnectionError, match="before the answer"):
        asyncio.run(exchange([answer], close=True))


def test_no_http_is_an_error() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        asyncio.run(exchange([b"HTTP/1.1 nonsense\r\n\r\n"]))


def test_a_client_without_an_answer_is_reported(faker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WARM_UP_S", 0.5)
    url = f"http://127.0.0.1:{faker.port}"  # it has no /generate
    with pytest.raises(RuntimeError, match="status 404"), http.kept_busy(url, "*/*", {}, 2):
        pass
