"""A tiny model of ten classes on disk, and a server that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.load import PNG, Endpoint
from model import checkpoint
from model.schedule import NoiseSchedule
from tests.model.conftest import SCHEDULER, tiny_checkpoint
from tests.service.fakes import until


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks here are tiny: threads only compete."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, and too little noise to drive every pixel to its bound."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = {**SCHEDULER, "beta_start": 1e-4, "beta_end": 2e-3}
    tiny = replace(
        tiny_checkpoint(num_class_embeds=11),
        schedule=NoiseSchedule.from_diffusers(scheduler),
        scheduler_config=scheduler,
        class_names=tuple("abcdefghij"),
        null_class=10,
    )
    checkpoint.save(folder, tiny)
    return folder


@dataclass
class Faker:
    """A server on a real socket; the path chooses the answer. `received`: the bodies, in order of arrival."""

    received: list[Any] = field(default_factory=list)
    together: int = 1  # /gate answers when so many have come
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        paths = ("ok", "fewer", "text", "empty", "gate", "never", "wrapped", "status")
        routes = [Route(f"/{path}", self._answer, methods=["POST"]) for path in paths]
        routes.append(Route("/stream/{how}", self._stream, methods=["POST"]))
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_config=None, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)
        self._thread.start()
        until(lambda: self.server.started, "the start")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def endpoint(self, path: str, **options: Any) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.port}/{path}", **options)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join()

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.received.append(body)
        images = [f"{PNG}…"] * (1 if "requests" in body else body["n"])
        match request.url.path:
            case "/fewer":
                images = images[1:]
            case "/text":
                images = ["hello"] * len(images)
            case "/empty":
                return JSONResponse({})
            case "/wrapped":
                return JSONResponse([{"images": images}])
            case "/status":
                return Response("go away", int(request.query_params["code"]))
            case "/gate":
                if len(self.received) >= self.together:
                    self.opened.set()
                await self.opened.wait()
            case "/never":
                await asyncio.sleep(3600)
        return JSONResponse({"images": images})

    async def _stream(self, request: Request) -> Response:
        body = await request.json()
        self.received.append(dict(request.headers))
        how = request.path_params["how"]

        async def events() -> AsyncIterator[str]:
            yield _event("queued", {"eta_s": 0.5})
            yield ": ping\n\n"
            yield _event("preview", {"step": 1})
            yield _event("preview", {"step": 2})
            if how == "whole":
                yield _event("completed", {"images": [{"b64_json": f"{PNG}…"}] * body["n"]})
            elif how == "error":
                yield _event("error", {"code": "nonfinite"})

        return StreamingResponse(events(), media_type="text/event-stream")


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\nid: 1\n\n"


@pytest.fixture
def faker() -> Iterator[Faker]:
    server = Faker()
    yield server
    server.stop()
