"""Errors over HTTP: one format for each wire format, true statuses, and never what was sent."""

from __future__ import annotations

import json
from collections.abc import Mapping

import httpx
import pytest
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from service.errors import QueueFullError
from service.http.forms import read_body
from service.http.middleware import MAX_BODY_BYTES, LimitedRoute
from service.http.problems import ErrorFormats, Problem, problem_json
from service.http.respond import answer
from service.http.state import app_state
from service.tasks.generate import GenerateRequest, prepare_generate
from tests.service.fakes import FakeDenoiser
from tests.service.live import Serve, Threaded, sse

MARK = "zebra-crossing"


def problem(response: httpx.Response, status: int, code: str) -> dict[str, object]:
    """The body of a problem, checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    body: dict[str, object] = response.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, "about:blank")
    assert body["title"]
    assert MARK not in response.text
    return body


BODIES = {
    "not json": MARK.encode(),
    "half": b'{"n": ' + MARK.encode(),
    "empty": b"",
    "not an object": json.dumps([MARK]).encode(),
    "a string": json.dumps({"n": MARK}).encode(),
    "true": b'{"n": true}',
    "a digit in a string": b'{"n": "7"}',
    "nan": b'{"eta": NaN}',
    "infinity": b'{"guidance_scale": -Infinity}',
    "a huge integer": b'{"seed": ' + b"9" * 400 + b"}",
    "one that Python will not parse": b'{"seed": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"sampler": "\\ud800"}',
    "a class with a lone surrogate": b'{"class_label": "\\ud800"}',
    "a lone surrogate as a name": b'{"\\ud800": 1}',
    "an unknown field": json.dumps({MARK: 1}).encode(),
    "an unknown field with a long name": json.dumps({MARK * 1000: 1}).encode(),
    "an unknown value": json.dumps({"sampler": MARK * 1000}).encode(),
    "an unknown class": json.dumps({"class_label": MARK * 1000}).encode(),
    "a class of thousands of digits": json.dumps({"class_label": "7" * 5000}).encode(),
    "not utf-8": b'{"sampler": "\xff\xfe"}',
    "deep": b"[" * 100_000,
}


@pytest.fixture
def server(serve: Serve) -> httpx.Client:
    return serve().client


def test_what_is_invalid_is_a_422_that_echoes_nothing(server: httpx.Client) -> None:
    for name, body in BODIES.items():
        response = server.post("/generate", content=body, headers={"content-type": "application/json"})
        found = problem(response, 422, "invalid_request")
        assert found["title"] == "Unprocessable Content", name
        assert found["errors"], name
        assert len(response.content) < 2000, name
        assert response.headers["vary"] == "Accept"


def test_the_field_is_reported(server: httpx.Client) -> None:
    found = problem(server.post("/generate", json={"n": 0, "steps": 5}), 422, "invalid_request")
    errors = found["errors"]
    assert isinstance(errors, list)
    assert {error["field"] for error in errors} == {"n", "steps"}
    assert "n: " in str(found["detail"])
    found = problem(server.get("/stream", params={"eta": "9"}), 422, "invalid_request")
    assert found["errors"] == [{"field": "eta", "message": "Input should be less than or equal to 1"}]
    found = problem(server.post("/generate", json={"n": 1000}), 422, "invalid_request")
    assert found["errors"] == [{"field": "n", "message": "At most 64 images per request."}]


def test_an_unhandled_bug_is_a_500_with_the_requests_id(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    async def broken() -> None:
        raise LookupError(MARK)

    server.app.add_api_route("/broken", broken)
    response = server.client.get("/broken", headers={"x-request-id": "abc"})
    problem(response, 500, "internal")
    assert response.headers["x-request-id"] == "abc"
    assert MARK in caplog.text
    assert server.metric("ddpm_requests_total", route="/broken", outcome="5xx") == 1


def test_nobody_is_told_to_wait_for_more_than_two_minutes(serve: Serve) -> None:
    server = serve()

    async def busy() -> None:
        raise QueueFullError("Busy.", 1000.0)

    server.app.add_api_route("/busy", busy)
    assert server.client.get("/busy").headers["retry-after"] == "120"


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_large_body_is_a_413(server: httpx.Client, framing: str) -> None:
    large = b'{"class_label": "' + b"x" * (1 << 20) + b'"}'
    content = large if framing == "length" else (large[i : i + 65536] for i in range(0, len(large), 65536))
    response = server.post("/generate", content=content, headers={"content-type": "application/json"})
    assert problem(response, 413, "content_too_large")["title"] == "Content Too Large"


def test_no_such_route(server: httpx.Client) -> None:
    problem(server.get(f"/{MARK}"), 404, "not_found")
    problem(server.get("/web/nothing.js"), 404, "not_found")


def test_no_such_method(server: httpx.Client) -> None:
    refused = server.get("/edit")
    problem(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "POST"
    assert server.delete("/stream").status_code == 405


def test_head_and_options_do_no_harm(serve: Serve) -> None:
    server = serve()
    for path in ("/", "/stream", "/generate", "/metrics"):
        head = server.client.head(path)
        assert head.status_code in (200, 405)
        assert head.content == b""
        assert server.client.options(path).status_code == 405
    assert server.denoiser.starts == []


def test_request_ids_come_back(server: httpx.Client) -> None:
    assert server.get("/livez", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = [server.get("/livez").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    assert server.get("/livez", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


# ── Another wire format ────────────────────────────────────────────────────────────────────────


def toy_error(problem: Problem, headers: Mapping[str, str]) -> Response:
    return JSONResponse({"toy": problem.code}, problem.status, dict(headers))


def with_toy_format(server: Threaded) -> Threaded:
    """What a module with a format of its own does: a router, and a form for the errors below its prefix."""
    router = APIRouter(prefix="/toy", route_class=LimitedRoute)

    @router.get("/bug")
    async def bug(request: Request) -> None:
        raise LookupError(MARK)

    @router.post("/generate")
    async def generate(request: Request) -> Response:
        body = await read_body(request, GenerateRequest)
        prepared = prepare_generate(body, app_state(request).capabilities)
        return await answer("application/json", prepared, request)

    server.app.include_router(router)
    server.app.state.error_formats.register("/toy", toy_error)
    return server


def toy(response: httpx.Response, status: int, code: str) -> None:
    assert (response.status_code, response.json()) == (status, {"toy": code})
    assert response.headers["x-request-id"]


def test_errors_below_a_prefix_have_a_form_of_their_own(serve: Serve) -> None:
    server = with_toy_format(serve(FakeDenoiser(raises={7: ValueError}), max_queue=1))
    client = server.client
    assert client.post("/toy/generate", json={"num_inference_steps": 1}).status_code == 200
    toy(client.get("/toy/nothing"), 404, "not_found")
    toy(client.get("/toy/generate"), 405, "method_not_allowed")
    toy(client.post("/toy/generate", json={"n": 0}), 422, "invalid_request")
    toy(client.post("/toy/generate", json={"class_label": "cow"}), 422, "invalid_request")
    large = b" " * (MAX_BODY_BYTES + 1)
    kind = {"content-type": "application/json"}
    toy(client.post("/toy/generate", content=large, headers=kind), 413, "content_too_large")
    toy(client.post("/toy/generate", json={"deadline_s": 1e-6}), 504, "deadline_exceeded")
    toy(client.post("/toy/generate", json={"seed": 7}), 500, "compute_failed")
    server.gate.shut()
    with client.stream("GET", "/stream?preview=none") as running:
        events = sse(running)
        next(events)
        refused = client.post("/toy/generate", json={})
        toy(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        problem(client.post("/generate", json={}), 429, "queue_full")
        server.gate.open()
    problem(client.post("/toys"), 404, "not_found")
    problem(client.post("/generate/toy"), 404, "not_found")


def test_a_draining_service_refuses_in_the_form_of_the_path(serve: Serve) -> None:
    server = with_toy_format(serve())
    server.state.engine.drain()
    toy(server.client.post("/toy/generate", json={}), 503, "draining")
    problem(server.client.post("/generate", json={}), 503, "draining")


def test_an_unhandled_bug_is_reported_in_the_form_of_the_path(serve: Serve) -> None:
    toy(with_toy_format(serve()).client.get("/toy/bug"), 500, "internal")


def test_the_longest_prefix_decides() -> None:
    formats = ErrorFormats()
    formats.register("/toy", toy_error)
    formats.register("/toy/plain", problem_json)
    assert formats.of("/toy") is formats.of("/toy/a/b") is toy_error
    assert formats.of("/toy/plain") is formats.of("/toy/plain/a") is problem_json
    assert formats.of("/toys") is formats.of("/") is problem_json


def test_a_missing_key_is_reported_in_the_form_of_the_path(serve: Serve) -> None:
    client = with_toy_format(serve(api_keys="sesame")).client
    refused = client.post("/toy/generate", json={})
    toy(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"] == "Bearer"
    toy(client.get("/toy/nothing"), 401, "unauthorized")
    problem(client.post("/generate", json={}), 401, "unauthorized")
