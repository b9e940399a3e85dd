"""A real Prometheus scrapes the service, and the queries an operator would ask have answers."""

import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.service.fakes import PATIENCE_S, until

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on this machine"),
]
CONFIG = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs: [{{job_name: ddpm, static_configs: [{{targets: ["{target}"]}}]}}]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def prometheus(serve, tmp_path: Path):
    """(a running service, a function that asks its Prometheus)."""
    server = serve()
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(target=server.url.removeprefix("http://")))
    port = free_port()
    assert PROMETHEUS is not None
    process = subprocess.Popen(
        [
            PROMETHEUS,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str) -> float | None:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
        except httpx.ConnectError:
            return None
        if answer.status_code != 200:
            return None
        result = answer.json()["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    yield server, ask
    process.terminate()
    process.wait(PATIENCE_S)


def test_prometheus_scrapes_the_service(prometheus):
    server, ask = prometheus
    until(lambda: ask('up{job="ddpm"}') == 1, "the first scrape")
    until(lambda: ask("ddpm_ready") == 1, "readiness as a metric")

    assert server.client.post("/generate", json={"n": 3, "num_inference_steps": 5}).status_code == 200
    until(lambda: ask("sum(ddpm_images_generated_total)") == 3, "three images")
    until(lambda: ask("ddpm_steps_total") == 15, "fifteen steps")
    until(lambda: ask('ddpm_requests_total{route="/generate",outcome="2xx"}') == 1, "the request")
    until(lambda: (ask("ddpm_step_duration_seconds_count") or 0) >= 5, "timed steps")
    quantile = "histogram_quantile(0.95, sum by (le) (ddpm_request_duration_seconds_bucket))"
    until(lambda: (ask(quantile) or 0) > 0, "a quantile")
    assert ask("ddpm_created") is None
