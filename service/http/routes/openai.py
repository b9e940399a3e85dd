"""OpenAI's Images API: `/v1/images/generations`, `/v1/images/edits`, and `/v1/models`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request, Response

from service.http.forms import HALVES, body_schema, read_body
from service.http.middleware import LimitedRoute, UploadRoute
from service.http.openai import ImagesEventPresenter, ImagesPresenter, OpenAIError
from service.http.respond import EventStream, result_of
from service.http.state import AppState, app_state
from service.tasks.openai import ImageEditRequest, ImageGenerationRequest, ImagesRequest, prepare_images

STARTED = int(time.time())
"""Of this process: when its model was made is not known."""

generations = APIRouter(tags=["openai"], route_class=LimitedRoute)
edits = APIRouter(tags=["openai"], route_class=UploadRoute)
router = APIRouter(tags=["openai"])

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIError, "description": text}
    for status, text in (
        (400, "Invalid request"),
        (401, "No API key, or an unknown one, where the service has keys"),
        (413, "The body is too large"),
        (429, "Queue full; Retry-After says when to try again"),
        (500, "The job failed, alone, or there is a bug"),
        (503, "Loading, draining or failed; Retry-After says when to try again"),
        (504, "The deadline has passed or cannot be met; not to be tried again"),
    )
}
GENERATIONS = {
    "an image of a class": {"prompt": "an ankle boot", "size": "256x256", "seed": 7},
    "a stream with three x₀ predictions": {"prompt": "a bag", "stream": True, "partial_images": 3},
}
EDITS = {"image to image": {"prompt": "a sneaker", "image": HALVES, "strength": 0.7}}


@generations.post(
    "/v1/images/generations",
    responses=REFUSALS,
    openapi_extra=body_schema(ImageGenerationRequest, GENERATIONS),
)
async def generate(request: Request) -> Response:
    """Generate images in the form of OpenAI's API. The prompt names a class; its words mean nothing else."""
    return await _answer(await read_body(request, ImageGenerationRequest), request)


@edits.post("/v1/images/edits", responses=REFUSALS, openapi_extra=body_schema(ImageEditRequest, EDITS))
async def edit(request: Request) -> Response:
    """Edit a picture in the form of OpenAI's API: where the mask is transparent, or all of it (SDEdit)."""
    return await _answer(await read_body(request, ImageEditRequest), request)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, as a list."""
    return {"object": "list", "data": [_model(app_state(request))]}


@router.get("/v1/models/{model:path}", responses={404: {"model": OpenAIError}})
async def model(model: Annotated[str, Path(description="its name")], request: Request) -> dict[str, Any]:
    """The model that is served, by its name; 404 for any other."""
    found = _model(app_state(request))
    if model != found["id"]:
        raise HTTPException(404, f"There is one model: {found['id']}.")
    return found


async def _answer(asked: ImagesRequest, request: Request) -> Response:
    state = app_state(request)
    prepared = await asyncio.to_thread(prepare_images, asked, state.capabilities)
    name = state.capabilities.name
    if asked.stream:
        return EventStream(ImagesEventPresenter(prepared, name), state, prepared.job.spec)
    return await ImagesPresenter(prepared, name).respond(await result_of(prepared.job, request))


def _model(state: AppState) -> dict[str, Any]:
    return {"id": state.capabilities.name, "object": "model", "created": STARTED, "owned_by": "ddpm-service"}
