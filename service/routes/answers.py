"""One job, answered as JSON, as a picture, or as events while it runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, format_sse_event

from service.errors import CancelledError, NotAcceptableError
from service.events import Cancelled, Event, Failed, Finished, Preview, Queued, Terminal
from service.images import MEDIA_TYPES, encode
from service.routes import House
from service.schemas import Order, Problem, queued_body
from service.streams import Numbered, Stream

EVENTS = "text/event-stream"
ANSWERS = ("application/json", *MEDIA_TYPES.values(), EVENTS)
PING_S = 15.0
INLINE_VALUES = 10_000
"""Of pixels: as many are encoded sooner than another thread is woken twice, in less than a millisecond."""
PROBLEM = {"model": Problem, "content": {"application/problem+json": {}}}
REFUSALS = {
    status: {**PROBLEM, "description": text}
    for status, text in (
        (406, "No answer in a form the Accept header takes"),
        (422, "Invalid request"),
        (429, "Queue full; Retry-After says when to come back"),
        (503, "Loading, draining or dead; Retry-After says when to come back"),
        (504, "The deadline passed or cannot be met"),
    )
}
Result = TypeVar("Result")


def choose_form(request: Request) -> str:
    """The media type of a request's answer. Raises NotAcceptableError when there is none it takes."""
    return choose_answer(", ".join(request.headers.getlist("accept")))


async def answer(order: Order, form: str, request: Request, house: House) -> Response:
    """Run an order and answer in the form that `choose_form` gave. Raises whatever keeps it from the end."""
    stream, queued = await admit(order, house)
    if form == EVENTS:
        return event_response(stream, order, house, queued)
    reader = stream.attach()
    try:
        finished = await unless_gone(request, stream.last(reader))
    finally:
        house.streams.leave(stream, reader, grace_s=0)
    result = result_of(finished)
    headers = {"Vary": "Accept", "X-Job-ID": order.job.id}
    if form == "application/json":
        content = await drawn(result, _json_body, result, order, house)
        return Response(content, media_type=form, headers=headers)
    picture = await drawn(result, _sheet, result, order, house, form)
    return Response(picture, media_type=form, headers=headers)


def choose_answer(accept: str) -> str:
    """The answer's media type for an Accept header (RFC 9110, §12.5.1); any when it is empty.

    Raises NotAcceptableError when there is none.
    """
    best, quality = "", 0.0
    for offered in ANSWERS:  # in our order of preference
        found = max(_quality(part, offered) for part in (accept or "*/*").split(","))
        if found[1] > quality:
            best, quality = offered, found[1]
    if not best:
        raise NotAcceptableError(f"Answers come as {', '.join(ANSWERS)}.")
    return best


def _quality(part: str, offered: str) -> tuple[int, float]:
    """(how exactly, how much) one part of an Accept header wants a media type; more exact parts win."""
    pattern, *options = (piece.strip().lower() for piece in part.split(";"))
    exactness = {"*/*": 1, f"{offered.split('/')[0]}/*": 2, offered: 3}.get(pattern, 0)
    if not exactness:
        return 0, 0.0
    for option in options:
        if option.startswith("q="):
            try:
                return exactness, min(1.0, max(0.0, float(option[2:])))
            except ValueError:
                return exactness, 0.0
    return exactness, 1.0


async def admit(order: Order, house: House) -> tuple[Stream, Numbered]:
    """Hand the job to the worker; returns once it is in the queue. Raises the refusal otherwise.

    This happens before an answer begins, so that a refusal is a status and not a broken 200.
    """
    stream = house.streams.open(order.job.id, order)
    reader = stream.attach()
    try:
        house.worker.submit(order.job)
        first = await anext(aiter(stream.events(reader)))
        assert first is not None  # which only comes where a time was given
        if isinstance(first.event, Terminal):
            result_of(first.event)
    except BaseException:
        house.streams.leave(stream, reader, grace_s=0)
        raise
    return stream, first


def event_response(
    stream: Stream, order: Order, house: House, queued: Numbered | None = None
) -> EventSourceResponse:
    """The job's events from now on, those that `admit` gave first."""
    # On its way out from the start: should the client be gone before the generator runs, nobody else
    # would notice. The generator calls it off.
    reader = stream.attach()
    house.streams.leave(stream, reader, grace_s=max(house.streams.grace_s, 5.0))
    return EventSourceResponse(
        _chunks(stream, reader, order, house, queued),
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Vary": "Accept"},
    )


def resume(last_event_id: str, house: House) -> Response:
    """Go back to a job's stream; 204, which tells an EventSource to stop, once there is nothing left."""
    job_id, _, number = last_event_id.rpartition(":")
    found = house.streams.find(job_id)
    known = number.isdecimal() and len(number) < 10  # int() refuses thousands of digits
    if found is None or not known or found.delivered(int(number)):
        return Response(status_code=204)
    return event_response(found, found.tag, house)


async def _chunks(
    stream: Stream, reader: int, order: Order, house: House, queued: Numbered | None
) -> AsyncIterator[bytes]:
    """The stream's events as bytes, with a ping where nothing happens for a while."""
    house.streams.stay(stream, reader)
    begun, previewed = time.monotonic(), False
    try:
        if queued is not None:
            yield _chunk(queued, order, house)
        async for item in stream.events(reader, PING_S):
            if item is None:
                yield b": ping\n\n"
                continue
            if isinstance(item.event, Preview) and not previewed:
                previewed = True
                house.telemetry.first_preview.observe(time.monotonic() - begun)
            yield await drawn(item.event, _chunk, item, order, house)
    finally:
        house.streams.leave(stream, reader)


async def drawn(event: Event, make: Callable[..., bytes], *arguments: object) -> bytes:
    """Make an event's bytes. Many or large pictures take long enough to hold up every other connection."""
    pictures = event.pictures if isinstance(event, Preview | Finished) else ()
    measured = isinstance(event, Finished) and any(event.measures)  # hundreds of terms, to be added up
    if sum(picture.pixels.size for picture in pictures) <= INLINE_VALUES and not measured:
        return make(*arguments)
    return await asyncio.to_thread(make, *arguments)


def _chunk(item: Numbered, order: Order, house: House) -> bytes:
    match item.event:
        case Queued():
            name, data = "queued", queued_body(item.event, order)
        case Preview():
            name, data = "preview", order.preview(item.event)
        case Finished():
            name, data = "completed", order.finished(item.event, house.catalogue.name)
        case Failed():
            name, data = "error", house.to_problem(item.event.error).model_dump(exclude_none=True)
        case Cancelled():
            error = CancelledError("The job was cancelled.")
            name, data = "error", house.to_problem(error).model_dump(exclude_none=True)
    return format_sse_event(event=name, data_str=json.dumps(data), id=f"{order.job.id}:{item.number}")


async def unless_gone(request: Request, answer: Awaitable[Result]) -> Result:
    """Wait for the answer, but give up as soon as the client has gone. Raises CancelledError then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise CancelledError("The client has gone.")
    finally:
        working.cancel()
        leaving.cancel()


def result_of(event: Terminal) -> Finished:
    """The finished job. Raises its error when it did not finish."""
    match event:
        case Finished():
            return event
        case Failed():
            raise event.error
        case Cancelled():
            raise CancelledError("The job was cancelled.")


def _json_body(result: Finished, order: Order, house: House) -> bytes:
    return JSONResponse(order.finished(result, house.catalogue.name)).body  # type: ignore[return-value]


def _sheet(result: Finished, order: Order, house: House, media_type: str) -> bytes:
    image_format = next(name for name, known in MEDIA_TYPES.items() if known == media_type)
    sheet, told = order.sheet(result)
    return encode(sheet, image_format, {**told, "model": house.catalogue.name})
