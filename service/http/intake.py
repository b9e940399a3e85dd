"""What comes in: the bytes of bodies that are held, and the threads that decode pictures."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from fastapi import Request

from service.errors import QueueFullError

RETRY_S = 2.0
"""In which a picture or two are decoded, and a body has come."""
THREADS = min(4, os.cpu_count() or 1)
"""That decode pictures: one of 16 megapixels takes a second, and a few hundred MiB."""
WAITING = 32
"""Bodies that wait for one of them."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Bodies:
    """The bytes of all bodies that are being read or waiting to be decoded, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0


@dataclass
class Intake:
    """What is known of a request since its head has come, and what is held of its body."""

    bodies: Bodies
    arrived: float = field(default_factory=time.monotonic)
    held: int = 0

    def take(self, size: int) -> None:
        """Hold so many bytes more. Raises QueueFullError where all requests together hold too much."""
        if self.bodies.held + size > self.bodies.limit:
            limit = self.bodies.limit
            raise QueueFullError(f"Bodies of other requests take {limit} bytes already.", RETRY_S)
        self.bodies.held += size
        self.held += size

    def release(self) -> None:
        """Hold nothing any more; this may be done several times."""
        self.bodies.held -= self.held
        self.held = 0


def intake_of(request: Request) -> Intake:
    """The one of a request to a LimitedRoute (middleware.py)."""
    found: Intake = request.scope["ddpm.intake"]
    return found


def release_body(request: Request) -> None:
    """Say that nothing of a request's body is kept any more."""
    if "ddpm.intake" in request.scope:  # a GET holds none
        intake_of(request).release()


class Decoders:
    """A few threads, and a queue with an end before them.

    Those of a ThreadPoolExecutor are waited for before a process ends, whatever it is that they do; these end
    with it.
    """

    def __init__(self, threads: int = THREADS, waiting: int = WAITING) -> None:
        self._threads, self._most = threads, waiting
        self._started = False
        self._queue: SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = SimpleQueue()

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """What the function returns or raises; raises QueueFullError where too many wait already.

        A call that is cancelled before its turn is not made.
        """
        if self._queue.qsize() >= self._most:
            raise QueueFullError(f"{self._most} uploads wait to be decoded.", RETRY_S)
        if not self._started:
            self._started = True
            for _ in range(self._threads):
                threading.Thread(target=self._work, name="decoder", daemon=True).start()
        future: Future[Result] = Future()
        self._queue.put((future, partial(function, *args, **kwargs)))  # type: ignore[arg-type]
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the threads, each after what it is at."""
        if self._started:
            for _ in range(self._threads):
                self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # noqa: BLE001 (it is the caller's)
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del item, future, call  # or the last picture would be kept until the next
