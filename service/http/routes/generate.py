"""`POST /generate` and `GET /stream`: images from noise."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from service.http.answers import EVENTS
from service.http.forms import body_schema, read_body
from service.http.middleware import LimitedRoute
from service.http.negotiation import negotiate
from service.http.respond import REFUSALS, answer, resume
from service.http.state import app_state
from service.tasks.generate import GenerateRequest, StreamQuery, prepare_generate

router = APIRouter(tags=["generate"], route_class=LimitedRoute)
stream_router = APIRouter(tags=["generate"])

EXAMPLES = {
    "an image of a class": {"class_label": 0, "seed": 7},
    "four images in 50 steps": {"n": 4, "sampler": "ddpm", "num_inference_steps": 50},
}


@router.post("/generate", responses=REFUSALS, openapi_extra=body_schema(GenerateRequest, EXAMPLES))  # type: ignore[arg-type]
async def generate(request: Request) -> Response:
    """Generate images. `Accept` chooses JSON with base64 (default), the picture itself, or events."""
    media_type = negotiate(request)
    body = await read_body(request, GenerateRequest)
    return await answer(media_type, prepare_generate(body, app_state(request).capabilities), request)


@stream_router.get("/stream", response_class=Response, responses=REFUSALS)  # type: ignore[arg-type]
async def stream(
    query: Annotated[StreamQuery, Query()],
    request: Request,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Watch images being generated. A reconnect with `Last-Event-ID` continues its job and starts no other.

    That holds for the event streams of every route.
    """
    if last_event_id is not None:
        return resume(last_event_id, app_state(request))
    return await answer(EVENTS, prepare_generate(query, app_state(request).capabilities), request)
