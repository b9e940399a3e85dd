"""create_app(): wiring, and what runs as long as the application does."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service import __version__
from service.engine.client import EngineClient
from service.engine.connection import Connection, ProcessConnection
from service.engine.messages import EngineConfig
from service.engine.streams import Streams
from service.http.answers import StreamPresenter
from service.http.callers import AllowHosts, AllowSites, hosts_of
from service.http.middleware import Authorise, Head, Observe, is_probe, key_names
from service.http.openai import openai_error
from service.http.openapi import DocumentedApp
from service.http.prefix import Prefix
from service.http.problems import ErrorFormats, register_handlers
from service.http.routes import (
    automatic1111,
    edit,
    generate,
    interpolate,
    jobs,
    openai,
    operations,
    pages,
    score,
)
from service.http.state import AppState
from service.settings import Settings
from service.telemetry import Telemetry

ROUTERS = (
    generate.router,  # routes are tried in order
    generate.query_router,
    edit.router,
    interpolate.router,
    score.router,
    openai.generations,
    openai.edits,
    openai.router,
    jobs.router,
    operations.router,
    pages.router,
)
OPEN_PATHS = frozenset(
    {
        "/",
        "/explore",
        "/status",
        "/livez",
        "/readyz",
        "/v2/health/live",
        "/v2/health/ready",
        "/metrics",
        "/docs",
        "/openapi.json",
    }
)
"""What needs no key where keys are set, beside the pages' files; everything else does."""

LAG_S = 60.0
"""For which the worst lag of the event loop is shown: scrapes are a minute apart at most."""
WORKING_PATHS = frozenset({"/stream", "/generate"})
"""Where GET starts a job, which nobody wants for the sake of its headers: HEAD is left to the route."""


def create_app(
    settings: Settings, start: Callable[[EngineConfig], Connection] = ProcessConnection
) -> FastAPI:
    """The application. `start` starts an engine, whenever one is needed."""
    telemetry = Telemetry()
    streams: Streams[StreamPresenter | None] = Streams(
        abandon=lambda job_id: engine.cancel(job_id), pressed=lambda: engine.pressed
    )
    engine = EngineClient(
        start,
        settings.engine_configs(),
        streams.publish,
        telemetry,
        capacity=settings.max_queue,
        most_of_an_owner=settings.most_slots_of_a_key,
        owners=key_names(settings.api_keys),
        stall_s=settings.stall_s,
        hurry=streams.hurry,
    )
    state = AppState(engine, streams, telemetry, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        lag = asyncio.create_task(_watch_lag(telemetry))
        yield
        lag.cancel()
        await engine.stop()
        state.decoders.close()
        streams.close()

    app = DocumentedApp(
        title="DDPM service",
        version=__version__,
        summary="A diffusion model behind an API: each network call advances every request by one step.",
        lifespan=lifespan,
        docs_url=None,  # a page of ours: FastAPI's loads its files from elsewhere
        redoc_url=None,
        telemetry={"exclude": is_probe},
        needs_key=(lambda path: not is_open(path)) if settings.api_keys else None,
    )
    app.state.ddpm = state
    app.state.error_formats = ErrorFormats()
    app.state.error_formats.register("/v1", openai_error)
    for router in ROUTERS:
        app.include_router(router)
    if settings.a1111:
        automatic1111.install(app)
    app.mount("/web", pages.web_files)
    app.mount("/swagger", pages.swagger_files())
    register_handlers(app)
    # The last one added is the outermost: a refusal is counted too, and pages of other origins may read it.
    app.add_middleware(Authorise, keys=settings.api_keys, is_open=is_open)
    app.add_middleware(AllowSites, origins=settings.cors_origins, works=WORKING_PATHS.__contains__)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["DELETE", "GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=[
                "ETag",
                "Location",
                "Preference-Applied",
                "Retry-After",
                "X-Job-ID",
                "X-Request-ID",
            ],
        )
    hosts = hosts_of(settings.allowed_hosts, settings.host, keys=bool(settings.api_keys))
    if hosts is not None:
        app.add_middleware(AllowHosts, hosts=hosts, is_exempt=is_probe)
    app.add_middleware(Head, unless=WORKING_PATHS.__contains__)
    app.add_middleware(Prefix, root_path=settings.root_path)
    app.add_middleware(Observe, telemetry=telemetry, access_log=settings.access_log)
    return app


def is_open(path: str) -> bool:
    """Whether a path, as routes are matched by, needs no key."""
    return path in OPEN_PATHS or path.startswith(("/web/", "/swagger/"))


async def _watch_lag(telemetry: Telemetry, every_s: float = 0.5) -> None:
    """Export how late the event loop has been at worst, for long enough that a scrape sees it."""
    latest: deque[float] = deque(maxlen=round(LAG_S / every_s))
    while True:
        due = time.perf_counter() + every_s
        await asyncio.sleep(every_s)
        latest.append(max(0.0, time.perf_counter() - due))
        telemetry.loop_lag.set(max(latest))
