"""Problems as exceptions."""

from __future__ import annotations

import pickle

import httpx
import pytest

from service.client.errors import (
    ConnectionFailed,
    QueueFull,
    ServiceError,
    from_problem,
    from_response,
    from_transport,
    when_to_try_again,
)
from service.http.problems import STATUS


def test_every_status_of_the_service_has_a_class() -> None:
    assert set(STATUS.values()) - {406} <= set(ServiceError.by_status)


def test_an_error_says_what_the_problem_says() -> None:
    problem = {"status": 429, "code": "queue_full", "detail": "All slots are taken."}
    response = httpx.Response(429, json=problem, headers={"Retry-After": "4", "X-Request-ID": "r1"})
    error = from_response(response)
    assert isinstance(error, QueueFull)
    assert (error.request_id, error.retry_after_s) == ("r1", 4.0)
    assert str(error) == "All slots are taken. (queue_full)"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301


def test_a_status_of_a_proxy() -> None:
    error = from_response(httpx.Response(418, content=b"?"))
    assert type(error) is ServiceError
    assert (error.code, error.status) == ("http_418", 418)


@pytest.mark.parametrize(
    ("header", "pause"), [("4", 4.0), ("Fri, 27 Nov 2026 08:00:00 GMT", True), (None, True)]
)
def test_the_pause_is_that_of_the_header(header: str | None, pause: float | bool) -> None:
    headers = {} if header is None else {"retry-after": header}
    found = when_to_try_again(from_problem({"status": 503}, headers))
    assert (found, type(found)) == (pause, type(pause))


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.RemoteProtocolError("closed"), True),
        (httpx.ReadTimeout("slow"), False),
        (httpx.UnsupportedProtocol("ftp"), False),
    ],
)
def test_which_failures_are_worth_another_try(error: httpx.TransportError, again: bool) -> None:
    assert when_to_try_again(from_transport(error, "http://service")) is again


def test_a_failure_names_the_address() -> None:
    error = from_transport(httpx.ReadTimeout(""), "http://service/info")
    assert isinstance(error, ConnectionFailed)
    assert str(error) == "http://service/info: no answer in time"


def test_other_errors_are_final() -> None:
    assert when_to_try_again(from_problem({"status": 422})) is False
    assert when_to_try_again(ValueError()) is False
