"""What answers for a fleet: each request goes to a replica of its model, and to another one if that dies.

A request whose answer has not begun is sent again as it is. A stream of events that has begun is continued
after the last event that was passed on, by its signed id (service/http/event_ids.py): a pause to its client.
Metrics are those of all replicas, each with a label that says whose it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from service.cluster.forwarding import Forwarding, NotContinuedError
from service.cluster.metrics import merged
from service.cluster.naming import model_named
from service.errors import CancelledError, QueueFullError, RefusedError
from service.http.middleware import MAX_UPLOAD_BYTES
from service.http.openai import openai_error
from service.http.problems import ErrorFormats, register_handlers
from service.http.respond import while_connected
from service.settings import Settings
from service.telemetry import configure_logging

ATTEMPTS = 8
PAUSE_S = 0.25
"""Before a replica is asked in place of one that died; longer each time, since Ray must hear of it first."""
METRICS_S = 5.0
"""For the metrics of all replicas; of one that takes longer, a scrape has none."""
LOST = RayActorError, ReplicaUnavailableError, DeploymentUnavailableError
TEXT = "text/plain; version=0.0.4; charset=utf-8"
logger = logging.getLogger(__name__)


@serve.ingress()
class Front:
    """The one address of several models. The first is the one of requests that name none."""

    def __init__(self, models: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._settings = Settings()
        configure_logging(self._settings.log_format)
        self._models = dict(models)
        self._default = next(iter(self._models.values()))

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.state.error_formats = ErrorFormats()
        app.state.error_formats.register("/v1", openai_error)
        register_handlers(app)
        app.add_api_route("/metrics", self._metrics)
        if len(self._models) > 1:
            app.add_api_route("/v1/models", self._list)
        app.mount("/", self._forward)
        return app

    async def _metrics(self) -> Response:
        """Metrics of all replicas, in Prometheus's text format."""
        return Response(merged(await self._all_metrics()), media_type=TEXT)

    async def _all_metrics(self) -> list[tuple[dict[str, str], str]]:
        async def of(model: str, handle: DeploymentHandle[Any]) -> list[tuple[dict[str, str], str]]:
            try:
                answers = handle.broadcast("metrics")
                found = await answers.results_async(timeout_s=METRICS_S, return_exceptions=True)
            except (TimeoutError, *LOST):
                return []
            return [
                ({"model": model, "replica": each[0]}, each[1]) for each in found if isinstance(each, tuple)
            ]

        found = await asyncio.gather(*(of(*each) for each in self._models.items()))
        return [each for texts in found for each in texts]

    async def _list(self, request: Request) -> Response:
        """All models, in OpenAI's form; whoever may not see one of them sees none."""
        lists = []
        for handle in self._models.values():
            answer = _Whole()
            await self._answer(handle, Forwarding(dict(request.scope), b""), answer.send)
            if answer.status != 200:
                return Response(answer.body, answer.status, media_type="application/json")
            lists.append(answer.body)
        data = [each for found in lists for each in msgspec.json.decode(found)["data"]]
        return Response(msgspec.json.encode({"object": "list", "data": data}), media_type="application/json")

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return
        name = await model_named(dict(scope), body)
        handle = self._models.get(name or "", self._default)
        with suppress(CancelledError):  # of a client that has left, and reads no answer
            async with while_connected(receive):
                await self._answer(handle, Forwarding(dict(scope), body), send)

    async def _body(self, request: Request) -> bytes:
        """The whole of it. Raises HTTPException for one that is larger than any route takes, or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.read_s + MAX_UPLOAD_BYTES / (16 << 10)):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > MAX_UPLOAD_BYTES:
                        raise HTTPException(413, f"A body has at most {MAX_UPLOAD_BYTES} bytes.")
        except TimeoutError:
            raise HTTPException(408, "The body did not come in time.") from None
        return bytes(body)

    async def _answer(self, handle: DeploymentHandle[Any], request: Forwarding, send: Send) -> None:
        """Send the answer of a replica, or of the next one. Raises RefusedError where none answers."""
        streaming = handle.options(stream=True, session_id=request.session)
        for attempt in range(ATTEMPTS):
            answers: Any = streaming.asgi.remote(request.scope, request.body)
            try:
                async for messages in answers:
                    for message in request.passed(messages):
                        await send(message)
                return
            except BackPressureError:
                raise QueueFullError("All replicas are full.", 1.0) from None
            except (*LOST, NotContinuedError) as error:
                logger.warning("a replica is lost: %s", type(error).__name__)
                if request.over:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    return
                if not request.again():
                    raise
                await asyncio.sleep(PAUSE_S * (attempt + 1))
            except asyncio.CancelledError:
                answers.cancel()
                raise
        raise RefusedError("No replica answers.", 5.0)


class _Whole:
    """Takes an answer whole."""

    def __init__(self) -> None:
        self.status, self.body = 0, b""

    async def send(self, message: Message) -> None:
        """One message of it."""
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")
