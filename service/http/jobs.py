"""Jobs that go on without a client (`Prefer: respond-async`), and their results, for a while.

Such a job's stream is held (service/engine/streams.py): it has the last event, which is the result, and the
presenter, which turns it into any answer. A result goes when its time is over, when newer ones need its room,
or when a client deletes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from msgspec import structs

from service.engine.client import EngineClient
from service.engine.messages import Finished, Located, Terminal
from service.engine.streams import Stream, Streams
from service.errors import JobNotFoundError, ServiceError
from service.http.answers import EventPresenter, StreamPresenter
from service.tasks.sampling import PreparedRequest
from service.tasks.score import PreparedScore

OVERHEAD, PER_MEASUREMENT = 4096, 200
"""Bytes that are counted of a result beside its pixels, so that there is an end to those without any."""


@dataclass(frozen=True)
class _Result:
    size: int
    removal: asyncio.TimerHandle


class Jobs:
    """The jobs that go on without a client. ttl_s, max_bytes: how long, and how much, results are kept."""

    def __init__(
        self,
        engine: EngineClient,
        streams: Streams[StreamPresenter | None],
        *,
        ttl_s: float,
        max_bytes: int,
    ) -> None:
        self._engine, self._streams = engine, streams
        self._ttl_s, self._max_bytes = ttl_s, max_bytes
        self._running: dict[str, tuple[EventPresenter, int]] = {}  # with the size of its result
        self._results: dict[str, _Result] = {}  # the oldest first
        self._bytes = 0

    def start(self, presenter: EventPresenter, shape: tuple[int, int, int]) -> bool:
        """Run the job of a presenter and keep its result; False if that would be too large. shape: (C, H, W).

        Raises a RefusedError, and keeps nothing then.
        """
        spec, size = presenter.prepared.spec, size_of(presenter.prepared, shape)
        if size > self._max_bytes:
            return False
        self._streams.hold(spec.id, presenter, self._ended)
        self._running[spec.id] = presenter, size
        try:
            self._engine.submit(spec)
        except ServiceError:
            del self._running[spec.id]
            self._streams.let_go(spec.id)
            raise
        return True

    def find(self, job_id: str) -> Stream[StreamPresenter | None] | None:
        """The stream of a job that goes on without a client, or has ended; None for any other."""
        known = job_id in self._running or job_id in self._results
        return self._streams.find(job_id) if known else None

    def delete(self, job_id: str) -> None:
        """Cancel any job in flight, or forget a result. Raises JobNotFoundError where there is neither."""
        if job_id in self._results:
            self._forget(job_id)
        elif self._engine.has(job_id):
            self._engine.cancel(job_id)
        else:
            raise not_found()

    def _ended(self, event: Terminal) -> Terminal:
        """Keep what a job has ended with, and nothing that was needed to run it."""
        presenter, size = self._running.pop(event.job_id)
        spec = presenter.prepared.spec
        presenter.prepared = replace(presenter.prepared, spec=replace(spec, stages=()))
        removal = asyncio.get_running_loop().call_later(self._ttl_s, self._forget, event.job_id)
        result = _Result(size if isinstance(event, Finished) else OVERHEAD, removal)
        self._results[event.job_id] = result
        self._bytes += result.size
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._results)))
        if not isinstance(event, Finished):
            return event
        # As it has come, a picture is part of a report with those of other jobs.
        own = [structs.replace(picture, pixels=picture.pixels.copy()) for picture in event.pictures]
        return structs.replace(event, pictures=tuple(own))

    def _forget(self, job_id: str) -> None:
        result = self._results.pop(job_id)
        result.removal.cancel()
        self._bytes -= result.size
        self._streams.let_go(job_id)


def state_body(place: Located) -> dict[str, Any]:
    """How far a job in flight is, as JSON."""
    return {
        "id": place.job_id,
        "state": "running" if place.running else "waiting",
        "position": None if place.running else place.position,
        "eta_s": None if place.eta_s is None else round(place.eta_s, 3),
        "progress": round(place.progress, 4),
    }


def not_found() -> JobNotFoundError:
    """What is said of a job that is not there."""
    return JobNotFoundError("There is no such job, or its result is no longer kept.")


def size_of(prepared: PreparedRequest, shape: tuple[int, int, int]) -> int:
    """Bytes that the result of a job takes. shape: (C, H, W) of its pictures."""
    stage = prepared.spec.stages[-1]
    size = OVERHEAD + len(stage.chains) * prod(shape)
    if isinstance(prepared, PreparedScore):
        size += PER_MEASUREMENT * stage.evaluations + sum(pixels.nbytes for pixels in prepared.pixels)
    return size
