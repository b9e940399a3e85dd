"""What a request leaves behind, however it ends."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.types import Message

from service.engine.jobs import JobSpec
from service.http.answers import EventPresenter
from service.http.respond import EventStream
from tests.service.fakes import until
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, sse
from tests.service.tasks.test_sampling import prepare


def streams(server: Threaded) -> int:
    return len(server.state.streams._streams)


@pytest.mark.parametrize("path", ["/stream", "/generate"])
def test_a_refused_stream_leaves_nothing_behind(serve: Serve, path: str) -> None:
    server = serve(max_queue=1, stream_grace_s=1000.0)
    accept = {"accept": "text/event-stream"}

    def ask(**fields: object) -> int:
        if path == "/stream":
            query = "&".join(f"{name}={value}" for name, value in fields.items())
            return server.client.get(f"/stream?{query}").status_code
        return server.client.post(path, json=fields, headers=accept).status_code

    assert ask(deadline_s=1e-6) == 504
    assert streams(server) == 0
    server.gate.shut()
    with server.client.stream("GET", "/stream") as running:
        events = sse(running)
        next(events)
        for _ in range(3):
            assert ask(seed=1) == 429
        assert streams(server) == 1  # the one that runs
        server.gate.open()
        list(events)
    until(lambda: server.state.engine.idle)
    kept = streams(server)  # one that is over, for its grace period
    server.state.engine.drain()
    assert ask(seed=1) == 503
    assert streams(server) == kept


def test_a_client_that_vanishes_before_the_first_event_is_noticed(serve: Serve) -> None:
    """Even inside a step, when the engine announces nothing."""
    server = serve(stream_grace_s=0.05)
    server.gate.shut()
    with server.client.stream("GET", "/stream?num_inference_steps=60&preview=none") as running:
        events = sse(running)  # held: once it is collected, its connection is closed
        first = next(events).data["id"]
        server.gate.wait_for_arrival(1)
        with socket.create_connection(server.address) as client:
            client.sendall(b"GET /stream?seed=5 HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: streams(server) == 2, "the second stream")
        until(lambda: streams(server) == 1, "its end")
        assert server.gate.arrived == 1
        assert set(server.state.streams._streams) == {first}
        server.gate.allow(1)
        until(lambda: server.metric("ddpm_cancelled_total") == 1, "its cancellation")
        assert set(server.state.engine._in_flight) == {first}
        server.gate.open()
        assert [event.name for event in events] == ["completed"]


def test_a_job_that_is_not_streamed_cannot_be_resumed(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(server.client.post, "/generate", json={"num_inference_steps": 2})
        server.gate.wait_for_arrival(1)
        (job_id,) = server.state.streams._streams
        resumed = server.client.get("/stream", headers={"last-event-id": f"{job_id}:1"})
        assert resumed.status_code == 204
        server.gate.open()
        assert posted.result().json()["id"] == job_id
    assert streams(server) == 0


def test_a_stream_that_is_forgotten_before_it_is_resumed_is_over(serve: Serve) -> None:
    """Between the look for it and the answer: nothing would ever come of a new stream under its id."""
    server = serve()
    presenter = EventPresenter(prepare({}), "tiny")
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(EventStream(presenter, server.state)({"type": "http"}, receive, send))
    assert sent[0]["status"] == 204
    assert streams(server) == 0


def test_a_stream_that_cannot_be_sent_is_a_problem_of_its_own(serve: Serve) -> None:
    """A refusal comes before the answer begins, so it is no broken 200."""
    server = serve(max_queue=1)
    server.gate.shut()
    with server.client.stream("GET", "/stream") as running:
        events = sse(running)
        next(events)
        refused = server.client.get("/stream")
        problem(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        server.gate.open()


@pytest.mark.parametrize(
    ("accept", "preview"),
    [("application/json", "none"), ("image/png", "none"), ("text/event-stream", "both")],
)
def test_only_a_stream_asks_the_engine_for_previews(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, accept: str, preview: str
) -> None:
    server = serve()
    submitted: list[JobSpec] = []
    submit = server.state.engine.submit

    def watched(spec: JobSpec) -> None:
        submitted.append(spec)
        submit(spec)

    monkeypatch.setattr(server.state.engine, "submit", watched)
    body = {"num_inference_steps": 2, "preview": "both"}
    assert server.client.post("/generate", json=body, headers={"accept": accept}).status_code == 200
    assert [spec.preview for spec in submitted] == [preview]
