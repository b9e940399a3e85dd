"""Health, readiness, metrics, and what is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.engine.worker import Phase
from service.errors import EngineDeadError, LoadingError
from service.http.info import INFO, describe
from service.http.openapi import described, problems
from service.http.state import app_state

router = APIRouter(tags=["operations"])


@router.get("/livez", responses=problems(503))
@router.get("/v2/health/live", include_in_schema=False)
async def livez(request: Request) -> dict[str, str]:
    """Alive: the engine makes progress whenever it has work."""
    if not app_state(request).engine.alive():
        raise EngineDeadError("The engine makes no progress.", 10.0)
    return {"status": "alive"}


@router.get("/readyz", responses=problems(503))
@router.get("/v2/health/ready", include_in_schema=False)
async def readyz(request: Request) -> dict[str, str]:
    """Ready: loaded, warm, and not draining."""
    refusal = app_state(request).engine.refusal()
    if refusal is not None:
        raise refusal
    return {"status": Phase.READY.value}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    return Response(
        app_state(request).telemetry.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.get("/info", responses={**described(INFO), **problems(401, 403, 503)})
async def info(request: Request) -> dict[str, Any]:
    """The model, the samplers, defaults, limits, the device, and how far batch neighbours change a result."""
    state = app_state(request)
    if state.engine.info is None:
        raise state.engine.refusal() or LoadingError("The network is being loaded.", 2.0)
    return describe(state.capabilities, state.settings, state.engine.info)
