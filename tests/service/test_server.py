"""The drain: gated step by step in a thread, and by real signals to a real process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch

from service.app import create_app
from service.engine.client import Phase
from service.server import FLUSH_S
from service.server import serve as run_server
from tests.service.fakes import PATIENCE_S, FakeDenoiser, fake_warm, job_of, tiny_model, until
from tests.service.http.test_problems import problem
from tests.service.live import Process, Serve, Threaded, settings, sse

Launch = Callable[..., Process]


def sigterm(server: Threaded) -> None:
    server.server.handle_exit(signal.SIGTERM, None)


def test_running_work_is_finished_and_new_work_refused_while_the_listener_stays_open(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    with (
        ThreadPoolExecutor(1) as pool,
        server.client.stream("GET", "/stream?num_inference_steps=3&preview=none") as stream,
    ):
        events = sse(stream)
        next(events)
        posted = pool.submit(server.client.post, "/generate", json={"n": 2, "num_inference_steps": 3})
        until(lambda: len(server.state.engine._in_flight) == 2, "the second job")
        sigterm(server)
        until(lambda: server.client.get("/readyz").status_code == 503, "the drain")
        for refused in (
            server.client.get("/readyz"),
            server.client.get("/stream"),
            server.client.post("/generate", json={}),
        ):
            problem(refused, 503, "draining")
            assert int(refused.headers["retry-after"]) > 0
        assert server.client.get("/livez").status_code == 200
        assert not server.server.should_exit
        server.gate.open()
        assert [event.name for event in events] == ["completed"]
        assert len(posted.result().json()["images"]) == 2
    server.wait_for_exit()
    assert server.state.engine.phase is Phase.STOPPED


def test_an_idle_server_leaves_soon(serve: Serve) -> None:
    server = serve(drain_s=1000.0)
    sigterm(server)
    server.wait_for_exit()


def test_past_the_drain_time_the_last_event_is_an_error(serve: Serve) -> None:
    server = serve(drain_s=0.05)
    server.gate.shut()
    with server.client.stream("GET", "/stream?preview=none") as stream:
        events = sse(stream)
        next(events)
        server.gate.wait_for_arrival(1)
        sigterm(server)
        until(lambda: server.server._flush_until is not None, "the end of the drain")
        server.gate.open()
        (error,) = events
    assert (error.name, error.data["code"], error.data["status"]) == ("error", "draining", 503)
    server.wait_for_exit()
    assert len(server.denoiser.widths) == 1  # nothing was computed after it


def test_a_step_that_hangs_does_not_hold_up_the_exit(serve: Serve) -> None:
    server = serve(drain_s=0.05)
    server.gate.shut()
    with server.client.stream("GET", "/stream?preview=none") as stream:
        events = sse(stream)
        next(events)
        server.gate.wait_for_arrival(1)
        sigterm(server)
        begun = time.monotonic()
        until(lambda: server.server.should_exit, "the exit")
        assert FLUSH_S <= time.monotonic() - begun < FLUSH_S + 5
    server.gate.open()


def test_a_second_signal_leaves_at_once(serve: Serve) -> None:
    server = serve(drain_s=1000.0)
    server.gate.shut()
    with server.client.stream("GET", "/stream?preview=none") as stream:
        events = sse(stream)
        next(events)
        sigterm(server)
        sigterm(server)
        begun = time.monotonic()
        server.wait_for_exit()
        assert time.monotonic() - begun < FLUSH_S


def test_a_failed_engine_takes_the_server_with_it() -> None:
    denoiser = FakeDenoiser(raises={1: torch.AcceleratorError})
    chosen = settings()
    app = create_app(tiny_model(), chosen, fake_warm(denoiser))
    state = app.state.ddpm
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(run_server, app, state, chosen)
        until(lambda: state.engine.phase is Phase.READY)
        state.engine.submit(job_of("fatal", [1]))
        assert code.result(PATIENCE_S) == 1
    assert state.engine.phase is Phase.DEAD


# ── A process ──────────────────────────────────────────────────────────────────────────────────

SLOW = "/stream?preview=none&sampler=ddpm&num_inference_steps=100&n="
"""One row per step: so many times a hundred network calls."""


def tiny_process(launch: Launch, folder: Path, *flags: str) -> tuple[Process, httpx.Client]:
    process = launch("--model", str(folder), "--runtime", "torch", "--max-batch", "1", *flags)
    return process, process.connect()


def test_sigterm_drains_and_exits_0(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    with closing(client), client.stream("GET", f"{SLOW}8") as stream:
        events = sse(stream)
        next(events)
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503, "the drain")
        refused = client.post("/generate", json={})
        problem(refused, 503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        (last,) = events
        assert last.name == "completed"
        assert len(last.data["images"]) == 8
    assert process.wait() == 0
    assert "Traceback" not in process.log


def test_past_the_drain_time_it_says_so_and_exits_0(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder, "--drain-s", "0.2")
    with closing(client), client.stream("GET", f"{SLOW}64") as stream:
        events = sse(stream)
        next(events)
        process.popen.send_signal(signal.SIGTERM)
        (last,) = events
        assert (last.name, last.data["code"]) == ("error", "draining")
    assert process.wait() == 0
    assert "Traceback" not in process.log


def test_a_second_sigterm_leaves_at_once(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    with closing(client), client.stream("GET", f"{SLOW}64") as stream:
        events = sse(stream)
        next(events)
        process.popen.send_signal(signal.SIGTERM)
        until(lambda: "draining" in process.log, "the drain")
        process.popen.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)  # cut, not ended
    assert process.wait() == 0


def test_a_failed_engine_exits_1(launch: Launch, tiny_folder: Path) -> None:
    # Found out only while the network is being built: OpenVINO has no float16 on a CPU.
    process = launch("--model", str(tiny_folder), "--runtime", "openvino", "--dtype", "float16")
    assert process.wait() == 1
    assert "the engine has failed" in process.log
    assert "float16" in process.log
