"""`POST /generate`, `GET /generate` and `GET /stream`: images from noise."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import Field

from service.http import caching
from service.http.answers import EVENTS, JSON
from service.http.forms import body_schema, read_body
from service.http.middleware import LimitedRoute
from service.http.negotiation import negotiate, negotiate_picture
from service.http.openapi import CACHED_PICTURE, EVENT_STREAM, OUTCOMES
from service.http.respond import answer, resume
from service.http.state import app_state
from service.tasks.generate import GenerateRequest, StreamQuery, prepare_generate

router = APIRouter(tags=["generate"], route_class=LimitedRoute)
query_router = APIRouter(tags=["generate"])


class EventsQuery(StreamQuery):
    """And what polyfills of EventSource add, where a browser lets them set no header."""

    last_event_id: str | None = Field(
        None, alias="lastEventId", description="as the header `Last-Event-ID` (event-source-polyfill)"
    )
    evs_last_event_id: str | None = Field(
        None, description="as the header `Last-Event-ID` (eventsource-polyfill)"
    )
    evs_preamble: str | None = Field(
        None, description="ignored: bytes that Internet Explorer wanted first (eventsource-polyfill)"
    )


EXAMPLES = {
    "an image of a class": {"class_label": 0, "seed": 7},
    "four images in 50 steps": {"n": 4, "sampler": "ddpm", "num_inference_steps": 50},
}


@router.post("/generate", responses=OUTCOMES, openapi_extra=body_schema(GenerateRequest, EXAMPLES))
async def generate(request: Request) -> Response:
    """Generate images. `Accept` chooses JSON with base64 (default), the picture itself, or events."""
    media_type = negotiate(request)
    body = await read_body(request, GenerateRequest)
    return await answer(media_type, prepare_generate(body, app_state(request).capabilities), request)


@query_router.get("/generate", response_class=Response, responses=CACHED_PICTURE)
@query_router.head("/generate", include_in_schema=False)
async def picture(query: Annotated[StreamQuery, Query()], request: Request) -> Response:
    """Generate a picture. With a `seed` it is always the same: caches may keep it, and HEAD computes nothing.

    A PNG, or a picture of the `output_format`; JSON or events where `Accept` has nothing else.
    """
    state = app_state(request)
    media_type = negotiate_picture(request, query.output_format or "png")
    prepared = prepare_generate(query, state.capabilities)
    headers = caching.NOT_STORED
    if query.seed is not None and media_type not in (JSON, EVENTS):
        assert state.engine.info is not None  # it comes with the capabilities
        tag = caching.entity_tag(prepared, media_type, state.capabilities, state.engine.info)
        headers = caching.kept(tag, private=bool(state.settings.api_keys))
        if caching.matches(", ".join(request.headers.getlist("if-none-match")), tag):
            return Response(status_code=304, headers={**headers, "Vary": "Accept"})
    if request.method == "HEAD":
        response = Response(media_type=media_type, headers={"Vary": "Accept"})
        del response.headers["content-length"]  # nobody knows it yet
    else:
        response = await answer(media_type, prepared, request)
    response.headers.update(headers)
    return response


@query_router.get("/stream", response_class=Response, responses=EVENT_STREAM)
async def stream(
    query: Annotated[EventsQuery, Query()],
    request: Request,
    last_event_id: Annotated[
        str | None, Header(description="the `id` of the last event received: continue after it")
    ] = None,
) -> Response:
    """Watch images being generated. A reconnect with `Last-Event-ID` continues its job and starts no other.

    That holds for the event streams of every route.
    """
    last = last_event_id
    if last is None:
        last = query.last_event_id or query.evs_last_event_id or None  # an empty field says nothing
    if last is not None:
        return resume(last, app_state(request))
    return await answer(EVENTS, prepare_generate(query, app_state(request).capabilities), request)
