"""What is counted of every request, and how large its body may be."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from service.app import WORKING_PATHS
from service.http.middleware import (
    MAX_BODY_BYTES,
    MAX_UPLOAD_BYTES,
    PROBES,
    LimitedRoute,
    Observe,
    UploadRoute,
)
from service.telemetry import Telemetry
from tests.service.fakes import PATIENCE_S, until
from tests.service.http.test_problems import problem
from tests.service.live import Serve

# ── Counting ─────────────────────────────────────────────────────────────────────────────


def call(
    app: Any, headers: Sequence[tuple[bytes, bytes]] = (), kind: str = "http"
) -> tuple[Telemetry, list[Any]]:
    telemetry = Telemetry()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope: dict[str, Any] = {"type": kind, "headers": headers}
    with suppress(KeyError):
        asyncio.run(Observe(app, telemetry)(scope, receive, send))
    return telemetry, sent


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body"})


async def breaking(scope: Any, receive: Any, send: Any) -> None:
    raise KeyError("a bug")


async def silent(scope: Any, receive: Any, send: Any) -> None:
    return


@pytest.mark.parametrize(("app", "outcome"), [(answering, "2xx"), (breaking, "5xx"), (silent, "4xx")])
def test_outcomes(app: Any, outcome: str) -> None:
    telemetry, _ = call(app)
    labels = {"route": "unmatched", "outcome": outcome}
    assert telemetry.registry.get_sample_value("ddpm_requests_total", labels) == 1
    duration = telemetry.registry.get_sample_value(
        "ddpm_request_duration_seconds_count", {"route": "unmatched"}
    )
    assert duration == 1


@pytest.mark.parametrize("given", [b"x", b"a-1.b_2:3", b"~" * 128])
def test_a_request_id_is_passed_through(given: bytes) -> None:
    _, sent = call(answering, [(b"x-request-id", given)])
    assert sent[0]["headers"][:2] == [(b"a", b"b"), (b"x-request-id", given)]
    assert (b"x-content-type-options", b"nosniff") in sent[0]["headers"]


@pytest.mark.parametrize("given", [b"", b"a b", b"a\nb", b"\xff", b"x" * 129])
def test_a_request_id_that_is_unsafe_to_log_is_replaced(given: bytes) -> None:
    _, sent = call(answering, [(b"x-request-id", given)])
    (made,) = [value for name, value in sent[0]["headers"] if name == b"x-request-id"]
    assert made != given
    assert len(made) == 16


def test_what_is_not_a_request_is_ignored() -> None:
    telemetry, _ = call(silent, kind="lifespan")
    assert not next(iter(telemetry.requests.collect())).samples


# ── HEAD ───────────────────────────────────────────────────────────────────────────────────────


def test_every_route_that_answers_get_answers_head_without_a_body(serve: Serve) -> None:
    running = serve()
    paths = running.client.get("/openapi.json").json()["paths"]
    fixed = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    quiet = {*fixed, "/", "/explore", "/docs", "/openapi.json", "/v2/health/live", "/web/style.css", "/none"}
    quiet -= WORKING_PATHS
    assert {"/livez", "/readyz", "/metrics", "/info"} < quiet
    for path in quiet:
        head, get = running.client.head(path), running.client.get(path)
        assert head.status_code == get.status_code, path
        assert head.headers["content-type"] == get.headers["content-type"], path
        if path != "/metrics":  # which the requests themselves change
            assert head.headers["content-length"] == str(len(get.content)), path
        assert head.content == b""
    labels = {"route": "/livez", "outcome": "2xx"}
    assert running.metric("ddpm_requests_total", **labels) == 2


@pytest.mark.parametrize("path", sorted(WORKING_PATHS))
def test_head_starts_no_job(serve: Serve, path: str) -> None:
    running = serve()
    response = running.client.head(path)
    assert response.status_code in (200, 405)  # which is for the route to say
    assert response.content == b""
    assert running.denoiser.starts == []


def test_head_of_a_stream_ends_at_its_head(serve: Serve) -> None:
    running = serve()
    ended = threading.Event()

    @running.app.get("/ticks")
    async def ticks() -> StreamingResponse:
        async def endless() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        return StreamingResponse(endless(), media_type="text/event-stream")

    assert running.client.head("/ticks").status_code == 200
    assert ended.wait(PATIENCE_S)


# ── Pages of other origins ──────────────────────────────────────────────────────────────────────


def test_a_page_of_an_allowed_origin_may_do_what_the_api_offers(serve: Serve) -> None:
    client = serve(cors_origins="HTTPS://A.example:443/").client
    origin = {"origin": "https://a.example"}
    for method in ("GET", "POST", "DELETE"):
        asked = {**origin, "access-control-request-method": method}
        asked["access-control-request-headers"] = "last-event-id, prefer, authorization"
        allowed = client.options("/generate", headers=asked)
        assert allowed.status_code == 200, method
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    exposed = client.get("/livez", headers=origin).headers["access-control-expose-headers"].split(", ")
    assert {"Location", "ETag", "Preference-Applied", "Retry-After", "X-Job-ID"} <= set(exposed)
    other = client.get("/livez", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    opened.append(scope["telemetry"].registry.get_sample_value("ddpm_streams_open"))


opened: list[float] = []


def test_streams_are_counted_while_they_are_open() -> None:
    telemetry = Telemetry()
    scope = {"type": "http", "headers": [], "telemetry": telemetry}

    async def ignore(message: Any) -> None:
        return

    asyncio.run(Observe(streaming, telemetry)(scope, None, ignore))  # type: ignore[arg-type]
    assert opened == [1]
    assert telemetry.registry.get_sample_value("ddpm_streams_open") == 0


# ── The access log ─────────────────────────────────────────────────────────────────────────────


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "service.access"]


def test_each_request_is_logged_with_its_job(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    client = serve().client
    made = client.post("/generate", json={"num_inference_steps": 2}, headers={"X-Request-ID": "mine"})
    client.get("/nowhere")
    until(lambda: len(logged(caplog)) == 2, "two lines")
    first, second = logged(caplog)
    expected = ("POST", "/generate", 200, made.headers["X-Job-ID"])
    assert tuple(vars(first)[name] for name in ("method", "route", "status", "job_id")) == expected
    assert 0 < vars(first)["duration_s"] < PATIENCE_S
    assert first.getMessage().startswith("POST /generate 200 in 0.")
    assert first.getMessage().endswith(f" s, request mine, job {made.headers['X-Job-ID']}")
    assert (vars(second)["route"], vars(second)["status"]) == ("unmatched", 404)
    assert not hasattr(second, "job_id")


def test_a_request_sent_behind_another_has_no_job_of_it(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    body = b'{"num_inference_steps": 2}'
    head = (
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with socket.create_connection(serve().address, PATIENCE_S) as connection:
        connection.sendall(head % len(body) + body + b"GET /info HTTP/1.1\r\nHost: a\r\n\r\n")
        until(lambda: len(logged(caplog)) == 2, "two lines")
    first, second = logged(caplog)
    assert hasattr(first, "job_id")
    assert not hasattr(second, "job_id")


def test_probes_are_not_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    client = serve().client
    for path in PROBES:
        assert client.get(path).status_code == 200
    client.get("/info")
    until(lambda: logged(caplog), "a line")
    assert [vars(record)["route"] for record in logged(caplog)] == ["/info"]


def test_the_access_log_can_be_turned_off(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    server = serve(access_log=False)
    server.client.get("/info")
    until(lambda: server.metric("ddpm_requests_total", route="/info", outcome="2xx") == 1, "the request")
    assert not logged(caplog)


# ── Bodies ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server(serve: Serve) -> httpx.Client:
    """With a route of each kind that reads its body and says how long it was."""
    running = serve()
    for kind, path in ((LimitedRoute, "/limited"), (UploadRoute, "/upload")):
        router = APIRouter(route_class=kind)

        @router.post(path)
        async def length(request: Request) -> Response:
            return JSONResponse(len(await request.body()))

        running.app.include_router(router)
    return running.client


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize(("path", "most"), [("/limited", MAX_BODY_BYTES), ("/upload", MAX_UPLOAD_BYTES)])
def test_the_limit_of_a_body_belongs_to_its_route(
    server: httpx.Client, path: str, most: int, framing: str
) -> None:
    def post(size: int) -> httpx.Response:
        def chunks() -> Iterator[bytes]:
            for start in range(0, size, 65536):
                yield b"x" * min(65536, size - start)

        return server.post(path, content=b"x" * size if framing == "length" else chunks())

    assert post(most).json() == most
    assert problem(post(most + 1), 413, "content_too_large")["title"] == "Content Too Large"


def test_a_route_with_a_limit_injects_nothing() -> None:
    async def takes_a_query(request: Request, n: int) -> None: ...

    def waits(request: Request) -> None: ...

    for endpoint in (takes_a_query, waits):
        with pytest.raises(TypeError, match="coroutine function of `request`"):
            LimitedRoute("/", endpoint)


def test_every_route_that_takes_a_body_has_a_limit(serve: Serve) -> None:
    """Also those that nobody thought of: whatever OpenAPI says takes a body."""
    client = serve().client
    paths = client.get("/openapi.json").json()["paths"]
    taking = [path for path, methods in paths.items() if "requestBody" in methods.get("post", {})]
    assert {"/generate", "/edit", "/interpolate", "/score"} <= set(taking)
    for path in taking:
        large = b'{"image": "' + b"x" * MAX_UPLOAD_BYTES + b'"}'
        response = client.post(path, content=large, headers={"content-type": "application/json"})
        assert response.status_code == 413, path  # in whichever form its errors have


# ── Keys ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", [b"\xff\xfe", "ключ".encode(), b"sesame"])
def test_a_key_is_the_bytes_that_the_environment_has(serve: Serve, key: bytes) -> None:
    client = serve(api_keys=os.fsdecode(key), a1111=True).client
    basic = b64encode(b"anybody:" + key)
    for path, given in (
        ("/info", b"Bearer " + key),
        ("/sdapi/v1/options", b"Basic " + basic),
        ("/info", b"Bearer \xff"),
        ("/sdapi/v1/options", b"Basic \xff"),
        ("/sdapi/v1/options", b"Basic " + b64encode(b"anybody:\xff")),
    ):
        expected = 200 if key in given or basic in given else 401
        assert client.get(path, headers={b"authorization": given}).status_code == expected, given
