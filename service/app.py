"""create_app(): wiring, lifespan, and the one table that turns errors into status codes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.checkpoint import Checkpoint
from model.samplers import SAMPLERS
from service import __version__
from service.edits import editing
from service.engine import Engine
from service.errors import (
    CancelledError,
    ComputeError,
    DeadlineError,
    InvalidRequestError,
    NotAcceptableError,
    QueueFullError,
    RefusedError,
    ServiceError,
    UnauthorizedError,
)
from service.routes import House, edit, explore, generate, operations
from service.schemas import (
    DEFAULT_GUIDANCE,
    DEFAULT_SAMPLER,
    DEFAULT_SIGMAS,
    DEFAULT_STEPS,
    Catalogue,
    Problem,
)
from service.scores import scoring
from service.settings import Settings
from service.streams import Streams
from service.telemetry import Observe, Telemetry, request_id
from service.warmup import Warm, warm_up
from service.worker import Worker

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
UPLOAD_ROUTES = edit.UPLOAD_ROUTES | explore.UPLOAD_ROUTES
MAX_UPLOAD_BYTES = 8 << 20
"""Of a body that may carry pictures: a photograph or two, in base64."""
# The most specific class of an error that is listed here decides.
STATUS: dict[type[ServiceError], int] = {
    InvalidRequestError: 422,
    UnauthorizedError: 401,
    NotAcceptableError: 406,
    QueueFullError: 429,
    RefusedError: 503,
    DeadlineError: 504,
    CancelledError: 499,
    ComputeError: 500,
    ServiceError: 500,
}
# Phrases that Python's versions do not agree on, or do not know.
TITLES = {413: "Content Too Large", 422: "Unprocessable Content", 499: "Client Closed Request"}


def to_problem(error: ServiceError) -> Problem:
    """The RFC 9457 problem an error becomes."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    errors = None
    if isinstance(error, InvalidRequestError):
        errors = [{"field": error.field, "message": error.detail}]
    return Problem(title=_title(status), status=status, detail=error.detail, code=error.code, errors=errors)


def _title(status: int) -> str:
    return TITLES.get(status) or HTTPStatus(status).phrase


def create_app(
    model: Checkpoint, settings: Settings, warm: Callable[[Checkpoint, Settings], Warm] = warm_up
) -> FastAPI:
    """The application for a loaded model. `warm` builds the engine, on the worker's thread, at its start."""
    telemetry = Telemetry()

    def build() -> Engine:
        ready = warm(model, settings)
        house.facts = describe(house.catalogue, settings, ready)
        telemetry.model.labels(model.name, ready.runtime, ready.device, ready.dtype, __version__).set(1)
        return ready.engine

    streams = Streams(settings.stream_grace_s, abandon=lambda job_id: worker.cancel(job_id))
    worker = Worker(build, streams.publish, telemetry, capacity=settings.max_queue, stall_s=settings.stall_s)
    catalogue = describe_model(model, settings)
    house = House(catalogue, worker, streams, telemetry, to_problem, facts={})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        lag = asyncio.create_task(_watch_lag(telemetry))
        yield
        lag.cancel()
        worker.drain()
        await asyncio.to_thread(worker.join, 5.0)
        streams.close()

    app = FastAPI(
        title="DDPM service",
        version=__version__,
        summary="A diffusion model behind an API: each network call advances every request by one step.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.house = house
    app.include_router(operations.router)
    app.include_router(generate.router)
    app.include_router(edit.router)
    app.include_router(explore.router)
    app.mount("/web", operations.web_files)
    # Starlette types a handler by Exception, not by the class it is registered for.
    app.add_exception_handler(ServiceError, _on_service_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_bug)
    # The last one added is the outermost: a refusal is counted too, and pages of other origins may read it.
    if settings.api_keys:
        app.add_middleware(Authorise, keys=settings.api_keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID", "X-Job-ID"],
        )
    app.add_middleware(LimitBody)
    app.add_middleware(Observe, telemetry=telemetry)
    return app


class LimitBody:
    """Refuses a body that is too large by a problem; FastAPI's own limit would answer in plain text."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request; whoever reads too much of its body gets an HTTPException."""
        size = 0
        most = MAX_UPLOAD_BYTES if scope.get("path") in UPLOAD_ROUTES else MAX_BODY_BYTES

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, f"A body has at most {most} bytes.")
            return message

        await self.app(scope, limited, send)


class Authorise:
    """Deny by default: where there are keys, all that is not open needs one as a bearer token.

    A middleware, so that nothing of a request is read before, its body included.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer it by 401."""
        if scope["type"] != "http" or operations.is_open(scope["path"]) or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = UnauthorizedError("This route needs a key: Authorization: Bearer …")
        await (await _on_service_error(Request(scope), error))(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Every key is compared, so that the time taken tells nothing about which one was close.
        matches = [hmac.compare_digest(given.encode(), key.get_secret_value().encode()) for key in self.keys]
        return scheme.lower() == "bearer" and any(matches)


def describe_model(model: Checkpoint, settings: Settings) -> Catalogue:
    """What can be asked of a checkpoint under these settings."""
    config = model.unet.config
    return Catalogue(
        name=model.name,
        schedule=model.schedule,
        shape=(config.in_channels, config.sample_size, config.sample_size),
        class_names=model.class_names,
        conditional=config.num_class_embeds is not None,
        guided=model.null_class is not None,
        classified=model.classifier is not None,
        typicality=model.typicality,
        parameters=sum(parameter.numel() for parameter in model.unet.parameters()),
        max_images=min(settings.max_images, settings.max_queue),  # more would be refused for ever
        deadline_s=settings.deadline_s,
    )


def describe(catalogue: Catalogue, settings: Settings, warm: Warm) -> dict[str, Any]:
    """What `/info` says."""
    channels, height, width = catalogue.shape
    steps = {sampler: min(most, catalogue.schedule.timesteps) for sampler, most in DEFAULT_STEPS.items()}
    return {
        "version": __version__,
        "model": {
            "name": catalogue.name,
            "classes": list(catalogue.class_names),
            "guidance": catalogue.guided,
            "classifier": catalogue.classified,
            "channels": channels,
            "height": height,
            "width": width,
            "parameters": catalogue.parameters,
            "timesteps": catalogue.schedule.timesteps,
            "prediction_type": catalogue.schedule.prediction_type,
        },
        "samplers": list(SAMPLERS),
        "defaults": {
            "sampler": DEFAULT_SAMPLER,
            "num_inference_steps": steps[DEFAULT_SAMPLER],
            "steps_by_sampler": steps,
            "eta": 0.0,
            "guidance_scale": DEFAULT_GUIDANCE if catalogue.guided else 1.0,
            "guidance_sigma_min": DEFAULT_SIGMAS[0],
            "guidance_sigma_max": DEFAULT_SIGMAS[1],
            "classifier_scale": 0.0,
            "timestep_spacing": catalogue.schedule.timestep_spacing,
        },
        "editing": editing(catalogue),
        "scoring": scoring(catalogue),
        "limits": {
            "max_images": catalogue.max_images,
            "max_batch": warm.engine.scheduler.max_rows,
            "max_queue": settings.max_queue,
            "deadline_s": settings.deadline_s,
        },
        "runtime": {
            "name": warm.runtime,
            "device": warm.device,
            "dtype": warm.dtype,
            "step_seconds": {str(rows): round(seconds, 5) for rows, seconds in warm.step_times},
        },
        "batch_invariance": {
            "invariant": warm.invariance.holds,
            "max_abs_difference": warm.invariance.max_abs_difference,
            "batch_sizes": list(warm.invariance.batch_sizes),
        },
    }


async def _watch_lag(telemetry: Telemetry, every_s: float = 0.5) -> None:
    """Export how late the event loop is."""
    while True:
        due = time.perf_counter() + every_s
        await asyncio.sleep(every_s)
        telemetry.loop_lag.set(max(0.0, time.perf_counter() - due))


def _answer(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        problem.status,
        {"Vary": "Accept", **(headers or {})},
        media_type="application/problem+json",
    )


async def _on_service_error(_: Request, error: ServiceError) -> JSONResponse:
    headers = {}
    if isinstance(error, RefusedError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return _answer(to_problem(error), headers)


async def _on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Which fields are wrong and why, never what was sent: it may be huge, secret, or not JSON at all."""
    errors = [{"field": _field(found["loc"]), "message": found["msg"]} for found in error.errors()[:20]]
    detail = "; ".join(f"{e['field']}: {e['message']}" if e["field"] else e["message"] for e in errors[:5])
    return _answer(
        Problem(title=_title(422), status=422, detail=detail, code="invalid_request", errors=errors)
    )


def _field(location: Sequence[int | str]) -> str:
    """The field an error is about. An unknown field's name is input: told if it is a short plain word."""
    name = location[1] if len(location) > 1 else ""
    plain = isinstance(name, str) and len(name) <= 40 and name.isascii() and name.isidentifier()
    return str(name) if plain else ""


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == 400:  # a body that breaks the JSON parser: nested too deep, not UTF-8, …
        return await _on_invalid(request, RequestValidationError([{"loc": (), "msg": str(error.detail)}]))
    title = _title(error.status_code)
    code = title.lower().replace(" ", "_")
    problem = Problem(title=title, status=error.status_code, detail=str(error.detail), code=code)
    return _answer(problem, dict(error.headers or {}))


async def _on_bug(_: Request, error: Exception) -> JSONResponse:
    logger.error("unhandled error", exc_info=error)
    detail = "An error of ours; the log has it."
    problem = Problem(title=_title(500), status=500, detail=detail, code="internal")
    # Starlette answers a bug outside all middleware, where nobody else adds this.
    return _answer(problem, {"X-Request-ID": request_id.get()})
