"""A real Prometheus scrapes the service, and the queries an operator would ask have answers."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.service.fakes import PATIENCE_S, SIZE, FakeDenoiser, until
from tests.service.live import Threaded, serving, sse
from tests.service.tasks.test_uploads import file, noise
from tests.test_dashboard import PANELS, queries

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on this machine"),
]
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs: [{{job_name: ddpm, static_configs: [{{targets: ["{target}"]}}]}}]
"""
CAPACITY = 8
BROKEN = 666
"""A seed whose picture is not finite."""

Ask = Callable[[str], list[dict[str, Any]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    servers = serving()
    started = next(servers)(FakeDenoiser(gives_nan={BROKEN}), max_queue=CAPACITY, stream_grace_s=0.0)
    yield started
    next(servers, None)


@pytest.fixture(scope="module")
def ask(server: Threaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks the Prometheus of the server. The answer is a list of series."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "prometheus.yml").write_text(CONFIG.format(target=server.url.removeprefix("http://")))
    port = free_port()
    assert PROMETHEUS is not None
    process = subprocess.Popen(
        [
            PROMETHEUS,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

        def series(query: str) -> list[dict[str, Any]]:
            try:
                answer = client.get("/api/v1/query", params={"query": query})
            except httpx.ConnectError:
                return []
            if answer.status_code == 503:  # it is starting
                return []
            assert answer.status_code == 200, f"{query}: {answer.text}"
            found: list[dict[str, Any]] = answer.json()["data"]["result"]
            return found

        yield series
    process.terminate()
    process.wait(PATIENCE_S)


def value(series: list[dict[str, Any]]) -> float | None:
    return float(series[0]["value"][1]) if series else None


def test_prometheus_scrapes_the_service(server: Threaded, ask: Ask) -> None:
    until(lambda: value(ask('up{job="ddpm"}')) == 1, "the first scrape")
    until(lambda: value(ask("ddpm_ready")) == 1, "readiness as a metric")

    assert server.client.post("/generate", json={"n": 3, "num_inference_steps": 5}).status_code == 200
    until(lambda: value(ask("sum(ddpm_images_generated_total)")) == 3, "three images")
    until(lambda: value(ask("ddpm_steps_total")) == 15, "fifteen steps")
    until(lambda: value(ask('ddpm_requests_total{route="/generate",outcome="2xx"}')) == 1, "the request")
    until(lambda: (value(ask("ddpm_step_duration_seconds_count")) or 0) >= 5, "timed steps")
    quantile = "histogram_quantile(0.95, sum by (le) (ddpm_request_duration_seconds_bucket))"
    until(lambda: (value(ask(quantile)) or 0) > 0, "a quantile")
    assert value(ask("ddpm_created")) is None


# ── The dashboard ──────────────────────────────────────────────────────────────────────────────


def use(server: Threaded) -> None:
    """All that a client may do: a refusal, a stream that it leaves, a failure, a stream, an edit, pictures.

    Those that leave a step behind come first: a gate may be shut only when nobody is about to pass it.
    """
    client, few = server.client, {"num_inference_steps": 3}
    server.gate.shut()
    with client.stream("GET", "/stream", params={"n": CAPACITY, **few}):
        assert client.post("/generate", json=few).status_code == 429
    server.gate.open()
    until(lambda: server.metric("ddpm_slots_in_use") == 0, "the end of what was left")
    assert client.post("/generate", json={"seed": BROKEN, **few}).status_code == 500
    with client.stream("GET", "/stream", params=few) as response:
        assert [event.name for event in sse(response)][-1] == "completed"
    image = {"image": ("a.png", file(Image.fromarray(noise(SIZE, SIZE))), "image/png")}
    assert client.post("/edit", data={"strength": "0.5"}, files=image).status_code == 200
    assert client.post("/generate", json={"n": 2, **few}).status_code == 200


def in_grafana(expr: str, instance: str) -> str:
    """A query as Grafana sends it."""
    return expr.replace("$instance", instance).replace("$rate", "10s")


def test_no_panel_of_the_dashboard_is_empty(server: Threaded, ask: Ask) -> None:
    (ready,) = until_some(lambda: ask("ddpm_ready"))
    instance = ready["metric"]["instance"]
    empty = list(queries())
    give_up = time.monotonic() + PATIENCE_S
    while empty and time.monotonic() < give_up:
        use(server)  # a rate is of what changes from scrape to scrape
        empty = [
            (title, expr)
            for title, expr in empty
            if not any(math.isfinite(float(series["value"][1])) for series in ask(in_grafana(expr, instance)))
        ]
    assert empty == []
    assert len(PANELS) > 20


def until_some(series: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What is found, once anything is."""
    until(series, "a series")
    return series()


def test_an_instance_that_is_not_chosen_is_not_shown(server: Threaded, ask: Ask) -> None:
    until_some(lambda: ask("ddpm_ready"))
    shown = [
        title for title, expr in queries() if ask(in_grafana(expr, "elsewhere")) and "vector(0)" not in expr
    ]
    assert shown == []
