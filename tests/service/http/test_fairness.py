"""One client among several, over real sockets: whose slots they are, and that others are served meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from service.engine import streams
from service.http.middleware import address_of
from service.http.problems import MAX_RETRY_AFTER_S
from service.protocol import SEND_TIMEOUT_S, HttpProtocol
from tests.service.fakes import until
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, sse

KEYS = {"api_keys": "greedy-key,other-key"}
GREEDY, OTHER = {"authorization": "Bearer greedy-key"}, {"authorization": "Bearer other-key"}


def generate(server: Threaded, headers: dict[str, str], n: int = 1, steps: int = 4) -> httpx.Response:
    return server.client.post(
        "/generate", json={"n": n, "seed": 1, "num_inference_steps": steps}, headers=headers
    )


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def slots(server: Threaded, client: str) -> float:
    return server.metric("ddpm_client_slots_in_use", client=client)


def test_a_key_leaves_room_for_another(serve: Serve, pool: ThreadPoolExecutor) -> None:
    server = serve(**KEYS, max_queue=16, max_batch_size=4)
    server.gate.shut()
    asked = [pool.submit(generate, server, GREEDY, 4, 4) for _ in range(5)]
    until(lambda: sum(answer.done() for answer in asked) == 2, "two refusals")
    assert slots(server, "1") == 12
    refused = problem(next(each.result() for each in asked if each.done()), 429, "client_limit")
    assert "12 images in flight, and may have 12" in str(refused["detail"])
    other = pool.submit(generate, server, OTHER, 1, 4)
    until(lambda: slots(server, "2") == 1, "the other's slot")
    # Of four rows in each step the other has its one, however much the first has in flight.
    server.gate.allow(6)
    assert other.result(20).status_code == 200
    assert slots(server, "1") == 12
    assert server.metric("ddpm_client_rejected_total", client="1") == 2
    assert server.metric("ddpm_client_rejected_total", client="2") == 0
    server.gate.open()
    assert sorted(answer.result().status_code for answer in asked) == [200, 200, 200, 429, 429]
    assert "greedy" not in server.client.get("/metrics").text


def test_who_was_refused_comes_before_who_has_most(serve: Serve, pool: ThreadPoolExecutor) -> None:
    server = serve(**KEYS, max_queue=8, max_queue_per_key=8)
    server.gate.shut()
    asked = [pool.submit(generate, server, GREEDY, 2, 2 + 2 * i) for i in range(4)]
    until(lambda: slots(server, "1") == 8, "a full queue")
    answer = generate(server, OTHER, 2)
    problem(answer, 429, "queue_full")
    assert 1 <= int(answer.headers["retry-after"]) <= MAX_RETRY_AFTER_S
    server.gate.allow(4)
    until(lambda: slots(server, "1") < 8, "the end of the first job")
    problem(generate(server, GREEDY, 1), 429, "client_limit")
    other = pool.submit(generate, server, OTHER, 2)
    until(lambda: slots(server, "2") == 2, "its slots")
    server.gate.open()
    assert other.result().status_code == 200
    assert all(each.result().status_code == 200 for each in asked)


def test_without_keys_an_address_is_a_client_that_may_have_everything(serve: Serve) -> None:
    server = serve(max_queue=4)
    server.gate.shut()
    with server.client.stream("GET", "/stream?n=4&num_inference_steps=2") as running:
        events = sse(running)
        next(events)
        assert slots(server, "none") == 4
        (job,) = server.state.engine._in_flight.values()
        assert job.spec.owner == "127.0.0.1"
        problem(generate(server, {}, 1), 429, "queue_full")
        server.gate.open()
        list(events)
    assert slots(server, "none") == 0


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("a:b", "a:b"),
        (None, ""),
    ],
)
def test_addresses(host: str | None, name: str) -> None:
    assert address_of({"client": None if host is None else (host, 1)}) == name


# ── Streams ────────────────────────────────────────────────────────────────────────────────────


def test_open_streams_are_bounded_for_each_key(serve: Serve) -> None:
    server = serve(**KEYS, max_streams_per_key=1)
    server.gate.shut()
    with ExitStack() as open_streams:

        def begin(headers: dict[str, str]) -> httpx.Response:
            path = "/stream?num_inference_steps=2"
            return open_streams.enter_context(server.client.stream("GET", path, headers=headers))

        first = begin(GREEDY)
        refused = begin(GREEDY)
        refused.read()
        problem(refused, 429, "client_limit")
        assert server.metric("ddpm_rejected_total", reason="client_limit") == 1
        assert server.metric("ddpm_streams_open") == 1
        server.gate.open()
        until(lambda: server.state.engine.idle, "its end")  # which its reader has not seen
        assert begin(OTHER).status_code == 200
        first.close()
        until(lambda: not server.state._open_streams["1"], "its place")
        assert begin(GREEDY).status_code == 200


def test_dropped_streams_are_given_up_soon_when_somebody_is_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after the grace period, which holds only as long as nobody else wants the slots."""
    monkeypatch.setattr(streams, "SHORT_GRACE_S", 0.2)
    server = serve(**KEYS, max_queue=8, max_queue_per_key=8, stream_grace_s=1000.0)
    server.gate.shut()
    with server.client.stream("GET", "/stream?n=8&num_inference_steps=90", headers=GREEDY) as dropped:
        next(sse(dropped))
    until(lambda: server.state.streams.followed == 0, "the drop")
    assert slots(server, "1") == 8
    refused = generate(server, OTHER, 4)
    problem(refused, 429, "queue_full")
    assert refused.headers["retry-after"] == "1"
    until(lambda: not server.state.streams._streams, "the end of its stream")
    server.gate.allow(3)
    until(lambda: server.metric("ddpm_cancelled_total") == 1, "what was dropped to be cancelled")
    server.gate.open()
    assert generate(server, OTHER, 4, 1).status_code == 200


class Timer:
    def cancel(self) -> None:
        pass


class Pausing:
    """The part of a transport that flow control needs; it only keeps it."""


class Transport:
    """Of a client for which so many bytes wait, each time that it is looked at."""

    def __init__(self, waiting: Sequence[int]) -> None:
        self.waiting, self.aborted = list(waiting), False

    def get_write_buffer_size(self) -> int:
        return self.waiting.pop(0) if len(self.waiting) > 1 else self.waiting[0]

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(
    ("waiting", "aborted", "left"),
    [([9, 9], True, 0), ([9, 8, 7, 7], True, 0), ([9, 8, 7, 6, 5, 4, 3, 2, 1], False, 6)],
    ids=["stopped", "stopped later", "slow"],
)
def test_a_client_that_reads_nothing_is_let_go(waiting: list[int], aborted: bool, left: int) -> None:
    """Whatever is left of its answer: it would hold memory and a connection for ever."""
    timers: list[tuple[float, Callable[[], None]]] = []
    protocol = HttpProtocol.__new__(HttpProtocol)
    protocol.transport = transport = Transport(waiting)  # type: ignore[assignment]
    protocol.flow = FlowControl(Pausing())  # type: ignore[arg-type]

    class Loop:
        def call_later(self, seconds: float, call: Callable[..., None], *given: int) -> Timer:
            timers.append((seconds, lambda: call(*given)))
            return Timer()

    protocol.loop = Loop()  # type: ignore[assignment]
    protocol.pause_writing()
    for _ in range(2 if not aborted else 5):
        if timers:
            seconds, expire = timers.pop()
            assert seconds == SEND_TIMEOUT_S
            expire()
    assert transport.aborted == aborted
    assert (len(transport.waiting) == left) or aborted
    assert bool(timers) == (not aborted)
    protocol.resume_writing()
    assert protocol._stalled is None
