"""Both clients do the same: what they have, when they try again, and what they make of odd answers."""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.client import (
    AsyncClient,
    Client,
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    JobCancelled,
    Queued,
    QueueFull,
    ServiceError,
)
from tests.service.client.either import Connect

RESULT = {
    "id": "a1",
    "model": "tiny",
    "images": [{"index": 0, "seed": 7, "b64_json": "AAAA", "media_type": "image/png"}],
    "parameters": {"n": 1, "class_label": None},
    "timings": {"queue_s": 0.0, "run_s": 0.1, "total_s": 0.1},
}
QUEUED = b'event: queued\ndata: {"id": "a1", "position": 0, "eta_s": 0.2, "seed": 7}\nid: a1:1\n\n'
COMPLETED = b"event: completed\ndata: " + json.dumps(RESULT).encode() + b"\nid: a1:2\n\n"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before further attempts; none is waited for."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=found.append))
    monkeypatch.setattr("stamina._core._smart_sleep", sleep)
    return found


@pytest.fixture
def mock(connect: Connect) -> Connect:
    """Makes a client whose requests a function answers."""

    def make(answers: Callable[[httpx.Request], httpx.Response], **options: Any) -> Any:
        return connect("http://service", transport=httpx.MockTransport(answers), **options)

    return make


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    body = {"type": "about:blank", "title": "T", "status": status, "detail": "D", "code": code}
    return httpx.Response(status, json=body, headers=headers)


class Answers:
    """Answers requests by turns: a response, or an exception to raise."""

    def __init__(self, *turns: httpx.Response | Exception) -> None:
        self.turns = list(turns)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        return turn


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that breaks off."""

    def __init__(self, begun: bytes) -> None:
        self.begun = begun

    def __iter__(self) -> Iterator[bytes]:
        yield self.begun
        raise httpx.ReadError("cut")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.begun
        raise httpx.ReadError("cut")


def events(body: bytes | Broken) -> httpx.Response:
    headers = {"content-type": "text/event-stream"}
    if isinstance(body, Broken):
        return httpx.Response(200, stream=body, headers=headers)
    return httpx.Response(200, content=body, headers=headers)


def test_both_have_the_same_methods() -> None:
    def methods(kind: type[Any]) -> dict[str, Any]:
        found = {name: getattr(kind, name) for name in vars(kind) if not name.startswith("_")}
        return {
            name: (list(inspect.signature(method).parameters.values()), method.__doc__)
            for name, method in found.items()
            if "close" not in name
        }

    assert methods(Client) == methods(AsyncClient)
    assert len(methods(Client)) == 10


def test_retry_after_is_honoured(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(
        problem(429, "queue_full", **{"Retry-After": "7"}),
        problem(503, "draining", **{"Retry-After": "3"}),
        httpx.Response(200, json=RESULT),
    )
    assert mock(answers).generate(seed=7).id == "a1"
    assert pauses == [7.0, 3.0]
    assert {request.content for request in answers.requests} == {b'{"seed":7}'}


def test_a_failed_connection_is_tried_again_after_a_pause(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(
        httpx.ConnectError("refused"),
        httpx.Response(200, stream=Broken(b'{"id"')),
        httpx.Response(200, json=RESULT),
    )
    assert mock(answers).generate().id == "a1"
    assert len(pauses) == 2
    assert all(0 < pause <= 5 for pause in pauses)


def test_attempts_come_to_an_end(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(*[problem(429, "queue_full", **{"Retry-After": "1"}) for _ in range(3)])
    with pytest.raises(QueueFull) as refused:
        mock(answers, attempts=3).generate()
    assert refused.value.retry_after_s == 1
    assert pauses == [1.0, 1.0]


@pytest.mark.parametrize(
    "answer",
    [
        lambda: problem(422, "invalid_request"),
        lambda: problem(500, "non_finite"),
        lambda: httpx.ReadTimeout("slow"),
        lambda: httpx.Response(200, content=b"<html>"),
        lambda: httpx.Response(302, headers={"Location": "/elsewhere"}),
        lambda: httpx.Response(502, content=b"Bad Gateway"),
    ],
)
def test_what_is_not_tried_again(
    mock: Connect, pauses: list[float], answer: Callable[[], httpx.Response | Exception]
) -> None:
    with pytest.raises(ClientError):
        mock(Answers(answer())).generate()
    assert pauses == []


def test_an_answer_of_something_else(mock: Connect) -> None:
    with pytest.raises(ServiceError, match="502") as failed:
        mock(Answers(httpx.Response(502, content=b"<html>"))).info()
    assert (failed.value.status, failed.value.code) == (502, "http_502")


def test_a_stream_is_refused_and_then_begins(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(problem(503, "loading", **{"Retry-After": "2"}), events(QUEUED + COMPLETED))
    found = list(mock(answers).stream())
    assert pauses == [2.0]
    assert isinstance(found[0], Queued)


def test_a_cut_stream_is_resumed_with_its_last_event(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(events(Broken(QUEUED)), httpx.ConnectError("down"), events(COMPLETED))
    found = list(mock(answers).stream(seed=7, class_label="dog"))
    assert len(found) == 2
    resumed = answers.requests[-1]
    assert (resumed.method, resumed.url.path) == ("GET", "/stream")
    assert resumed.headers["last-event-id"] == "a1:1"
    assert len(pauses) == 1
    assert found[-1].result.images[0].class_label is None


def test_a_stream_whose_job_is_gone(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(events(Broken(QUEUED)), httpx.Response(204))
    with pytest.raises(ConnectionFailed, match="its job is gone"):
        list(mock(answers).stream())
    assert pauses == []


def test_a_stream_that_makes_no_progress(mock: Connect, pauses: list[float]) -> None:
    answers = Answers(events(QUEUED), *[events(b": ping\n\n") for _ in range(3)])
    with pytest.raises(ConnectionFailed, match="without an event"):
        list(mock(answers, attempts=3).stream())
    assert len(pauses) == 2


def test_events_that_are_not_known_are_passed_over(mock: Connect) -> None:
    news = b"event: weather\ndata: {}\nid: a1:2\n\n"
    assert len(list(mock(Answers(events(QUEUED + news + COMPLETED))).stream())) == 2


def test_an_error_event_is_raised(mock: Connect) -> None:
    body = b'event: error\ndata: {"status": 499, "code": "cancelled", "detail": "D"}\nid: a1:2\n\n'
    with pytest.raises(JobCancelled, match="D"):
        list(mock(Answers(events(QUEUED + body))).stream())


# ── Jobs ───────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_submitted_and_waited_for(
    mock: Connect, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("service.client.blocking.time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr("service.client.asynchronous.asyncio", SimpleNamespace(sleep=sleep))
    state = {"id": "a1", "state": "waiting", "position": 3, "eta_s": 9.0}
    answers = Answers(
        httpx.Response(202, json=state, headers={"Location": "/jobs/a1"}),
        httpx.Response(200, json={**state, "state": "running", "eta_s": 0.5}),
        httpx.Response(200, json={**state, "state": "finished", "result": RESULT}),
    )
    client = mock(answers)
    job = client.submit(n=1)
    assert (job.state, job.position, job.eta_s, job.done) == ("waiting", 3, 9.0, False)
    assert client.wait(job.id).images[0].seed == 7
    assert [request.url.path for request in answers.requests] == ["/generate", "/jobs/a1", "/jobs/a1"]
    assert answers.requests[0].headers["prefer"] == "respond-async"
    assert pauses == [0.5]


def test_a_job_that_failed(mock: Connect) -> None:
    error = {"status": 422, "code": "invalid_request", "detail": "D"}
    answers = Answers(httpx.Response(200, json={"id": "a1", "state": "failed", "error": error}))
    with pytest.raises(InvalidRequest):
        mock(answers).wait("a1")


def test_a_job_that_was_cancelled(mock: Connect) -> None:
    answers = Answers(httpx.Response(200, json={"id": "a1", "state": "cancelled"}))
    with pytest.raises(ClientError, match="a1 is cancelled"):
        mock(answers).wait("a1")


def test_a_job_is_cancelled(mock: Connect) -> None:
    answers = Answers(httpx.Response(204))
    mock(answers).cancel("a1")
    assert (answers.requests[0].method, answers.requests[0].url.path) == ("DELETE", "/jobs/a1")
