"""OpenAI's Images API: `/v1/images/generations`, `/v1/images/edits`, and `/v1/models`."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Request, Response

from service.http.answers import EVENTS, JSON
from service.http.forms import HALVES, body_schema, read_body
from service.http.intake import release_body
from service.http.middleware import LimitedRoute, UploadRoute
from service.http.openai import ImagesEventPresenter, ImagesPresenter, OpenAIError
from service.http.openapi import Responses, described, lists, objects, typed
from service.http.respond import EventStream, decoded, result_of
from service.http.state import AppState, app_state
from service.tasks.openai import ImageEditRequest, ImageGenerationRequest, PreparedImages, prepare_images

STARTED = int(time.time())
"""Of this process: when its model was made is not known."""

generations = APIRouter(tags=["openai"], route_class=LimitedRoute)
edits = APIRouter(tags=["openai"], route_class=UploadRoute)
router = APIRouter(tags=["openai"])

IMAGES = objects(
    "The form of OpenAI's ImagesResponse.",
    optional=("quality",),
    created=typed("Unix time", "integer"),
    data=lists(
        "the images",
        objects(
            "One image.",
            optional=("b64_json", "url"),
            b64_json=typed("the picture in base64"),
            url=typed("or, if `response_format` is `url`, as a data URL"),
            revised_prompt=typed("the class that the prompt names"),
            seed=typed("the seed that gives this image alone", "integer"),
        ),
    ),
    background=typed("opaque or transparent"),
    output_format=typed("of the pictures"),
    quality=typed("as it was asked for"),
    size=typed("WIDTHxHEIGHT of the pictures"),
    usage=typed("zeros: there are no tokens", "object"),
)
MODEL = objects(
    "The model that is served.",
    id=typed("its name"),
    object=typed("always `model`"),
    created=typed("Unix time of the start of the service", "integer"),
    owned_by=typed("always `ddpm-service`"),
)
MODELS = objects(
    "All models: one.",
    object=typed("always `list`"),
    data=lists("the models", MODEL),
)
MEANINGS = {
    400: "Invalid request",
    401: "No API key, or an unknown one, where the service has keys",
    404: "There is no model of this name",
    413: "The body is too large",
    429: "Queue full; Retry-After says when to try again",
    499: "The job was cancelled",
    500: "The job failed, alone, or there is a bug",
    503: "Loading, draining or failed; Retry-After says when to try again",
    504: "The deadline has passed or cannot be met; not to be tried again",
}


def problems(*statuses: int) -> Responses:
    """The `responses` of a route for these statuses."""
    return {status: {"model": OpenAIError, "description": MEANINGS[status]} for status in statuses}


def answers(events_name: str) -> Responses:
    """What a route that makes images may answer. events_name: what its events' names begin with."""
    names = [f"{events_name}.partial_image", f"{events_name}.completed", "error"]
    event = objects(
        "If `stream` is true: the images as they are made. The last event of all is `[DONE]` alone.",
        optional=("event", "id"),
        event=typed("what it is", enum=names),
        id=typed("to be sent as Last-Event-ID; one for all events that are sent at once"),
        data=typed("JSON in OpenAI's form, or `[DONE]`"),
    )
    return {
        200: {
            "description": "The images",
            "content": {JSON: {"schema": IMAGES}, EVENTS: {"itemSchema": event}},
        },
        **problems(400, 401, 413, 429, 499, 500, 503, 504),
    }


GENERATIONS = {
    "an image of a class": {"prompt": "an ankle boot", "size": "256x256", "seed": 7},
    "a stream with three x₀ predictions": {"prompt": "a bag", "stream": True, "partial_images": 3},
}
EDITS = {"image to image": {"prompt": "a sneaker", "image": HALVES, "strength": 0.7}}


@generations.post(
    "/v1/images/generations",
    responses=answers("image_generation"),
    openapi_extra=body_schema(ImageGenerationRequest, GENERATIONS),
)
async def generate(request: Request) -> Response:
    """Generate images in the form of OpenAI's API. The prompt names a class; its words mean nothing else."""
    asked = await read_body(request, ImageGenerationRequest)
    return await _answer(prepare_images(asked, app_state(request).capabilities), request)


@edits.post(
    "/v1/images/edits",
    responses=answers("image_edit"),
    openapi_extra=body_schema(ImageEditRequest, EDITS),
)
async def edit(request: Request) -> Response:
    """Edit a picture in the form of OpenAI's API: where the mask is transparent, or all of it (SDEdit)."""
    return await _answer(
        await decoded(prepare_images, await read_body(request, ImageEditRequest), request), request
    )


@router.get("/v1/models", responses={**described(MODELS), **problems(401, 503)})
async def models(request: Request) -> dict[str, Any]:
    """The model that is served, as a list."""
    return {"object": "list", "data": [_model(app_state(request))]}


@router.get("/v1/models/{model:path}", responses={**described(MODEL), **problems(401, 404, 503)})
async def model(model: Annotated[str, Path(description="its name")], request: Request) -> dict[str, Any]:
    """The model that is served, by its name; 404 for any other."""
    found = _model(app_state(request))
    if model != found["id"]:
        raise HTTPException(404, f"There is one model: {found['id']}.")
    return found


async def _answer(prepared: PreparedImages, request: Request) -> Response:
    state = app_state(request)
    release_body(request)
    name = state.capabilities.name
    if prepared.asked.stream:
        return EventStream(ImagesEventPresenter(prepared, name), state, prepared.job.spec)
    return await ImagesPresenter(prepared, name).respond(await result_of(prepared.job, request))


def _model(state: AppState) -> dict[str, Any]:
    return {"id": state.capabilities.name, "object": "model", "created": STARTED, "owned_by": "ddpm-service"}
