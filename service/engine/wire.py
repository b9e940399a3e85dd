"""Messages as bytes, and the socket they cross between the API process and an engine.

A message is msgpack; its arrays follow it as they lie in memory, each once, and are not copied when it is
read. The socket is one of a pair made before the engine is started: it has no name that others could connect
to, and the end of either process is the end of the stream for the other, which a broker's sockets hide.
"""

from __future__ import annotations

import struct
from asyncio import IncompleteReadError, StreamReader
from collections import deque
from collections.abc import Sequence
from queue import Empty
from select import select
from socket import socket
from time import monotonic
from typing import Any, TypeVar

import msgspec
import numpy as np

from model.samplers import ROW
from service.engine.messages import Command, EngineConfig, Report
from service.errors import ServiceError, from_data, to_data

Frame = bytes | memoryview
Message = TypeVar("Message")
DTYPES = (np.dtype(np.float32), np.dtype(np.bool_), ROW, np.dtype(np.uint8), np.dtype(np.float64))
"""Of the arrays in messages; the header names them by their place here."""
COUNT = struct.Struct("<I")
LENGTH = struct.Struct("<Q")
READ = 1 << 20
"""Bytes that are read at once, at most."""
Inbound = EngineConfig | Command


def to_frames(message: object) -> list[Frame]:
    """A message as a header and the memory of its arrays, uncopied; an array that is shared goes once."""
    places: dict[int, int] = {}  # id of an array → its place among the frames
    arrays: list[np.ndarray[Any, Any]] = []

    def store(value: object) -> object:
        if isinstance(value, ServiceError):
            return to_data(value)
        if not isinstance(value, np.ndarray) or value.dtype not in DTYPES:
            raise NotImplementedError(f"{type(value).__name__} cannot be sent")
        if id(value) not in places:
            places[id(value)] = len(arrays)
            arrays.append(value)
        return places[id(value)], DTYPES.index(value.dtype), value.shape

    header = msgspec.msgpack.encode(message, enc_hook=store)
    return [header, *(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for array in arrays)]


def from_frames(frames: Sequence[Frame], kind: type[Message]) -> Message:
    """The message that `to_frames` was given. Its arrays are read-only views of the frames.

    Raises msgspec.MsgspecError or ValueError for frames that are no such message.
    """
    header, *buffers = frames
    arrays: dict[int, np.ndarray[Any, Any]] = {}

    def load(wanted: type, value: list[Any]) -> object:
        if isinstance(wanted, type) and issubclass(wanted, ServiceError):
            return from_data(*value)
        place, dtype, shape = value
        try:
            if place not in arrays:
                arrays[place] = np.frombuffer(buffers[place], DTYPES[dtype]).reshape(shape)
                arrays[place].flags.writeable = False
        except (IndexError, OverflowError) as error:  # msgspec wraps a ValueError, but none of these
            raise ValueError(f"no such array: {error}") from error
        return arrays[place]

    return msgspec.msgpack.decode(header, type=kind, dec_hook=load)


def to_bytes(message: object) -> bytes:
    """A message with the lengths of its frames, as it crosses the socket."""
    frames = to_frames(message)
    lengths = b"".join(LENGTH.pack(len(frame)) for frame in frames)
    return b"".join((COUNT.pack(len(frames)), lengths, *frames))


async def read_report(stream: StreamReader) -> Report | None:
    """The next report of an engine; None at its end."""
    try:
        (count,) = COUNT.unpack(await stream.readexactly(COUNT.size))
        lengths = await stream.readexactly(LENGTH.size * count)
        sizes = [size for (size,) in LENGTH.iter_unpack(lengths)]
        return from_frames(_cut(await stream.readexactly(sum(sizes)), sizes), Report)  # type: ignore[arg-type]
    except (IncompleteReadError, ConnectionError):
        return None


class Channel:
    """The engine's end of the connection, for its loop alone: no thread stands between the two.

    Like a queue it gives what has come. What the socket does not take at once is sent when it is used next.
    """

    def __init__(self, connection: socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._unread, self._unsent = bytearray(), bytearray()
        self._come: deque[Inbound] = deque()

    def get(self, timeout: float | None = None) -> Inbound:
        """The next message. Raises queue.Empty after so many seconds without, EOFError at the end."""
        give_up = None if timeout is None else monotonic() + timeout
        while not self._come:
            left = None if give_up is None else max(0.0, give_up - monotonic())
            readable, writable, _ = select([self._socket], [self._socket] if self._unsent else [], [], left)
            if writable:
                self._flush()
            if readable:
                self._read()
            elif not writable:
                raise Empty
        return self._come.popleft()

    def get_nowait(self) -> Inbound:
        """The next message, if it is there. Raises queue.Empty where it is not, EOFError at the end."""
        if not self._come:
            self._read()
        if not self._come:
            raise Empty
        return self._come.popleft()

    def send(self, report: Report) -> None:
        """Send a report, or as much of it as is taken at once."""
        self._unsent += to_bytes(report)
        self._flush()

    def close(self) -> None:
        """Send what is left. Waits for the API to read it."""
        self._socket.setblocking(True)
        self._socket.sendall(self._unsent)
        self._socket.close()

    def _flush(self) -> None:
        try:
            del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except ConnectionError as error:
            raise EOFError from error

    def _read(self) -> None:
        try:
            content = self._socket.recv(READ)
        except BlockingIOError:
            return
        except ConnectionError:
            content = b""
        if not content:
            raise EOFError
        self._unread += content
        while (frames := _whole(self._unread)) is not None:
            self._come.append(from_frames(frames, Inbound))  # type: ignore[arg-type]


def _whole(unread: bytearray) -> list[Frame] | None:
    """Take the frames of the first message out, if all of it has come."""
    if len(unread) < COUNT.size:
        return None
    (count,) = COUNT.unpack_from(unread)
    start = COUNT.size + LENGTH.size * count
    if len(unread) < start:
        return None
    sizes = [size for (size,) in LENGTH.iter_unpack(unread[COUNT.size : start])]
    end = start + sum(sizes)
    if len(unread) < end:
        return None
    content = bytes(memoryview(unread)[start:end])
    del unread[:end]
    return _cut(content, sizes)


def _cut(content: bytes, sizes: Sequence[int]) -> list[Frame]:
    ends = np.cumsum(sizes).tolist()
    view = memoryview(content)
    return [view[end - size : end] for size, end in zip(sizes, ends, strict=True)]
