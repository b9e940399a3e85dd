"""Health, readiness, metrics, facts, and the web pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from service.errors import LoadingError, WorkerDeadError
from service.routes import InHouse
from service.worker import Phase

router = APIRouter(tags=["operations"])
WEB = Path(__file__).parent.parent / "web"
OPEN_ROUTES = frozenset(
    {
        "/",
        "/explore",
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


def is_open(path: str) -> bool:
    """Whether a path, as routes are matched by, needs no key."""
    return path in OPEN_ROUTES or path.startswith("/web/")


@router.get("/livez")
@router.get("/v2/health/live", include_in_schema=False)
async def livez(house: InHouse) -> dict[str, str]:
    """Alive: the worker makes progress whenever it has work."""
    if not house.worker.alive():
        raise WorkerDeadError("The worker makes no progress.", 10.0)
    return {"status": "alive"}


@router.get("/readyz")
@router.get("/v2/health/ready", include_in_schema=False)
async def readyz(house: InHouse) -> dict[str, str]:
    """Ready: loaded, warm, and not draining."""
    refusal = house.worker.refusal()
    if refusal is not None:
        raise refusal
    return {"status": Phase.READY.value}


@router.get("/metrics", response_class=Response)
async def metrics(house: InHouse) -> Response:
    """Prometheus' text format."""
    return Response(house.telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/info")
async def info(house: InHouse) -> dict[str, Any]:
    """The model, the samplers, defaults, limits, the device, and how far batch mates change a result."""
    if not house.facts:
        raise house.worker.refusal() or LoadingError("The network is being loaded.", 2.0)
    return house.facts


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The web page."""
    return FileResponse(WEB / "index.html")


@router.get("/explore", include_in_schema=False)
async def explore() -> FileResponse:
    """The page that shows what the network does to an image, noise level by noise level."""
    return FileResponse(WEB / "explore.html")


web_files = StaticFiles(directory=WEB)
"""The pages' styles and scripts, mounted at /web."""
