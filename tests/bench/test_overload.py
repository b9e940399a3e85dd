"""The modes against a real service, small, and the verdicts on their figures."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from bench import overload
from bench.load import Answer
from bench.workload import Request

ARGS = argparse.Namespace(rows=32, step_ms=10.0, descriptors=64, held=10, queue=48, log=False)


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[str, psutil.Process]]:
    with overload.served(ARGS, "rate") as started:
        yield started


@pytest.mark.slow
def test_more_than_the_capacity(service: tuple[str, psutil.Process], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "CAPACITY_S", 0.5)
    found = {each.name: each for each in overload.overload(*service, 4.0, 2.0, 48)}
    assert found["requests"].met
    assert int(found["requests"].found.split()[3]) > 0  # rejected
    assert found["goodput"].met is not None
    assert "0 of" in found["`/livez`: p99"].found
    assert "MiB/min" in found["memory of the engine, second half"].found


@pytest.mark.slow
def test_streams_and_senders_that_hold_on_are_let_go(service: tuple[str, psutil.Process]) -> None:
    found = {each.name: each for each in overload.hold(*service, 10)}
    assert found["streams open"].found == "10"
    assert found["all let go"].met
    assert found["small requests meanwhile"].met


def test_what_misses_its_aim_is_said() -> None:
    requests = [Request(float(second), 10, 1, False, 0, second) for second in range(4)]
    done = [Answer(each, "done", 200, latency_s=0.5, queued_s=0.1, eta_s=0.2) for each in requests[:3]]
    refused = Answer(requests[3], "rejected", 429, late_s=0.01, first_byte_s=0.21, latency_s=0.21)
    found = {each.name: each for each in overload.rated([*done, refused], 10.0, 4.0)}
    # 10 rows of 20 in the second half; a refusal that took 0.2 s; all 0.2 s later than estimated
    assert (found["goodput"].found, found["goodput"].met) == ("50% of the capacity", False)
    assert (found["rejections: p99"].found, found["rejections: p99"].met) == ("200 ms", False)
    assert found["finished after the ETA by"].found == "p50 +0.20 s, p95 +0.20 s"
    assert "**no**" in str(found["goodput"])
    lost = {each.name: each for each in overload.rated([Answer(requests[0], "timeout")], 10.0, 4.0)}
    assert lost["requests"].met is False


def test_memory_that_grows_and_probes_that_fail_miss_their_aims() -> None:
    watch = overload.Watch("http://127.0.0.1", psutil.Process())
    watch.memory = [(float(second), (second << 20) + (50 << 20), 9 << 20) for second in range(100)]
    watch.answers = {"/livez": [0.01, float("inf")], "/metrics": [0.01, 0.02]}
    api, engine = watch.growth()
    assert (api.found, api.met) == ("149 MiB, +60.00 MiB/min", False)
    assert engine.met
    livez, metrics = watch.figures()
    assert livez.met is False
    assert "1 of 2 without an answer" in livez.found
    assert metrics.met


class Unwell(BaseHTTPRequestHandler):
    """Answers by 503."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_probe_without_a_200_has_no_answer() -> None:
    with HTTPServer(("127.0.0.1", 0), Unwell) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert overload.ask(f"http://127.0.0.1:{server.server_port}", "/livez") == float("inf")
        thread.join()
    assert overload.ask(f"http://127.0.0.1:{server.server_port}", "/livez") == float("inf")
