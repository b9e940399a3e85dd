"""Run a prepared request and answer it: at once when it is finished, or event by event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from typing import Protocol, Self, TypeVar

import msgspec
from fastapi import Request, Response
from starlette.types import Message, Receive, Scope, Send

from service.engine.jobs import JobSpec
from service.engine.messages import Cancelled, Failed, Finished, Located, Preview, Terminal
from service.engine.streams import Position, SequencedEvent, Subscription
from service.errors import CancelledError, DeadlineError
from service.http.answers import (
    EVENTS,
    JSON,
    EventPresenter,
    JsonPresenter,
    PicturePresenter,
    Presenter,
    StreamPresenter,
)
from service.http.event_ids import parse
from service.http.intake import intake_of, release_body
from service.http.jobs import state_body
from service.http.state import AppState, app_state
from service.tasks.sampling import ModelCapabilities, PreparedRequest
from service.telemetry import owner

PING_S = 15.0
Body = TypeVar("Body")
UNBUFFERED = "no-cache, no-transform"
"""Of streams: proxies and development servers that compress answers would hold events back meanwhile."""


class Dated(Protocol):
    """What holds a job whose time counts from an arrival."""

    def since(self, arrived: float) -> Self:
        """The same, with its times counted from then."""


Prepared = TypeVar("Prepared", bound=Dated)


async def decoded(
    prepare: Callable[[Body, ModelCapabilities], Prepared], body: Body, request: Request
) -> Prepared:
    """What a task makes of a body with pictures, by the threads that decode them.

    The time that a request has counts from the arrival of its head. Nothing is decoded for a client that has
    gone, nor while a job would be refused. Raises the task's errors, RefusedError, DeadlineError and, where
    the client disconnects, CancelledError.
    """
    state, intake = app_state(request), intake_of(request)
    state.engine.check_room()
    most = state.capabilities.deadline_s
    allowed = min(getattr(body, "deadline_s", None) or most, most)
    in_time = asyncio.timeout(intake.arrived + allowed - time.monotonic())
    try:
        async with while_connected(request.receive), in_time:
            prepared = await state.decoders.run(prepare, body, state.capabilities)
    except TimeoutError:
        if not in_time.expired():
            raise
        raise DeadlineError("The deadline has passed before the pictures were decoded.") from None
    return prepared.since(intake.arrived)


async def answer(media_type: str, prepared: PreparedRequest, request: Request) -> Response:
    """Run a job and answer as `negotiate` chose, or at once where that is preferred and there is room.

    Raises the error of a job that does not finish.
    """
    state = app_state(request)
    release_body(request)  # the pictures are decoded, and their files are gone
    model = state.capabilities.name
    events = EventPresenter(prepared, model, state.event_ids)
    if wants_async(request) and state.jobs.start(events, state.capabilities.shape):
        return accepted(prepared.spec.id, request)
    if media_type == EVENTS:
        return EventStream(events, state, prepared.spec)
    presenter = presenter_of(media_type, prepared, model)
    return await presenter.respond(await result_of(prepared, request))


def presenter_of(media_type: str, prepared: PreparedRequest, model: str) -> Presenter:
    """What answers with a finished job in a form that is no stream."""
    if media_type == JSON:
        return JsonPresenter(prepared, model)
    return PicturePresenter(prepared, model, media_type)


def wants_async(request: Request) -> bool:
    """Whether a POST prefers to be answered before its job is done (RFC 7240, §4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    asked = any(each.partition(";")[0].strip() == "respond-async" for each in preferences)
    return asked and request.method == "POST"


def accepted(job_id: str, request: Request) -> Response:
    """The answer to a job that goes on by itself: where to ask for it."""
    headers = {
        "Location": f"{request.scope.get('root_path', '')}/jobs/{job_id}",
        "Preference-Applied": "respond-async",
        "Vary": "Accept, Prefer",
        "X-Job-ID": job_id,
    }
    return Response(msgspec.json.encode(state_body(Located(job_id))), 202, headers, JSON)


async def result_of(prepared: PreparedRequest, request: Request) -> Finished:
    """Run a job to its end, without previews. Raises the error of one that does not finish.

    A client that disconnects cancels it.
    """
    state, spec = app_state(request), replace(prepared.spec, preview="none")
    async with state.streams.subscribe(spec.id, None) as events, while_connected(request.receive):
        state.engine.submit(spec)
        last = await events.last()
    return finished(last)


class EventStream(Response):
    """A job's events while it runs.

    Subscription and admission come before the answer begins, so that a refusal is a status and not a broken
    200, and end with it, so that nothing is left behind should the client be gone before the first event.
    """

    media_type = EVENTS

    def __init__(
        self,
        presenter: StreamPresenter,
        state: AppState,
        spec: JobSpec | None = None,
        after: Position | None = None,
    ) -> None:
        """spec: a job to submit; None continues the one that the presenter is of.

        after: of a job that is computed again, what its reader has seen of it.
        """
        self.status_code, self.background = 200, None
        headers = {"Cache-Control": UNBUFFERED, "X-Accel-Buffering": "no", "Vary": "Accept"}
        self.init_headers({**headers, "X-Job-ID": presenter.prepared.spec.id})
        self._presenter, self._state, self._spec, self._after = presenter, state, spec, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises the refusal of a job that is not accepted."""
        state, job_id = self._state, self._presenter.prepared.spec.id
        if self._spec is None and state.streams.find(job_id) is None:
            await Response(status_code=204)(scope, receive, send)  # its grace period has ended just now
            return
        # A reader that comes back takes over from one that may not have been missed yet.
        counted = nullcontext() if self._spec is None else state.open_stream(owner.get())
        with counted:
            await self._run(job_id, receive, send)

    async def _run(self, job_id: str, receive: Receive, send: Send) -> None:
        state, begun, grace_s = self._state, False, self._state.settings.stream_grace_s
        async with state.streams.subscribe(job_id, self._presenter, grace_s, self._after) as events:
            try:
                async with while_connected(receive):
                    first = await self._submit(events)
                    begun = True
                    await self._send(events, first, send)
            except CancelledError:
                if not begun:  # later the client may come back
                    raise

    async def _submit(self, events: Subscription[StreamPresenter | None]) -> list[SequencedEvent]:
        if self._spec is None:
            return []
        self._state.engine.submit(self._spec)
        if self._after is not None:  # it was told the first one
            return []
        first = await events.first()
        if isinstance(first.event, Terminal):
            finished(first.event)
        return [first]

    async def _send(
        self, events: Subscription[StreamPresenter | None], first: list[SequencedEvent], send: Send
    ) -> None:
        """The events as they come, those that have come together at once; a ping where there are none."""
        started, previewed = time.monotonic(), False
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if first:
            await send(_body(await self._chunk(first)))
        async for batch in events.batches(PING_S):
            if not previewed and any(isinstance(item.event, Preview) for item in batch):
                previewed = True
                self._state.telemetry.first_preview.observe(time.monotonic() - started)
            over = bool(batch) and isinstance(batch[-1].event, Terminal)
            await send(_body(await self._chunk(batch) or b": ping\n\n", more=not over))
            if over:
                return
        await send(_body(b"", more=False))  # another reader took over

    async def _chunk(self, items: list[SequencedEvent]) -> bytes:
        return b"".join([await self._presenter.chunk(item) for item in items])


def _body(content: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def resume(last_event_id: str, state: AppState) -> Response:
    """Continue a job's stream; 204, which tells an EventSource to stop, once there is nothing left.

    A job that is not known here is computed again, if its id is signed: it began elsewhere.
    """
    job_id, number = parse(last_event_id) or ("", 0)
    found = state.streams.find(job_id)
    if found is not None:
        if found.context is None or found.delivered(number):
            return Response(status_code=204)
        return EventStream(found.context, state)
    ids = state.event_ids
    again = ids.continued(last_event_id, state.capabilities) if ids.secret is not None else None
    if again is None:
        return Response(status_code=204)
    prepared, after = again
    presenter = EventPresenter(prepared, state.capabilities.name, ids)
    return EventStream(presenter, state, prepared.spec, after)


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """End the body when the client disconnects. Raises CancelledError then."""
    here = asyncio.current_task()
    assert here is not None

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        here.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # The watch runs only while the body waits, so this is where its cancellation arrives.
        if watching.done() and not watching.cancelled() and here.uncancel() == 0:
            raise CancelledError("The client disconnected.") from None
        raise
    finally:
        watching.cancel()


def finished(event: Terminal) -> Finished:
    """The event of a finished job. Raises the error of one that did not finish."""
    match event:
        case Finished():
            return event
        case Failed(_, error):
            raise error
        case Cancelled():
            raise CancelledError("The job was cancelled.")
