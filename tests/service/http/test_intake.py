"""Bodies with pictures: how many bytes are held, when they are decoded and by whom, and what becomes late."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from service.errors import QueueFullError
from service.http.forms import HALVES
from service.http.intake import Bodies, Decoders, Intake
from service.tasks import edit, uploads
from tests.service.fakes import PATIENCE_S, until
from tests.service.http.test_problems import problem
from tests.service.live import ROOT, Serve, Threaded

EDIT = {"image": HALVES, "num_inference_steps": 2}


class Held:
    """Holds up the decoding of pictures at a gate, and counts it."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = 0

    def __call__(self, *arguments: object) -> object:
        self.begun += 1
        assert self.opened.wait(PATIENCE_S)
        return uploads.decode(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """In place of what decodes the picture of an edit."""
    found = Held()
    monkeypatch.setattr(edit, "decode", found)
    yield found
    found.opened.set()


def taken(server: Threaded) -> Callable[[int], bool]:
    """Whether so many uploads wait for a thread."""
    return lambda count: server.state.decoders._queue.qsize() >= count


# ── Decoding ───────────────────────────────────────────────────────────────────────────────────


def test_few_are_decoded_at_once_few_wait_and_the_rest_is_refused(serve: Serve, held: Held) -> None:
    server = serve()
    server.state.decoders = Decoders(threads=1, waiting=2)
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(server.client.post, "/edit", json=EDIT)]
        until(lambda: held.begun == 1, "the first")
        sent += [pool.submit(server.client.post, "/edit", json=EDIT) for _ in range(2)]
        until(lambda: taken(server)(2), "those that wait")
        refused = server.client.post("/edit", json=EDIT)
        problem(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert server.client.post("/generate", json={"num_inference_steps": 1}).status_code == 200
        held.opened.set()
        assert [each.result().status_code for each in sent] == [200, 200, 200]


def test_answers_need_none_of_the_threads_that_decode(serve: Serve, held: Held) -> None:
    server = serve(max_queue=64)
    with ThreadPoolExecutor(34) as pool:
        sent = [pool.submit(server.client.post, "/edit", json=EDIT) for _ in range(32)]
        until(lambda: taken(server)(20), "uploads that wait")
        many = {"num_inference_steps": 1, "n": 32, "scale": 8}
        assert server.client.post("/generate", json=many).status_code == 200
        held.opened.set()
        assert {each.result().status_code for each in sent} == {200}


def test_nothing_is_decoded_for_a_job_that_would_be_refused(serve: Serve, held: Held) -> None:
    server = serve(max_queue=1)
    server.gate.shut()
    with server.client.stream("GET", "/stream?preview=none") as stream:
        content = stream.iter_bytes()
        next(content)
        problem(server.client.post("/edit", json=EDIT), 429, "queue_full")
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
        problem(server.client.post("/edit", json=EDIT), 503, "draining")
        assert held.begun == 0
        server.gate.open()
        list(content)


def test_a_deadline_counts_from_the_arrival(serve: Serve, held: Held) -> None:
    server = serve()
    refused = server.client.post("/edit", json={**EDIT, "deadline_s": 0.1})
    problem(refused, 504, "deadline_exceeded")
    assert held.begun == 1


def test_what_decoding_took_is_part_of_a_jobs_time(serve: Serve, held: Held) -> None:
    server = serve()
    with ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        sent = pool.submit(server.client.post, "/edit", json=EDIT)
        until(lambda: held.begun == 1, "the decoding")
        until(lambda: time.monotonic() > begun + 0.2, "some time")
        held.opened.set()
        assert sent.result().json()["timings"]["queue_s"] > 0.1


def test_nothing_is_decoded_for_a_client_that_has_gone(serve: Serve, held: Held) -> None:
    server = serve()
    server.state.decoders = Decoders(threads=1)
    body = json.dumps(EDIT).encode()
    head = b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.client.post, "/edit", json=EDIT)
        until(lambda: held.begun == 1, "the first")
        with socket.create_connection(server.address, PATIENCE_S) as connection:
            connection.sendall(head % len(body) + body)
            until(lambda: taken(server)(1), "the second")
        until(lambda: server.metric("ddpm_requests_total", route="/edit", outcome="4xx") == 1, "its end")
        held.opened.set()
        assert first.result().status_code == 200
        assert server.client.post("/edit", json=EDIT).status_code == 200
    assert held.begun == 2


def test_a_decoder_that_does_not_return_does_not_hold_up_the_exit(serve: Serve, held: Held) -> None:
    server = serve(drain_s=0.05)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.client.post, "/edit", json=EDIT)
        until(lambda: held.begun == 1, "the decoding")
        server.server.handle_exit(signal.SIGTERM, None)
        server.wait_for_exit()
        assert not held.opened.is_set()


def test_calls_give_what_they_return_or_raise() -> None:
    async def scenario() -> None:
        decoders = Decoders(threads=2)
        try:
            assert await asyncio.gather(*(decoders.run(pow, 2, power) for power in range(9))) == [
                2**power for power in range(9)
            ]
            with pytest.raises(ZeroDivisionError):
                await decoders.run(divmod, 1, 0)
        finally:
            decoders.close()

    asyncio.run(scenario())
    until(lambda: not [each for each in threading.enumerate() if each.name == "decoder"], "their end")


# ── Bytes ──────────────────────────────────────────────────────────────────────────────────────


def test_bytes_are_counted_over_all_bodies() -> None:
    bodies = Bodies(10)
    first, second = Intake(bodies), Intake(bodies)
    first.take(6)
    second.take(4)
    with pytest.raises(QueueFullError):
        second.take(1)
    first.release()
    first.release()
    second.take(6)
    assert bodies.held == 10
    second.release()
    assert bodies.held == 0


def test_a_body_too_many_is_refused_and_the_others_are_not(serve: Serve, held: Held) -> None:
    server = serve()
    server.state.bodies.limit = 3 << 19
    large = {**EDIT, "image": HALVES + " " * (1 << 20)}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.client.post, "/edit", json=large)
        until(lambda: held.begun == 1, "the first")
        refused = server.client.post("/edit", json=large)
        problem(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        held.opened.set()
        assert first.result().status_code == 200
    assert server.client.post("/edit", json=large).status_code == 200
    assert server.state.bodies.held == 0


def test_a_body_is_let_go_once_it_is_decoded(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    sent: list[Future[httpx.Response]] = []
    with ThreadPoolExecutor(4) as pool:
        for path, body in (
            ("/edit", EDIT),
            ("/score", {"images": [HALVES]}),
            ("/v1/images/edits", {"prompt": "cat", "image": HALVES}),
            ("/generate", {"num_inference_steps": 2}),
        ):
            sent.append(pool.submit(server.client.post, path, json=body))
        until(lambda: len(server.state.engine._in_flight) == 4, "the jobs")
        held = server.state.bodies.held
        server.gate.open()
        assert held == 0
        assert [each.result().status_code for each in sent] == [200, 200, 200, 200]


# ── A process ──────────────────────────────────────────────────────────────────────────────────

STUCK = """
import asyncio, threading
from service.http.intake import Decoders

async def main():
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stuck():
        loop.call_soon_threadsafe(begun.set)
        threading.Event().wait()

    waiting = asyncio.create_task(Decoders().run(stuck))
    await begun.wait()
    waiting.cancel()

asyncio.run(main())
print("over")
"""


def test_a_process_ends_while_a_picture_is_being_decoded() -> None:
    command = [sys.executable, "-c", STUCK]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PATIENCE_S, check=True)
    assert ended.stdout == b"over\n"
