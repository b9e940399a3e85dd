"""Run a prepared request and answer it: at once when it is finished, or event by event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import TypeVar

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from service.engine.jobs import JobSpec
from service.engine.messages import Cancelled, Failed, Finished, Preview, Terminal
from service.engine.streams import SequencedEvent, Subscription
from service.errors import CancelledError
from service.http.answers import (
    EVENTS,
    JSON,
    EventPresenter,
    JsonPresenter,
    PicturePresenter,
    Presenter,
)
from service.http.problems import Problem
from service.http.state import AppState
from service.tasks.sampling import PreparedRequest

PING_S = 15.0
PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}
REFUSALS = {
    status: {**PROBLEM, "description": text}
    for status, text in (
        (406, "The Accept header names none of our media types"),
        (422, "Invalid request"),
        (429, "Queue full; Retry-After says when to try again"),
        (503, "Loading, draining or failed; Retry-After says when to try again"),
        (504, "The deadline has passed or cannot be met"),
    )
}
Result = TypeVar("Result")


async def answer(media_type: str, prepared: PreparedRequest, request: Request, state: AppState) -> Response:
    """Run a job and answer as `negotiate` chose. Raises the error of a job that does not finish."""
    model = state.capabilities.name
    if media_type == EVENTS:
        return EventStream(EventPresenter(prepared, model), state, prepared.spec)
    presenter: Presenter = (
        JsonPresenter(prepared, model)
        if media_type == JSON
        else PicturePresenter(prepared, model, media_type)
    )
    spec = replace(prepared.spec, preview="none")
    async with state.streams.subscribe(spec.id, None) as events:
        state.engine.submit(spec)
        last = await wait_or_disconnect(request, events.last())
    return await presenter.respond(finished(last))


class EventStream(EventSourceResponse):
    """A job's events while it runs.

    Subscription and admission come before the answer begins, so that a refusal is a status and not a broken
    200, and end with it, so that nothing is left behind should the client be gone before the first event.
    """

    def __init__(self, presenter: EventPresenter, state: AppState, spec: JobSpec | None = None) -> None:
        """spec: a job to submit; None continues the one that the presenter is of."""
        super().__init__(
            self._chunks(),
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"},
        )
        self._presenter, self._state, self._spec = presenter, state, spec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises the refusal of a job that is not accepted."""
        state, job_id = self._state, self._presenter.prepared.spec.id
        if self._spec is None and state.streams.find(job_id) is None:
            await Response(status_code=204)(scope, receive, send)  # its grace period has ended just now
            return
        async with state.streams.subscribe(job_id, self._presenter, state.settings.stream_grace_s) as events:
            self._events: Subscription[EventPresenter | None] = events
            self._first: SequencedEvent | None = None
            if self._spec is not None:
                state.engine.submit(self._spec)
                self._first = await wait_or_disconnect(Request(scope, receive), events.first())
                if isinstance(self._first.event, Terminal):
                    finished(self._first.event)
            await super().__call__(scope, receive, send)

    async def _chunks(self) -> AsyncIterator[bytes]:
        """The events as bytes, with a ping where nothing happens for a while."""
        begun, previewed = time.monotonic(), False
        if self._first is not None:
            yield await self._presenter.chunk(self._first)
        async for item in self._events.with_idle(PING_S):
            if item is None:
                yield b": ping\n\n"
                continue
            if isinstance(item.event, Preview) and not previewed:
                previewed = True
                self._state.telemetry.first_preview.observe(time.monotonic() - begun)
            yield await self._presenter.chunk(item)


def resume(last_event_id: str, state: AppState) -> Response:
    """Continue a job's stream; 204, which tells an EventSource to stop, once there is nothing left."""
    job_id, _, number = last_event_id.rpartition(":")
    found = state.streams.find(job_id)
    known = number.isdecimal() and len(number) < 10  # int() refuses thousands of digits
    if found is None or found.context is None or not known or found.delivered(int(number)):
        return Response(status_code=204)
    return EventStream(found.context, state)


async def wait_or_disconnect(request: Request, answer: Awaitable[Result]) -> Result:
    """Wait for the answer, but no longer than the client does. Raises CancelledError when it disconnects."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CancelledError("The client disconnected.")
    finally:
        working.cancel()
        leaving.cancel()


def finished(event: Terminal) -> Finished:
    """The event of a finished job. Raises the error of one that did not finish."""
    match event:
        case Finished():
            return event
        case Failed(_, error):
            raise error
        case Cancelled():
            raise CancelledError("The job was cancelled.")
