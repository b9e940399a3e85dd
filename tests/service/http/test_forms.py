"""Every way in which clients send a body, read in one place; what is wrong with one is said by name."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from service.http.forms import HALVES
from tests.service.http.test_problems import problem
from tests.service.live import serving

ROUTES = {
    "/generate": b"{}",
    "/edit": b'{"image": "%b"}' % HALVES.encode(),
    "/interpolate": b'{"seeds": [1, 2]}',
    "/score": b'{"images": ["%b"]}' % HALVES.encode(),
}
"""Those that take a body, with one that each of them understands."""


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server with a fake denoiser."""
    servers = serving()
    yield next(servers)().client
    next(servers, None)


def refusal(response: httpx.Response) -> str:
    return str(problem(response, 422, "invalid_request")["detail"])


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n "])
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_may_begin_with_a_byte_order_mark(
    client: httpx.Client, path: str, before: bytes, kind: str
) -> None:
    response = client.post(path, content=before + ROUTES[path], headers={"content-type": kind})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ROUTES)
def test_a_second_mark_is_no_json(client: httpx.Client, path: str) -> None:
    content = 2 * b"\xef\xbb\xbf" + ROUTES[path]
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert "Invalid JSON" in refusal(response)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_body_is_said_to_be_empty(client: httpx.Client, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert "body is empty" in refusal(response)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, ["Content-Type", "There is none", "{}"]),
        ({"content-type": "application/x-www-form-urlencoded"}, ["Content-Type", "-d", "--json", "-F"]),
        ({"content-type": "text/secret"}, ["Content-Type", "application/json", "multipart/form-data"]),
    ],
)
def test_another_media_type_is_answered_by_the_header_and_the_remedy(
    client: httpx.Client, path: str, headers: dict[str, str], named: list[str]
) -> None:
    detail = refusal(client.post(path, content=b"n=1", headers=headers))
    assert [word for word in named if word not in detail] == []
    assert "secret" not in detail
