from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from bench import servers
from bench.load import drive
from bench.servers import NAMES, PEERS, VARIANTS, Kind, Model, ServerError, Watch, find, running
from bench.workload import Request
from tests.service.fakes import until

# Answers as a peer does; its child has a session of its own, as some frameworks' workers have.
SERVER = """
import json, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        n = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["n"]
        answer = json.dumps({"images": ["iVBORw0KGgo"] * n}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass

if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "dies" in sys.argv:
    sys.exit("these are my last words")
if "dumb" in sys.argv:
    print("still loading", flush=True)
    time.sleep(3600)
code = "import time; kept = b'x' * 40_000_000; time.sleep(3600)"
subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)

    def kind(how=""):
        return Kind(f"{tmp_path}/server.py {{port}} {how}")

    return kind


def test_a_server_answers_and_is_gone_afterwards_with_its_children(fake):
    with running(fake(), {}) as server:
        (answer,) = asyncio.run(drive(server.endpoint, [Request(0.0, 5, 3)], 10.0))
        assert answer.result == "done"
        assert server.ready_s > 0
        family = [psutil.Process(server.popen.pid), *psutil.Process(server.popen.pid).children()]
        assert len(family) == 2
        until(lambda: len(server.watch.seen) == 2, "the child to be seen")
    assert not [process for process in family if process.is_running()]


def test_one_that_does_not_heed_sigterm_is_killed(fake, monkeypatch):
    monkeypatch.setattr(servers, "STOP_S", 0.2)
    with running(fake("stubborn"), {}) as server:
        process = psutil.Process(server.popen.pid)
    assert not process.is_running()


def test_it_is_stopped_when_the_test_of_it_fails(fake):
    pids = []

    def fail():
        with running(fake(), {}) as server:
            pids.append(server.popen.pid)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert not psutil.pid_exists(pids[0])


def test_one_that_dies_is_reported_with_its_last_words(fake):
    with pytest.raises(ServerError, match=r"it ended with 1\n.*my last words"), running(fake("dies"), {}):
        pass


def test_one_that_never_answers_is_given_up(fake):
    with (
        pytest.raises(ServerError, match=r"no answer came\nstill loading"),
        running(fake("dumb"), {}, start_s=1.0),
    ):
        pass


def test_what_it_takes_is_watched_children_included(fake):
    with running(fake(), {}) as server:
        until(lambda: server.watch.usage().peak_bytes > 50e6, "the child's memory")
        usage = server.watch.usage()
        assert 0 < usage.mean_bytes <= usage.peak_bytes
        server.watch.reset()
        assert server.watch.usage().seconds < usage.seconds


def test_cpu_time_is_counted():
    watch = Watch(psutil.Process().pid)
    begun = sum(psutil.Process().cpu_times()[:2])
    until(lambda: sum(psutil.Process().cpu_times()[:2]) > begun + 0.2)
    assert watch.usage().cpu_s >= 0.15
    watch.reset()
    assert watch.usage().cpu_s < 0.15
    watch.stop()


def test_every_server_has_a_name():
    assert len(NAMES) == 1 + 2 * len(PEERS) + len(VARIANTS)
    for name in NAMES:
        kind, pipeline = find(name)
        assert "{port}" in kind.command
        assert kind.ours == name.startswith("service")
        assert kind.ours or name.endswith(f"/{pipeline}")
    for name in ("plain", "plain/theirs", "nobody/ours"):
        with pytest.raises(KeyError):
            find(name)


def test_the_environment_says_what_to_serve(tmp_path):
    found = Model(tmp_path / "mine", "torch", "bfloat16").environment("ours")
    assert found["DDPM_MODEL"] == found["BENCH_MODEL"] == str(Path(tmp_path / "mine"))
    assert found["DDPM_RUNTIME"] == found["BENCH_RUNTIME"] == "torch"
    assert found["DDPM_DTYPE"] == found["BENCH_DTYPE"] == "bfloat16"
    assert found["BENCH_PIPELINE"] == "ours"
    assert found["DDPM_MAX_BATCH"] == ""  # whatever a .env says
