"""`/sdapi/v1`: AUTOMATIC1111's API, as far as its clients use it for a model without text. Off by default."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from model.sheets import contact_sheet
from service.engine.messages import Picture
from service.http.answers import JSON, encoded
from service.http.forms import HALVES, body_schema, read_body
from service.http.middleware import UploadRoute
from service.http.openapi import MEANINGS, Responses, described, lists, objects, typed
from service.http.problems import ErrorFormats, Problem
from service.http.progress import Run, Runs, owner_of
from service.http.respond import decoded
from service.http.state import app_state
from service.tasks.automatic1111 import (
    SAMPLERS,
    SCHEDULERS,
    ImageToImage,
    TextToImage,
    information,
    prepare_image_to_image,
    prepare_text_to_image,
    sampler_of,
)
from service.tasks.images import encode
from service.tasks.sampling import PreparedRequest

PREFIX = "/sdapi"
ERROR = objects(
    "An error, as clients of that API show it.",
    error=typed("stable; the `code` of our own routes"),
    detail=typed("in words"),
    errors=typed("the same"),
    body=typed("always empty"),
)
IMAGES = objects(
    "The images.",
    images=lists("PNG files in base64", {"type": "string"}),
    parameters=typed("the request", "object"),
    info=typed("JSON: seeds, and the text in each picture", contentMediaType="application/json"),
)


def problems(*statuses: int) -> Responses:
    """The `responses` of a route for these statuses."""
    content = {JSON: {"schema": ERROR}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


JOB: Responses = {**described(IMAGES), **problems(401, 404, 413, 422, 429, 499, 500, 503, 504)}
"""Of a route that makes images."""
router = APIRouter(prefix=f"{PREFIX}/v1", tags=["automatic1111"], route_class=UploadRoute)
get_router = APIRouter(prefix=f"{PREFIX}/v1", tags=["automatic1111"], responses=problems(401))


class Options(BaseModel):
    """The settings that a client may send: of all that it has read, this one means something here."""

    sd_model_checkpoint: str | None = Field(None, description="the name of the model, the only one")


def install(app: FastAPI) -> None:
    """Add the routes to an application, and the form of their errors."""
    formats: ErrorFormats = app.state.error_formats
    formats.register(PREFIX, error_format)
    app.state.runs = Runs()
    app.include_router(router)
    app.include_router(get_router)


def error_format(problem: Problem, headers: Mapping[str, str]) -> Response:
    """The form of an error there: clients show `detail`, `error` or `errors`."""
    content = {"error": problem.code, "detail": problem.detail, "body": "", "errors": problem.detail}
    if "WWW-Authenticate" in headers:  # its clients know no bearer tokens
        headers = {**headers, "WWW-Authenticate": 'Basic realm="ddpm", charset="UTF-8"'}
    return JSONResponse(content, problem.status, headers)


# ── Pictures ───────────────────────────────────────────────────────────────────────────────────


@router.post(
    "/txt2img",
    responses=JOB,
    openapi_extra=body_schema(TextToImage, {"an image of a class": {"prompt": "an ankle boot", "steps": 20}}),
)
async def txt2img(request: Request) -> Response:
    """Images of the class that the prompt names."""
    body = await read_body(request, TextToImage)
    _check_sampler(body)
    return await _answer(
        "txt2img", body, prepare_text_to_image(body, app_state(request).capabilities), request
    )


@router.post(
    "/img2img",
    responses=JOB,
    openapi_extra=body_schema(ImageToImage, {"image to image": {"init_images": [HALVES], "width": 64}}),
)
async def img2img(request: Request) -> Response:
    """A picture changed by `denoising_strength`, all of it or where `mask` is white."""
    body = await read_body(request, ImageToImage)
    _check_sampler(body)
    if not body.init_images:
        raise HTTPException(404, "Init image not found")
    prepared = await decoded(prepare_image_to_image, body, request)
    return await _answer("img2img", body, prepared, request)


def _check_sampler(body: TextToImage) -> None:
    try:
        sampler_of(body)
    except LookupError:
        raise HTTPException(404, "Sampler not found") from None


async def _answer(task: str, body: TextToImage, prepared: PreparedRequest, request: Request) -> Response:
    capabilities = app_state(request).capabilities
    pictures = await _runs(request).run(task, prepared, request)
    repeated = isinstance(body, ImageToImage) and body.include_init_images
    parameters = body.model_dump(exclude=set() if repeated else {"init_images", "mask"})

    def content() -> bytes:
        found = information(body, prepared, [picture.seed for picture in pictures], capabilities)
        images = [
            _base64(picture, text, prepared.scale)
            for picture, text in zip(pictures, found["infotexts"], strict=True)
        ]
        shown = images if body.send_images else []
        return msgspec.json.encode({"images": shown, "parameters": parameters, "info": json.dumps(found)})

    return Response(await encoded(content, pictures, "png", prepared.scale), media_type=JSON)


def _base64(picture: Picture, text: str, scale: int) -> str:
    return base64.b64encode(encode(picture.pixels, "png", text, scale)).decode()


# ── While they are made ────────────────────────────────────────────────────────────────────────


@get_router.get("/progress", responses=problems(422))
async def progress(
    request: Request,
    skip_current_image: Annotated[bool, Query(description="leave current_image out")] = False,
) -> dict[str, Any]:
    """How far the client's jobs are, and the x₀ predictions of the one that came first."""
    runs = _runs(request).of(owner_of(request))
    first = runs[0] if runs else None
    return {
        "progress": sum(run.fraction for run in runs) / len(runs) if runs else 0.0,
        "eta_relative": max((run.eta_s for run in runs), default=0.0),
        "state": _state(runs),
        "current_image": None if first is None or skip_current_image else await _current_image(first),
        "textinfo": "Waiting" if first is not None and not first.step else None,
    }


def _state(runs: Sequence[Run]) -> dict[str, Any]:
    first = runs[0] if runs else None
    return {
        "skipped": False,
        "interrupted": any(run.interrupted for run in runs),
        "job": "" if first is None else first.task,
        "job_count": len(runs),
        "job_no": 0,
        "sampling_step": 0 if first is None else min(first.step.values(), default=0),
        "sampling_steps": 0 if first is None else first.steps,
    }


async def _current_image(run: Run) -> str | None:
    pictures = [run.pictures[index] for index in sorted(run.pictures)]
    if not pictures:
        return None
    # Of several pictures the sheet is about as large as one will be: clients ask for it again and again.
    scale = max(1, run.prepared.scale // math.ceil(math.sqrt(len(pictures))))

    def sheet() -> bytes:
        pixels = contact_sheet([picture.pixels for picture in pictures])
        return encode(pixels, "png", None, scale, passing=True)

    return base64.b64encode(await encoded(sheet, pictures, "png", scale)).decode()


@router.post("/interrupt", responses=problems(401))
async def interrupt(request: Request) -> Response:
    """End the client's jobs where they are. Their requests are answered with the latest x₀ predictions."""
    _runs(request).interrupt(owner_of(request), app_state(request))
    return JSONResponse({})


def _runs(request: Request) -> Runs:
    found: Runs = request.app.state.runs
    return found


# ── What there is ──────────────────────────────────────────────────────────────────────────────


@get_router.get("/options", responses=problems(503))
async def options(request: Request) -> dict[str, Any]:
    """The settings that clients read at their start."""
    return {"sd_model_checkpoint": app_state(request).capabilities.name, "samples_format": "png"}


@router.post("/options", responses=problems(401, 404, 413, 422, 503), openapi_extra=body_schema(Options, {}))
async def set_options(request: Request) -> Response:
    """Accept the settings as they are, and no other model."""
    body = await read_body(request, Options)
    if body.sd_model_checkpoint not in (None, app_state(request).capabilities.name):
        raise HTTPException(404, "Model not found")
    return JSONResponse(None)


@get_router.get("/sd-models", responses=problems(503))
async def sd_models(request: Request) -> list[dict[str, str | None]]:
    """The model, the only one."""
    name = app_state(request).capabilities.name
    files = {"hash": None, "sha256": None, "filename": name, "config": None}
    return [{"title": name, "model_name": name, **files}]


@get_router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    """The samplers, under the names that clients know them by."""
    return [{"name": each.name, "aliases": each.aliases, "options": {}} for each in SAMPLERS]


@get_router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """The spacings of timesteps, under the names that clients know them by."""
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, (label, _) in SCHEDULERS.items()
    ]


@get_router.get("/upscalers")
async def upscalers() -> list[dict[str, Any]]:
    """None, by that name: it has to be the first of the list."""
    files = {"model_name": None, "model_path": None, "model_url": None}
    return [{"name": "None", **files, "scale": 1.0}]


@get_router.get("/latent-upscale-modes")
@get_router.get("/sd-vae")
async def nothing() -> list[dict[str, Any]]:
    """What a model of pixels has none of."""
    return []


@get_router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    """Extensions: none."""
    return {"txt2img": [], "img2img": []}
