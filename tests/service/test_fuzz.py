"""Every operation of the OpenAPI description, by requests that follow it and requests that break it.

`make test` takes the same few requests each time. `make fuzz` sets FUZZ_EXAMPLES: so many of each operation,
others each time, and the boundaries of every field.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.app import create_app, is_open
from tests.service.fakes import PATIENCE_S
from tests.service.live import Serve, Threaded, serving, settings

MANY = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FEW = 3
KEY = "a-key-that-nobody-knows"
DOCUMENT: dict[str, Any] = create_app(settings(a1111=True)).openapi()
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
REFUSALS = ["2xx", "3xx", "4xx", "503", "504"]
"""Every status but those of a bug: with a network that cannot fail, 500 is one."""
ACCEPT = (
    "*/*",
    "application/json",
    "text/event-stream",
    "image/webp",
    "text/html;q=0.1, */*;q=0",
)
PREFER = ("", "respond-async", "wait=1")


def described() -> Any:
    """The operations as schemathesis knows them."""
    config = schemathesis.Config()
    project = config.projects.default
    project.generation.deterministic = not MANY
    project.generation.max_examples = MANY or FEW
    project.generation.database = "none"
    project.phases.coverage.enabled = bool(MANY)
    project.checks.not_a_server_error.expected_statuses = REFUSALS
    return schemathesis.openapi.from_dict(DOCUMENT, config=config)


schema = described()
EXAMPLES = [
    (path, example["value"])
    for path, methods in DOCUMENT["paths"].items()
    for content in methods.get("post", {}).get("requestBody", {}).get("content", {}).values()
    for example in content.get("examples", {}).values()
]
POSTS = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    """Few images a request: what is asked for at random ends soon."""
    servers = serving()
    yield next(servers)(a1111=True, max_images=8, stream_grace_s=0.0)
    next(servers, None)


@pytest.fixture(scope="module")
def locked() -> Iterator[Threaded]:
    """A server with a key."""
    servers = serving()
    yield next(servers)(a1111=True, api_keys=KEY)
    next(servers, None)


@schema.parametrize()
def test_every_answer_is_as_described(case: Any, server: Threaded) -> None:
    response = case.call(base_url=server.url, timeout=PATIENCE_S)
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize("accept", ACCEPT)
def test_every_form_of_an_answer_is_as_described(accept: str, server: Threaded) -> None:
    for path, body in EXAMPLES:
        for prefer in PREFER:
            headers = {"Accept": accept, "Prefer": prefer}
            response = server.client.post(path, json=body, headers=headers)
            assert response.status_code in (200, 202, 400, 406), response.text
            check(path, "POST", response)


@schema.parametrize()
def test_without_its_key_nothing_but_what_is_open_answers(case: Any, locked: Threaded) -> None:
    headers = {"Authorization": f"Bearer {KEY[:-1]}"}
    response = case.call(base_url=locked.url, headers=headers, timeout=PATIENCE_S)
    case.validate_response(response, checks=CHECKS)
    assert is_open(case.operation.path) or response.status_code == 401


@pytest.mark.parametrize("path", POSTS)
def test_a_body_of_any_bytes_is_answered_as_described(path: str, server: Threaded) -> None:
    """Bodies that break a parser before any schema is looked at."""
    types = st.sampled_from(
        [
            b"application/json",
            b"multipart/form-data",
            b"multipart/form-data; boundary=b",
            b"text/plain",
            b"\xff",
        ]
    )
    starts = st.sampled_from(
        [b"", b"{", b"[" * 10_000, b'{"n": 1e400}', b'{"a":"\\ud800"}', b"--b\r\n", b"--b"]
    )

    @given(kind=types, start=starts, rest=st.binary(max_size=200))
    @examples(
        max_examples=MANY or 8,
        derandomize=not MANY,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def send(kind: bytes, start: bytes, rest: bytes) -> None:
        response = server.client.post(path, content=start + rest, headers={b"Content-Type": kind})
        assert response.status_code < 500
        check(path, "POST", response)

    send()


def test_the_states_of_a_job_are_as_described(serve: Serve) -> None:
    """The ids above are those of no job."""
    job = "/jobs/{job_id}"
    server = serve()
    server.gate.shut()
    try:
        posted = server.client.post("/generate", json={"seed": 1}, headers={"Prefer": "respond-async"})
        check("/generate", "POST", posted)
        address = posted.headers["location"]
        waiting = server.client.get(address, params={"preview": True}, headers={"Accept": "image/png"})
        assert waiting.status_code == 202
        check(job, "GET", waiting)
        cancelled = server.client.post("/generate", json={"seed": 1}, headers={"Prefer": "respond-async"})
        assert server.client.delete(cancelled.headers["location"]).status_code == 204
    finally:
        server.gate.open()
    ended = [finished(server.client, each.headers["location"]) for each in (posted, cancelled)]
    for each in ended:
        check(job, "GET", each)
    assert [each.json()["state"] for each in ended] == ["finished", "cancelled"]


def check(path: str, method: str, response: httpx.Response) -> None:
    """Whether an answer is one of those that are described."""
    described = DOCUMENT["paths"][path][method.lower()]["responses"]
    assert str(response.status_code) in described
    schema[path][method].validate_response(response)


def finished(client: httpx.Client, address: str) -> httpx.Response:
    """The answer of a job that is over: its events end when it does."""
    client.get(address, headers={"Accept": "text/event-stream"})
    return client.get(address)
