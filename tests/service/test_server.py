"""The drain: gated step by step in a thread, and by real signals to a real process."""

from __future__ import annotations

import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from service.engine import worker
from service.engine.worker import Phase
from service.protocol import MAX_HEAD_BYTES
from service.server import FLUSH_S
from tests.service.fakes import PATIENCE_S, FakeDenoiser, job_of, until
from tests.service.http.test_problems import problem
from tests.service.live import ROOT, Process, Serve, Threaded, sse

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
    assert len(server.denoiser.widths) <= 2  # nothing was launched after it


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
        assert time.monotonic() - begun < FLUSH_S + 5
        (last,) = events
        assert last.data["code"] == "draining"
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


def test_an_engine_that_is_given_up_takes_the_server_with_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DEATHS", 1)
    server = serve(FakeDenoiser(raises={1: torch.AcceleratorError}))
    server.submit(job_of("fatal", [1]))
    server.wait_for_exit()
    assert server.state.engine.phase is Phase.DEAD
    assert server.state.engine.exit_code == 1


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
    assert "Traceback" not in process.log


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP as it is by itself, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups")
def test_a_terminal_that_is_closed_is_a_drain(launch: Launch, tiny_folder: Path) -> None:
    """The system and the shell may both say so, and to the engine as well."""
    process, client = tiny_process(launch, tiny_folder)
    with closing(client), client.stream("GET", f"{SLOW}8") as stream:
        events = sse(stream)
        next(events)
        engine_of(process).send_signal(signal.SIGHUP)
        process.popen.send_signal(signal.SIGHUP)
        until(lambda: "draining" in process.log, "the drain")
        process.popen.send_signal(signal.SIGHUP)
        (last,) = events
        assert last.name == "completed"
    assert process.wait() == 0
    assert "the engine has ended" not in process.log


HANGING = """
import asyncio, sys, threading
from service import __main__, server
from service.engine.client import EngineClient

async def stop(self):
    await asyncio.Event().wait()

server.LEAVE_S = float(sys.argv.pop(1))
EngineClient.stop = stop
threading.Thread(target=threading.Event().wait).start()  # no daemon: the interpreter waits for it
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_what_hangs_after_a_drain_does_not_keep_the_process(
    launch: Launch, tiny_folder: Path, signals: int
) -> None:
    """It is left after a while, or for a second signal."""
    leave_s = "0.5" if signals == 1 else "1000"
    flags = "--model", str(tiny_folder), "--runtime", "torch", "--max-batch", "1"
    process = launch(*flags, command=("-c", HANGING, leave_s), PYTHONPATH=str(ROOT))
    with closing(process.connect()):
        pass
    process.popen.send_signal(signal.SIGTERM)
    until(lambda: "Waiting for application shutdown" in process.log, "the drain's end")
    if signals == 2:
        process.popen.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert ("something hangs" in process.log) == (signals == 1)


def test_what_cannot_be_used_ends_it_with_3(launch: Launch, tiny_folder: Path) -> None:
    # OpenVINO has no float16 on a CPU, and its libraries are not loaded to find that out.
    process = launch("--model", str(tiny_folder), "--runtime", "openvino", "--dtype", "float16")
    assert process.wait() == 3
    assert "float16" in process.log
    assert "Traceback" not in process.log


def test_more_clients_than_open_files_do_not_fill_the_log(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    with closing(client):
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (64, 64))
        with ExitStack() as connected:
            for _ in range(100):
                connected.enter_context(
                    socket.create_connection((client.base_url.host, client.base_url.port))
                )
            until(lambda: psutil.Process(process.popen.pid).num_fds() >= 63, "the limit")
            begun = time.monotonic()
            until(lambda: time.monotonic() - begun > 1.5, "a second attempt to let them in")
        until(lambda: psutil.Process(process.popen.pid).num_fds() < 63, "their end")
        assert client.get("/readyz").status_code == 200
    assert len(process.lines) < 20


LIMITED = """
import resource, sys
from service.__main__ import main
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent", [b"", b"POST /edit HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"])
def test_health_is_answered_and_an_engine_replaced_whatever_connections_are_held(
    launch: Launch, tiny_folder: Path, sent: bytes
) -> None:
    flags = "--model", str(tiny_folder), "--runtime", "torch", "--max-batch", "1", "--allowed-hosts", "*"
    process = launch(*flags, command=("-c", LIMITED), PYTHONPATH=str(ROOT))
    with closing(process.connect()) as client, ExitStack() as held:
        address = client.base_url.host, client.base_url.port
        for _ in range(150):
            connection = held.enter_context(socket.create_connection(address))
            connection.sendall(sent)
        assert httpx.get(client.base_url.join("/livez"), timeout=5).status_code == 200
        assert psutil.Process(process.popen.pid).num_fds() < 96
        before = engine_of(process)
        before.kill()
        until(lambda: psutil.Process(process.popen.pid).children() not in ([], [before]), "another engine")
        until(lambda: httpx.get(client.base_url.join("/readyz"), timeout=5).status_code == 200, "readiness")


def test_what_is_being_answered_gives_way_to_nobody(launch: Launch, tiny_folder: Path) -> None:
    flags = "--model", str(tiny_folder), "--runtime", "torch", "--max-batch", "1"
    process = launch(*flags, command=("-c", LIMITED), PYTHONPATH=str(ROOT))
    with closing(process.connect()) as client, ExitStack() as held:
        events = sse(held.enter_context(client.stream("GET", f"{SLOW}8")))
        next(events)
        address = client.base_url.host, client.base_url.port
        for _ in range(150):
            held.enter_context(socket.create_connection(address))
        assert httpx.get(client.base_url.join("/livez"), timeout=5).status_code == 200
        assert [event.name for event in events][-1] == "completed"


# ── The engine's process ───────────────────────────────────────────────────────────────────────


def engine_of(process: Process) -> psutil.Process:
    (child,) = psutil.Process(process.popen.pid).children()
    return child


def test_the_process_that_serves_http_has_no_torch(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    with closing(client):
        assert client.post("/generate", json={"num_inference_steps": 2}).status_code == 200
        assert client.get("/info").status_code == 200
    mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in (process.popen.pid, engine_of(process).pid)]
    assert ["libtorch" in each for each in mapped] == [False, True]


def test_a_killed_engine_is_only_a_pause(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    engine = engine_of(process)
    query = "/stream?sampler=ddpm&num_inference_steps=100&preview_every=1&seed=5&n=16"
    with closing(client):
        whole = client.get(query).text.rpartition("data: ")[2]
        with client.stream("GET", query) as stream:
            events = []
            for event in sse(stream):
                events.append(event)
                if event.name == "preview" and event.data["step"] == 20 and engine.is_running():
                    engine.kill()
        assert events[-1].name == "completed"
        assert events[-1].data["images"] == json.loads(whole.splitlines()[0])["images"]
        assert [event.id.partition(":")[2] for event in events] == [str(i + 1) for i in range(len(events))]
        assert sum(event.name == "queued" for event in events) == 1
        seen = [
            (image["index"], event.data["step"])
            for event in events
            if event.name == "preview"
            for image in event.data["images"]
        ]
        assert len(seen) == len(set(seen))
        assert "ddpm_engine_restarts_total 1.0" in client.get("/metrics").text
        assert "ended with code -9" in process.log


def test_an_engine_does_not_outlive_the_api(launch: Launch, tiny_folder: Path) -> None:
    process, client = tiny_process(launch, tiny_folder)
    engine = engine_of(process)
    with closing(client), client.stream("GET", f"{SLOW}64") as stream:
        next(sse(stream))
        process.popen.kill()
        process.wait()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine's end")


def test_ctrl_c_at_a_terminal_is_a_drain(launch: Launch, tiny_folder: Path) -> None:
    """It reaches the engine as well, which leaves the decision to the API."""
    process, client = tiny_process(launch, tiny_folder)
    engine = engine_of(process)
    with closing(client), client.stream("GET", f"{SLOW}8") as stream:
        events = sse(stream)
        next(events)
        engine.send_signal(signal.SIGINT)
        process.popen.send_signal(signal.SIGINT)
        (last,) = events
        assert last.name == "completed"
    assert process.wait() == 0
    assert not engine.is_running()


# ── Heads ──────────────────────────────────────────────────────────────────────────────────────


def answer_to(server: Threaded, *sent: bytes) -> bytes:
    """The beginning of what the server says to these bytes, each sent by itself."""
    with socket.create_connection(server.address, PATIENCE_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in sent:
            client.sendall(piece)
        return client.recv(1 << 16)


ENDLESS = b"a" * (MAX_HEAD_BYTES + 1)
CHUNKED = (  # of a type that is read to its end: any other is refused at its head
    b"POST /generate HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez?" + ENDLESS,
        b"GET /livez HTTP/1.1\r\nX: " + ENDLESS,
        b"GET /livez HTTP/1.1\r\n" + b"X: a\r\n" * (MAX_HEAD_BYTES // 6 + 1),
        CHUNKED + b"0\r\nX: " + 6 * ENDLESS,  # more than the read that its head comes with
    ],
    ids=["line", "header", "headers", "trailer"],
)
def test_a_head_without_end_is_refused(serve: Serve, sent: bytes) -> None:
    with suppress(ConnectionError):  # closed with some of it unread, so that the answer is lost
        assert answer_to(serve(), sent).startswith(b"HTTP/1.1 400 ")


def test_a_long_head_and_a_longer_body_are_not(serve: Serve) -> None:
    server = serve()
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nX: "
    piece = b"a" * (MAX_HEAD_BYTES // 2 - 100)
    assert answer_to(server, head, piece, piece, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    padded = b" " * (4 * MAX_HEAD_BYTES) + b'{"num_inference_steps": 1}'
    head = (
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    assert answer_to(server, head % len(padded), padded).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("http://ddpm.example/livez", b'{"status":"alive"}'),
        ("http://ddpm.example:8000/livez?a=http://b", b'{"status":"alive"}'),
        ("http://ddpm.example", b"</html>"),
        ("HTTP://ddpm.example?a=b", b"</html>"),
    ],
)
def test_a_target_may_be_absolute_as_a_proxy_is_asked(serve: Serve, target: str, answer: bytes) -> None:
    with socket.create_connection(serve().address, PATIENCE_S) as connection:
        head = f"GET {target} HTTP/1.1\r\nHost: ddpm.example\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.rstrip().endswith(answer)


# ── Slow senders ───────────────────────────────────────────────────────────────────────────────

POST = b"POST /edit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def until_closed(connection: socket.socket) -> bytes:
    """All that comes before the end."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            received += piece
    return received


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"\r\n", b"HTTP/1.1 408 "),
        (b"GET /livez HTTP/1.1\r\nHost:", b"HTTP/1.1 408 "),
        (POST + b"Content-Length: 5\r\n\r\n{", b"HTTP/1.1 408 "),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408 "),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\n", b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "a line", "head", "body", "chunked body", "second head"],
)
def test_a_request_that_does_not_come_in_time_is_closed(serve: Serve, sent: bytes, answer: bytes) -> None:
    server = serve(read_s=0.3)
    with socket.create_connection(server.address, PATIENCE_S) as connection:
        begun = time.monotonic()
        connection.sendall(sent)
        received = until_closed(connection)
    assert time.monotonic() - begun < 4  # an idle connection is closed after five seconds
    assert received.startswith(answer)
    assert received.count(b"HTTP/1.1 ") == (1 if sent else 0)
    until(lambda: server.state.bodies.held == 0, "the end of its body")


def test_bytes_that_trickle_do_not_extend_it(serve: Serve) -> None:
    server = serve(read_s=0.3)
    for sent in (b"GET /livez HTTP/1.1\r\nX: ", POST + b"Content-Length: 1000000\r\n\r\n"):
        with socket.create_connection(server.address, PATIENCE_S) as connection:
            connection.sendall(sent)
            connection.settimeout(0.02)
            begun, received = time.monotonic(), b""
            while not received and time.monotonic() < begun + PATIENCE_S:
                with suppress(TimeoutError):
                    connection.sendall(b" ")
                    received = connection.recv(100)
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_is_refused_is_not_taken_for_ever(serve: Serve) -> None:
    server = serve(read_s=0.3)
    with socket.create_connection(server.address, PATIENCE_S) as connection:
        connection.sendall(POST + b"Content-Length: 99999999\r\n\r\n" + b" " * ((8 << 20) + 1))
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        begun = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < begun + PATIENCE_S:
                connection.sendall(b" ")
                time.sleep(0.02)
        assert time.monotonic() - begun < PATIENCE_S


def test_a_body_that_comes_steadily_has_the_time_it_takes(serve: Serve) -> None:
    server = serve(read_s=0.3)
    body = b"{}" + b" " * (1 << 17)  # for which there are eight seconds
    with socket.create_connection(server.address, PATIENCE_S) as connection:
        connection.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        begun = time.monotonic()
        for start in range(0, len(body), 8192):
            connection.sendall(body[start : start + 8192])
            time.sleep(0.05)
        assert time.monotonic() - begun > 0.6
        assert until_closed(connection).startswith(b"HTTP/1.1 422 ")


def test_an_answer_may_take_longer_than_its_request(serve: Serve) -> None:
    """Even where a body is announced that never comes: nobody waits for it."""
    server = serve(read_s=0.2)
    server.gate.shut()
    head = b"GET /stream?preview=none&num_inference_steps=2 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection(server.address, PATIENCE_S) as connection:
        connection.sendall(head)
        until(lambda: server.metric("ddpm_streams_open") == 1, "the stream")
        time.sleep(0.5)  # of which nothing is to be seen
        server.gate.open()
        assert b"event: completed" in until_closed(connection)


def test_health_answers_beside_many_that_send_nothing_more(serve: Serve) -> None:
    server = serve(read_s=2.0)
    slow = []
    try:
        for index in range(200):
            slow.append(socket.create_connection(server.address, PATIENCE_S))
            slow[-1].sendall(b"GET /livez" if index % 2 else POST + b"Content-Length: 9\r\n\r\n{")
        assert server.client.get("/livez").status_code == 200
        assert server.client.post("/generate", json={"num_inference_steps": 1}).status_code == 200
        assert all(until_closed(each).startswith(b"HTTP/1.1 408 ") for each in slow)
    finally:
        for each in slow:
            each.close()
    until(lambda: len(server.server.server_state.connections) <= 1, "their end")
    assert server.client.get("/livez").status_code == 200


def test_a_body_of_very_small_chunks_is_refused(serve: Serve) -> None:
    server = serve()
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    with suppress(ConnectionError):  # closed with some of it unread
        assert answer_to(server, head + b"1\r\n \r\n" * 10_000).startswith(b"HTTP/1.1 400 ")
    fewer = head + b"1\r\n \r\n" * 1000 + b"2\r\n{}\r\n0\r\n\r\n"
    assert answer_to(server, fewer).startswith(b"HTTP/1.1 422 ")
