"""Which names the service answers to, and what pages of other sites may have a browser ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.http.callers import Hosts, hosts_of
from tests.service.http.test_problems import problem
from tests.service.live import Threaded, serving

OURS = "https://ours.example"
STEPS = {"num_inference_steps": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    """As it starts by default, but for one origin whose pages may call it."""
    for serve in serving():
        yield serve(allowed_hosts=(), cors_origins=(OURS,))


# ── Names ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "app.localhost:80",
        "127.0.0.1:8000",
        "[::1]:8000",
        "10.0.0.7",
        "localhost.",
    ],
)
def test_a_local_service_answers_to_local_names_and_addresses(server: Threaded, host: str) -> None:
    assert server.client.get("/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "x"]
)
def test_it_does_not_answer_to_a_name_that_was_made_to_lead_to_it(server: Threaded, host: str) -> None:
    problem(server.client.get("/info", headers={"Host": host}), 403, "host_not_allowed")
    answer = server.client.post("/v1/images/generations", json={}, headers={"Host": host})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")
    assert server.client.get("/livez", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("allowed", "bound_to", "keys", "host", "answers"),
    [
        ((), "127.0.0.1", False, "a.example", False),
        ((), "localhost", False, "a.example", False),
        ((), "::1", False, "a.example", False),
        ((), "127.0.0.1", True, "a.example", True),  # a page has no key
        ((), "0.0.0.0", False, "a.example", True),
        (("*",), "127.0.0.1", False, "a.example", True),
        (("a.example",), "127.0.0.1", False, "A.example:443", True),
        (("a.example",), "0.0.0.0", True, "b.example", False),
        (("a.example",), "127.0.0.1", False, "localhost", False),
        (("*.a.example",), "0.0.0.0", False, "b.a.example", True),
        (("*.a.example",), "0.0.0.0", False, "a.example", False),
        (("[fd00::1]",), "0.0.0.0", False, "[fd00::1]:80", True),
    ],
)
def test_names_are_those_of_the_settings(
    allowed: tuple[str, ...], bound_to: str, keys: bool, host: str, answers: bool
) -> None:
    hosts = hosts_of(allowed, bound_to, keys=keys)
    assert (hosts is None or host in hosts) == answers


def test_nothing_is_allowed_by_nothing() -> None:
    assert "" not in Hosts(())


# ── Sites ──────────────────────────────────────────────────────────────────────────────────────


def asked(server: Threaded, method: str, path: str, **headers: str) -> httpx.Response:
    """The answer to what a browser asks for; underscores of headers are hyphens."""
    body: dict[str, Any] = {"json": STEPS} if method == "POST" else {}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with server.client.stream(method, path, headers=named, **body) as response:
        if response.status_code != 200:
            response.read()
        return response


WORK = [
    ("GET", "/stream?num_inference_steps=1"),
    ("GET", "/generate?num_inference_steps=1"),
    ("POST", "/generate"),
]


@pytest.mark.parametrize(("method", "path"), [*WORK, ("POST", "/edit"), ("DELETE", "/jobs/x")])
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_starts_nothing(server: Threaded, method: str, path: str, site: str) -> None:
    for more in ({}, {"Origin": "https://evil.example"}, {"Referer": f"https://evil.example/?{OURS}"}):
        answer = asked(server, method, path, Sec_Fetch_Site=site, Sec_Fetch_Dest="image", **more)
        problem(answer, 403, "cross_site")


@pytest.mark.parametrize(("method", "path"), WORK)
@pytest.mark.parametrize(
    "headers",
    [
        {},  # no browser
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "cross-site", "Origin": OURS},
        {"Sec_Fetch_Site": "cross-site", "Referer": f"{OURS}/gallery?page=2"},
    ],
    ids=["program", "own page", "typed", "allowed origin", "picture on an allowed page"],
)
def test_own_and_allowed_pages_do(server: Threaded, method: str, path: str, headers: dict[str, str]) -> None:
    assert asked(server, method, path, **headers).status_code == 200


def test_a_link_may_be_followed_but_not_posted(server: Threaded) -> None:
    headers = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert asked(server, "GET", "/generate?num_inference_steps=1", **headers).status_code == 200
    problem(asked(server, "POST", "/generate", **headers), 403, "cross_site")


def test_what_does_no_work_may_be_asked_from_anywhere(server: Threaded) -> None:
    assert asked(server, "GET", "/info", Sec_Fetch_Site="cross-site").status_code == 200
