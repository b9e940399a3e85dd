"""`POST /generate` and `GET /stream`: images from noise."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from service.routes import InHouse
from service.routes.answers import EVENTS, REFUSALS, admit, answer, choose_form, event_response, resume
from service.schemas import GenerateRequest, StreamQuery, to_job

router = APIRouter(tags=["generate"])


@router.post("/generate", responses=REFUSALS)  # type: ignore[arg-type]  # FastAPI types the keys int | str
async def generate(body: GenerateRequest, request: Request, house: InHouse) -> Response:
    """Generate images. `Accept` chooses JSON with base64 (default), the picture itself, or events."""
    form = choose_form(request)
    return await answer(to_job(body, house.catalogue, streamed=form == EVENTS), form, request, house)


@router.get("/stream", response_class=Response, responses=REFUSALS)  # type: ignore[arg-type]
async def stream(
    query: Annotated[StreamQuery, Query()],
    house: InHouse,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Watch images being made. A reconnect with `Last-Event-ID` goes back to its job and starts nothing.

    That holds for the events of every route that gives some.
    """
    if last_event_id is not None:
        return resume(last_event_id, house)
    order = to_job(query, house.catalogue, streamed=True)
    found, queued = await admit(order, house)
    return event_response(found, order, house, queued)
