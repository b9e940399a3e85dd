"""Health, readiness, metrics, info and the page, over real sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection

import httpx
import msgspec
import pytest

from service import app
from service.engine.messages import EngineConfig, SelfTestResult
from service.engine.warmup import Warm
from service.telemetry import Telemetry
from tests.service.fakes import PATIENCE_S, FakeDenoiser, fake_warm, until
from tests.service.live import Serve
from tests.service.test_telemetry import DOCUMENTED, families

LIVE = ["/livez", "/v2/health/live"]
READY = ["/readyz", "/v2/health/ready"]


class SlowToLoad:
    """A warm-up that ends when it is told to."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.denoiser = FakeDenoiser()

    def __call__(self, config: EngineConfig) -> Warm:
        assert self.may_end.wait(PATIENCE_S)
        return fake_warm(self.denoiser)(config)


def test_loading_is_alive_and_not_ready(serve: Serve) -> None:
    warm = SlowToLoad()
    server = serve(warm.denoiser, warm)
    try:
        for path in LIVE:
            assert server.client.get(path).status_code == 200
        refusals = [server.client.get(path) for path in (*READY, "/info", "/stream")]
        refusals.append(server.client.post("/generate", json={}))
        for refused in refusals:
            assert (refused.status_code, refused.json()["code"]) == (503, "loading")
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["content-type"] == "application/problem+json"
        assert server.metric("ddpm_ready") == 0
    finally:
        warm.may_end.set()
    server.ready()
    for path in READY:
        assert server.client.get(path).json() == {"status": "ready"}
    assert server.metric("ddpm_ready") == 1


def test_an_engine_that_fails_its_self_test_gets_no_jobs_and_stays_to_be_looked_at(serve: Serve) -> None:
    denoiser = FakeDenoiser()

    def warm(config: EngineConfig) -> Warm:
        made = fake_warm(denoiser)(config)
        return replace(made, info=msgspec.structs.replace(made.info, self_test=SelfTestResult(0.7, 0.02)))

    server = serve(denoiser, warm)
    until(lambda: server.client.get("/readyz").json()["code"] == "self_test_failed")
    for refused in (*map(server.client.get, READY), server.client.post("/generate", json={})):
        assert (refused.status_code, refused.json()["code"]) == (503, "self_test_failed")
        assert "self-test" in refused.json()["detail"]
    assert server.client.get("/livez").status_code == 200
    info = server.client.get("/info").json()["self_test"]
    assert info == {"result": "failed", "difference": 0.7, "tolerance": 0.02}
    assert server.metric("ddpm_ready") == 0
    server.stop()  # and a shutdown does not wait for it


def test_a_model_without_a_known_result_is_served(serve: Serve) -> None:
    assert serve().client.get("/info").json()["self_test"] == {"result": "not tested"}


def test_a_silent_engine_that_is_not_replaced_is_not_alive(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    with server.client.stream("GET", "/stream") as stream:
        lines = stream.iter_lines()
        next(lines)
        (worker,) = server.state.engine._workers
        worker.heard -= 2 * worker.stall_s  # the watchdog looks once a second
        assert server.client.get("/livez").status_code == 200
        worker.heard -= 2 * worker.stall_s
        problem = server.client.get(LIVE[1])
        assert (problem.status_code, problem.json()["code"]) == (503, "worker_dead")
        server.gate.open()
        until(lambda: server.client.get("/livez").status_code == 200)


def test_metrics_are_prometheus_own_format(serve: Serve) -> None:
    server = serve()
    server.client.post("/generate", json={"num_inference_steps": 3, "sampler": "ddpm"})
    server.client.get("/nowhere")
    response = server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = families(response.text)
    assert found.keys() == DOCUMENTED.keys()
    assert "_created" not in response.text
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in found.values() for s in f.samples}
    assert samples["ddpm_steps_total",] == 3
    assert samples["ddpm_images_generated_total", ("sampler", "ddpm")] == 1
    assert samples["ddpm_requests_total", ("outcome", "2xx"), ("route", "/generate")] == 1
    assert samples["ddpm_requests_total", ("outcome", "4xx"), ("route", "unmatched")] == 1
    assert samples["ddpm_ready",] == 1
    (info,) = found["ddpm_model_info"].samples
    assert (info.labels["model"], info.labels["runtime"], info.value) == ("tiny", "fake", 1)


def test_the_event_loops_lag_is_watched(serve: Serve) -> None:
    server = serve()
    until(lambda: server.metric("ddpm_event_loop_lag_seconds") > 0)


def test_the_worst_lag_is_shown_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LAG_S", 0.2)
    telemetry, shown = Telemetry(), list[float]()

    async def scenario() -> None:
        enough = asyncio.Event()

        def record(lag: float) -> None:
            shown.append(lag)
            if len(shown) > 12:
                enough.set()

        monkeypatch.setattr(telemetry.loop_lag, "set", record)
        watch = asyncio.create_task(app._watch_lag(telemetry, 0.02))
        await asyncio.sleep(0.01)
        time.sleep(0.5)  # noqa: ASYNC251 (this is the lag)
        await enough.wait()
        watch.cancel()

    asyncio.run(scenario())
    assert [lag > 0.4 for lag in shown[:12]] == 10 * [True] + 2 * [False]


def test_info(serve: Serve) -> None:
    info = serve(max_images=5, deadline_s=60.0).client.get("/info").json()
    assert info["model"] == {
        "name": "tiny",
        "classes": ["cat", "dog", "Ankle Boot"],
        "guidance": True,
        "classifier": False,
        "condition": [],
        "channels": 1,
        "height": 8,
        "width": 8,
        "picture": {"height": 8, "width": 8},
        "formats": ["png", "jpeg", "webp", "npy"],
        "parameters": info["model"]["parameters"],
        "sha256": "",
        "timesteps": 100,
        "prediction_type": "epsilon",
        "distilled_guidance": None,
    }
    assert info["model"]["parameters"] > 100
    assert info["samplers"] == ["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]
    assert info["defaults"] == {
        "sampler": "dpmpp_2m",
        "num_inference_steps": 20,
        "steps_by_sampler": {"ddpm": 50, "ddim": 50, "dpmpp_2m": 20, "sde_dpmpp_2m": 20},
        "eta": 0.0,
        "guidance_scale": 2.0,
        "guidance_rescale": 0.0,
        "guidance_sigma_min": 0.3,
        "guidance_sigma_max": 5.0,
        "classifier_scale": 0.0,
        "timestep_spacing": "trailing",
        "output_format": "png",
    }
    assert info["limits"] == {"max_images": 5, "max_batch": 8, "max_queue": 256, "deadline_s": 60.0}
    assert info["runtime"]["name"] == "fake"
    assert info["batch_invariance"] == {"invariant": True, "max_abs_difference": 0.0, "batch_sizes": [2]}


def test_openapi_is_generated(serve: Serve) -> None:
    client = serve().client
    document = client.get("/openapi.json").json()
    assert {"/generate", "/stream", "/livez", "/readyz", "/metrics", "/info"} <= document["paths"].keys()
    responses = document["paths"]["/generate"]["post"]["responses"]
    assert {"406", "422", "429", "503", "504"} <= responses.keys()
    names = {parameter["name"] for parameter in document["paths"]["/stream"]["get"]["parameters"]}
    assert {"n", "seed", "sampler", "preview", "preview_every", "last-event-id"} <= names
    assert client.get("/docs").status_code == 200


# ── Keys ───────────────────────────────────────────────────────────────────────────────────────

KEYS = {"api_keys": "sesame,caraway"}
CLOSED: dict[str, Callable[[httpx.Client], httpx.Response]] = {
    "generate": lambda client: client.post("/generate", json={"num_inference_steps": 1}),
    "stream": lambda client: client.get("/stream", params={"num_inference_steps": 1}),
    "info": lambda client: client.get("/info"),
}


@pytest.mark.parametrize("route", CLOSED)
def test_a_key_opens_what_is_closed(serve: Serve, route: str) -> None:
    server = serve(**KEYS)
    ask = CLOSED[route]
    for given in (
        None,
        b"",
        b"Bearer",
        b"Bearer wrong",
        b"Basic sesame",
        b"sesame",
        b"Bearer sesame,caraway",
        "Bearer sesamé".encode("latin-1"),
    ):
        server.client.headers = httpx.Headers([] if given is None else [(b"authorization", given)])
        refused = ask(server.client)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), given
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "sesam" not in refused.text
    assert server.denoiser.starts == []
    for key in ("sesame", "caraway"):
        server.client.headers = httpx.Headers({"authorization": f"bearer {key}"})
        assert ask(server.client).status_code == 200


def test_nothing_is_read_without_a_key(serve: Serve) -> None:
    """A body that could not be parsed, or is too large, is not what is said to somebody without a key."""
    client = serve(**KEYS, cors_origins="https://gallery.example").client
    for path, body in (("/generate", b"{"), ("/edit", b'{"image": 1}'), ("/generate", b" " * (2 << 20))):
        refused = client.post(path, content=body, headers={"origin": "https://gallery.example"})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), path
        assert refused.headers["access-control-allow-origin"] == "https://gallery.example"
        assert refused.headers["x-request-id"]
    assert client.get("/nowhere").status_code == 401, "nor is which routes exist"
    asking = {"origin": "https://gallery.example", "access-control-request-method": "POST"}
    assert client.options("/generate", headers=asking).status_code == 200
    assert 'ddpm_requests_total{outcome="4xx"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//info", 401),
        ("/info/", 401),
        ("/%69nfo", 401),
        ("/livez/", 401),
        ("/livez/../info", 401),
        ("/web", 401),
        ("/web/../info", 404),
        ("/web/..%2finfo", 404),
        ("/web/../../app.py", 404),
    ],
)
def test_a_path_written_otherwise_opens_nothing(serve: Serve, path: str, status: int) -> None:
    base = serve(**KEYS).client.base_url
    # It sends a path as it is.
    with closing(HTTPConnection(base.host, base.port or 80, timeout=10)) as connection:
        connection.request("GET", path)
        assert connection.getresponse().status == status


def test_some_routes_are_open(serve: Serve) -> None:
    client = serve(**KEYS).client
    for path in (
        "/",
        "/explore",
        "/status",
        "/web/app.js",
        *LIVE,
        *READY,
        "/metrics",
        "/docs",
        "/openapi.json",
    ):
        assert client.get(path).status_code == 200, path


def test_a_host_header_opens_nothing(serve: Serve) -> None:
    client = serve(**KEYS).client
    for host in ("x/livez?", "x/livez#", "x/metrics?a="):
        assert client.get("/info", headers={"host": host}).status_code == 401


def test_other_origins_may_call_when_they_are_listed(serve: Serve) -> None:
    origin = "https://gallery.example"
    client = serve(cors_origins=origin).client
    asking = {"origin": origin, "access-control-request-method": "POST"}
    preflight = client.options("/generate", headers=asking)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    answer = client.get("/livez", headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    stranger = client.get("/livez", headers={"origin": "https://stranger.example"})
    assert "access-control-allow-origin" not in stranger.headers
