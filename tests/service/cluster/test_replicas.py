"""Two models of two replicas each behind one address, on a real Ray, with either of its proxies."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model import checkpoint
from tests.service.fakes import tiny_model
from tests.service.live import ROOT, Sse, sse

pytestmark = pytest.mark.slow
START_S = 120.0
SLOW = "/stream?sampler=ddpm&num_inference_steps=100&preview_every=1&seed=5&n=4"

SERVE = """
import json, sys, time
import ray
from ray import serve
from ray._common.network_utils import find_free_port
import service.cluster

port = find_free_port()
ray.init(num_cpus=6, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(service.cluster.build({"num_replicas": "2", "models": sys.argv[2]}))
print(json.dumps({"port": port}), flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@contextmanager
def fleet(models: str, temporary: Path, haproxy: bool) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A client of two replicas of each model, and the process that started them."""
    env = {
        **os.environ,
        "DDPM_RUNTIME": "torch",
        "DDPM_MAX_BATCH": "4",
        "DDPM_MAX_QUEUE": "16",
        "DDPM_STREAM_GRACE_S": "0.2",
        "OMP_NUM_THREADS": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(temporary), models],
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
            client = httpx.Client(base_url=f"http://127.0.0.1:{json.loads(line)['port']}", timeout=180)
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


@pytest.fixture(scope="module", params=[False, True], ids=["Python's proxy", "HAProxy"])
def served(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    other = tmp_path_factory.mktemp("models") / "other"
    checkpoint.save(other, tiny_model(classes=2))
    with fleet(f"tiny={tiny_folder},{other}", tmp_path_factory.mktemp("ray"), request.param) as found:
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


def alive(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/livez").status_code == 200
    return False


def samples(client: httpx.Client, name: str) -> dict[tuple[str, str], float]:
    """Of each (model, replica)."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                key = sample.labels["model"], sample.labels["replica"]
                found[key] = found.get(key, 0.0) + sample.value
    return found


def busiest(process: psutil.Process) -> psutil.Process:
    """The replica whose engine works most."""
    before = {engine: sum(engine.cpu_times()[:2]) for engine in engines(process)}
    time.sleep(0.3)
    engine = max(before, key=lambda each: sum(each.cpu_times()[:2]) - before[each])
    replica = engine.parent()
    assert replica is not None
    return replica


def whole_stream(client: httpx.Client, path: str = SLOW, **headers: str) -> list[Sse]:
    with client.stream("GET", path, headers=headers) as response:
        return list(sse(response))


def assert_whole(events: list[Sse], undisturbed: list[Sse]) -> None:
    """A stream without gaps that ends as the undisturbed one does, and shows nothing that it does not."""
    assert [int(event.id.split(":")[1]) for event in events] == list(range(1, len(events) + 1))
    assert len({event.id.split(":")[0] for event in events}) == 1
    assert (events[0].name, events[-1].name) == ("queued", "completed")
    assert events[-1].data["images"] == undisturbed[-1].data["images"]
    shown, known = pictures(events), pictures(undisturbed)
    assert len(shown) > 0.9 * len(known)  # as previews are dropped while a reader is slow
    assert shown.items() <= known.items()


def pictures(events: list[Sse]) -> dict[tuple[int, int], str]:
    """Previews by step and image."""
    previews = [event.data for event in events if event.name == "preview"]
    return {(data["step"], each["index"]): each["b64_json"] for data in previews for each in data["images"]}


def test_requests_are_served_by_both_engines_of_a_model(
    served: tuple[httpx.Client, psutil.Process],
) -> None:
    client, process = served
    assert len(engines(process)) == 4
    request = {"seed": 1, "num_inference_steps": 3, "n": 2}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post("/generate", json=request), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps(answer.json()["images"]) for answer in answers}) == 1  # whoever made them
    made = samples(client, "ddpm_images_generated_total")
    assert [model for model, _ in made] == ["tiny", "tiny"]  # each of its replicas, and no other model's
    assert sum(made.values()) == 32


def test_a_request_names_its_model(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    fields = {"seed": 1, "num_inference_steps": 3}
    pictures = {}
    for name in ("tiny", "other"):
        answer = client.post("/generate", json={**fields, "model": name}).json()
        assert answer["model"] == name
        pictures[name] = answer["images"]
        by_query = client.get("/stream", params={**fields, "model": name}).text
        assert pictures[name][0]["b64_json"] in by_query
        assert client.get("/info", params={"model": name}).json()["model"]["name"] == name
    assert pictures["tiny"] != pictures["other"]
    unknown = client.post("/generate", json={**fields, "model": "none"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "invalid_request")


def test_openai_clients_choose_a_model(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    official = openai.OpenAI(base_url=str(client.base_url.join("/v1")), api_key="none")
    assert [model.id for model in official.models.list()] == ["tiny", "other"]
    assert official.models.retrieve("other").id == "other"
    made = []
    for name in ("tiny", "other"):
        images = official.images.generate(model=name, prompt="cat", extra_body={"seed": 1})
        assert images.data
        made.append(base64.b64decode(images.data[0].b64_json or ""))
    assert made[0] != made[1]
    edited = official.images.edit(model="other", image=("a.png", made[1]), prompt="cat")
    assert edited.data


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
    with client.stream("GET", SLOW.replace("n=4", "n=16")) as response:
        events = sse(response)
        assert next(events).name == "queued"
        next(events)
    until(lambda: sum(samples(client, "ddpm_cancelled_total").values()) == 1, "its end")
    assert set(samples(client, "ddpm_slots_in_use").values()) == {0}


def test_requests_of_a_session_reach_one_replica(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    before = samples(client, "ddpm_images_generated_total")
    for _ in range(6):
        answer = client.post("/generate", json={"num_inference_steps": 2}, headers={"x-session-id": "a"})
        assert answer.status_code == 200
    after = samples(client, "ddpm_images_generated_total")
    assert sorted(after[each] - before[each] for each in after if each[0] == "tiny") == [0, 6]


def test_what_ray_is_told_is_more_than_a_replica_takes(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, _ = served
    request = {"num_inference_steps": 100, "sampler": "ddpm"}

    def taken() -> int:
        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(lambda _: client.post("/generate", json=request), range(48)))
        codes = [answer.status_code for answer in answers]
        assert set(codes) <= {200, 429}
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
        return codes.count(200)

    # Of 32 slots. By its own, Ray lets in ten at a time, the others wait, and none is refused. Not at once:
    # the front may know of one replica only so far.
    until(lambda: 24 <= taken() < 48, "as many as there is room for, and no more", 30.0)


def test_a_killed_engine_is_a_pause(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, process = served
    undisturbed = whole_stream(client)
    with client.stream("GET", SLOW) as response:
        events = sse(response)
        begun = [next(events) for _ in range(10)]
        for engine in engines(process):
            engine.kill()
        assert_whole([*begun, *events], undisturbed)
    until(lambda: len(engines(process)) == 4, "all engines")


def test_a_replica_that_dies_under_load_loses_nothing(served: tuple[httpx.Client, psutil.Process]) -> None:
    """Neither streams nor requests that are answered at once, of clients that know nothing of it."""
    client, process = served
    undisturbed = whole_stream(client)
    asked = [{"seed": seed, "num_inference_steps": 100, "sampler": "ddpm"} for seed in range(8)]
    expected = [client.post("/generate", json=each).json()["images"] for each in asked]
    with ThreadPoolExecutor(10) as pool:
        streams = [pool.submit(whole_stream, client) for _ in range(2)]
        answers = [pool.submit(client.post, "/generate", json=each) for each in asked]
        time.sleep(0.3)
        replica = busiest(process)
        os.kill(replica.pid, signal.SIGKILL)
        assert [answer.result().json().get("images") for answer in answers] == expected
        for stream in streams:
            assert_whole(stream.result(), undisturbed)
    until(lambda: len(engines(process)) == 4 and not replica.is_running(), "another replica")


def test_a_front_that_dies_is_a_reconnect(served: tuple[httpx.Client, psutil.Process]) -> None:
    client, process = served
    undisturbed = whole_stream(client)
    front = next(each for each in process.children(recursive=True) if ":front" in " ".join(each.cmdline()))
    seen: list[Sse] = []
    with suppress(httpx.RemoteProtocolError), client.stream("GET", SLOW) as response:
        for event in sse(response):
            seen.append(event)
            if len(seen) == 10:
                os.kill(front.pid, signal.SIGKILL)
    assert seen[-1].name == "preview"
    last = {"last-event-id": seen[-1].id}
    until(lambda: alive(client), "another front")
    seen += whole_stream(client, "/stream", **last)
    assert_whole(seen, undisturbed)
