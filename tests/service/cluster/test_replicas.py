"""Two replicas of a tiny model behind one address, on a real Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.service.live import ROOT, sse

pytestmark = pytest.mark.slow
START_S = 120.0
SLOW = "/stream?sampler=ddpm&num_inference_steps=100&preview_every=1&seed=5&n=8"

SERVE = """
import json, sys, time
import ray
from ray import serve
from ray._common.network_utils import find_free_port
import service.cluster

port = find_free_port()
ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(service.cluster.build({"num_replicas": "2"}))
print(json.dumps({"port": port}), flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@contextmanager
def fleet(folder: Path, temporary: Path) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A client of two replicas, and the process that started them."""
    env = {
        **os.environ,
        "DDPM_MODEL": str(folder),
        "DDPM_RUNTIME": "torch",
        "DDPM_MAX_BATCH": "4",
        "DDPM_MAX_QUEUE": "16",
        "DDPM_STREAM_GRACE_S": "0.2",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(temporary)],
        env=env,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as popen:
        process = psutil.Process(popen.pid)
        try:
            assert popen.stdout is not None
            line = next((line for line in popen.stdout if line.startswith("{")), None)
            assert line, "it did not start"
            client = httpx.Client(base_url=f"http://127.0.0.1:{json.loads(line)['port']}", timeout=60)
            with closing(client):
                yield client, process
        finally:
            whole = process.children(recursive=True)
            assert popen.stdin is not None
            popen.stdin.close()
            popen.wait(60)
            psutil.wait_procs(whole, timeout=20)
            for each in whole:
                if each.is_running():
                    each.kill()


@pytest.fixture(scope="module")
def served(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    with fleet(tiny_folder, tmp_path_factory.mktemp("ray")) as found:
        yield found


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


def engines(process: psutil.Process) -> list[psutil.Process]:
    """Processes of engines, below whichever replica."""
    return [
        each
        for each in psutil.process_iter(["cmdline"])
        if "service.engine.process" in (each.info["cmdline"] or [])
        and any(str(parent.cmdline()).find("ServeReplica") >= 0 for parent in each.parents()[:1])
    ]


def metric(client: httpx.Client, name: str) -> float:
    """Of one replica or the other: whichever is asked."""
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_requests_are_served_by_two_engines(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, process = served
    assert len(engines(process)) == 2
    request = {"seed": 1, "num_inference_steps": 3, "n": 2}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/generate", json=request), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps(answer.json()["images"]) for answer in answers}) == 1  # whoever made them


def test_a_stream_comes_as_it_is_made(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    with client.stream("GET", SLOW) as response:
        events = sse(response)
        assert next(events).name == "queued"
        first = next(events)
        assert (first.name, first.data["step"]) == ("preview", 1)
        assert [event.name for event in events][-1] == "completed"


def test_a_client_that_leaves_cancels_its_job(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    with client.stream("GET", SLOW.replace("n=8", "n=16")) as response:
        events = sse(response)
        assert next(events).name == "queued"
        next(events)
    until(lambda: metric(client, "ddpm_cancelled_total") == 1, "its end")
    assert [metric(client, "ddpm_slots_in_use") for _ in range(8)] == [0] * 8


def test_what_ray_is_told_is_more_than_a_replica_takes(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    request = {"num_inference_steps": 100, "sampler": "ddpm"}
    with ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda _: client.post("/generate", json=request), range(48)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 24  # of 32 slots; by its own, Ray lets ten in
    assert set(codes) <= {200, 429}
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_a_killed_engine_is_a_pause_and_a_killed_replica_is_replaced(
    served: tuple[httpx.Client, psutil.Process],
) -> None:
    client, process = served
    whole = client.get(SLOW).text.rpartition("data: ")[2].partition("\n")[0]
    with client.stream("GET", SLOW) as response:
        events = sse(response)
        for event in events:
            if event.name == "preview" and event.data["step"] == 10:
                for engine in engines(process):
                    engine.kill()
                break
        last = list(events)[-1]
    assert last.name == "completed"
    assert last.data["images"] == json.loads(whole)["images"]

    until(lambda: len(engines(process)) == 2, "both engines")
    replica = engines(process)[0].parent()
    assert replica is not None
    os.kill(replica.pid, signal.SIGKILL)
    until(lambda: client.post("/generate", json={"num_inference_steps": 2}).status_code == 200, "an answer")
    until(lambda: len(engines(process)) == 2 and not replica.is_running(), "another replica")
