"""One presenter per wire format: JSON, a picture, server-sent events. Each turns results into bytes.

Another wire format is another presenter with routes of its own; it shares a job's results with these and
nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
from fastapi import Response

from service.engine.messages import Cancelled, Event, Failed, Finished, Picture, Preview, Queued
from service.engine.streams import SequencedEvent
from service.errors import CancelledError
from service.http.bodies import bodies_of, queued_body
from service.http.event_ids import EventIds
from service.http.problems import to_problem
from service.tasks.images import MEDIA_TYPES, ImageFormat
from service.tasks.sampling import PreparedRequest

JSON = "application/json"
EVENTS = "text/event-stream"
INLINE_VALUES: dict[ImageFormat, int] = {"png": 16_000, "jpeg": 4_000, "webp": 1_000, "npy": 250_000}
"""Of pixels: so many are encoded in about a millisecond, and sooner than another thread is woken twice."""


class Presenter(Protocol):
    """Answers a request once its job is finished."""

    async def respond(self, result: Finished) -> Response:
        """The answer."""


class StreamPresenter(Protocol):
    """Turns a job's events into a stream of bytes, also for a client that comes back to it."""

    @property
    def prepared(self) -> PreparedRequest:
        """The request whose job it is."""

    async def chunk(self, item: SequencedEvent) -> bytes:
        """One event as it is sent."""


class JsonPresenter:
    """Everything about the results as one JSON object, pictures in base64."""

    def __init__(self, prepared: PreparedRequest, model: str) -> None:
        self.prepared, self.model = prepared, model

    async def respond(self, result: Finished) -> Response:
        """`application/json`."""
        bodies = bodies_of(self.prepared)

        def body() -> bytes:
            return msgspec.json.encode(bodies.completed(result, self.model))

        work, image_format = bool(result.measurements), self.prepared.output_format
        content = await encoded(body, result.pictures, image_format, self.prepared.scale, work=work)
        return Response(content, media_type=JSON, headers=_headers(result))


class PicturePresenter:
    """The results as one picture, with its parameters inside."""

    def __init__(self, prepared: PreparedRequest, model: str, media_type: str) -> None:
        self.prepared, self.model, self.media_type = prepared, model, media_type

    async def respond(self, result: Finished) -> Response:
        """PNG, JPEG or WebP: the image, or a contact sheet of several. Or all of them as one array."""
        image_format = next(name for name, known in MEDIA_TYPES.items() if known == self.media_type)
        bodies, scale = bodies_of(self.prepared), self.prepared.scale

        def picture() -> bytes:
            return bodies.tiles(result).encode(image_format, scale, self.model)

        work = bool(result.measurements)
        content = await encoded(picture, result.pictures, image_format, scale, work=work)
        return Response(content, media_type=self.media_type, headers=_headers(result))


class EventPresenter:
    """A job's events as server-sent events: `queued`, `preview` …, then `completed` or `error`."""

    def __init__(self, prepared: PreparedRequest, model: str, ids: EventIds | None = None) -> None:
        """ids: absent, they are not signed."""
        self.prepared, self.model = prepared, model
        self._ids = (ids or EventIds()).of(prepared)

    async def chunk(self, item: SequencedEvent) -> bytes:
        """One event with its id."""
        event, prepared = item.event, self.prepared
        pictures = event.pictures if isinstance(event, Preview | Finished) else ()
        work = isinstance(event, Finished) and bool(event.measurements)
        return await encoded(
            lambda: self._chunk(item), pictures, prepared.output_format, prepared.scale, work=work
        )

    def _chunk(self, item: SequencedEvent) -> bytes:
        name, data = self._named(item)
        identity = self._ids.at(item.number, step_of(item.event))
        # JSON has no line breaks, so it is one `data` field.
        return b"event: %b\ndata: %b\nid: %b\n\n" % (
            name.encode(),
            msgspec.json.encode(data),
            identity.encode(),
        )

    def _named(self, item: SequencedEvent) -> tuple[str, dict[str, Any]]:
        match item.event:
            case Queued():
                return "queued", queued_body(item.event, self.prepared)
            case Preview():
                return "preview", bodies_of(self.prepared).preview(item.event)
            case Finished():
                return "completed", bodies_of(self.prepared).completed(item.event, self.model)
            case Failed(_, error):
                return "error", to_problem(error).model_dump(exclude_none=True)
            case Cancelled():
                cancelled = CancelledError("The job was cancelled.")
                return "error", to_problem(cancelled).model_dump(exclude_none=True)


def step_of(event: Event) -> int | None:
    """The step that an event is of; None for the last event."""
    match event:
        case Queued():
            return 0
        case Preview():
            return event.step
        case _:
            return None


async def encoded(
    make: Callable[[], bytes],
    pictures: Sequence[Picture],
    image_format: ImageFormat,
    scale: int,
    *,
    work: bool = False,
) -> bytes:
    """Bytes made inline if that is quick, else in a thread, so that other connections are not held up.

    work: there is more to do than to encode these pictures.
    """
    values = sum(picture.pixels.size for picture in pictures) * scale**2
    inline = values <= INLINE_VALUES[image_format] and not work
    return make() if inline else await asyncio.to_thread(make)


def _headers(result: Finished) -> dict[str, str]:
    return {"Vary": "Accept", "X-Job-ID": result.job_id}
