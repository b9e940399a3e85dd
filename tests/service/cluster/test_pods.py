"""The RayService on a real Ray: a head and a worker, started as in its pods, get what KubeRay sends."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.manifests import ROOT, Manifest, kustomized, one
from tests.ray_service import environment, templates
from tests.service.live import sse

pytestmark = [pytest.mark.slow]
UP_S = 120.0
LONG = "/stream?sampler=ddpm&num_inference_steps=100&preview_every=20&seed=5&n=32&model=avatars"
DEADLINE_S = 60
TOKEN = "a-token-of-ray-that-has-some-length"
RAY = {"x-ray-authorization": f"Bearer {TOKEN}"}
KEY = {"Authorization": "Bearer secret"}
MODELS = ("fashion-mnist", "avatars")


@pytest.fixture(scope="module")
def leave() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leave", ROOT / "docker" / "leave.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now, each another."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


def until(condition: Callable[[], Any], what: str, seconds: float = UP_S) -> Any:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with suppress(httpx.TransportError):
            if found := condition():
                return found
        time.sleep(0.2)
    raise AssertionError(f"{what} did not come")


class Fleet:
    """A head and a worker of one machine: where pods have addresses of their own, these have ports."""

    def __init__(self, manifests: list[Manifest], folder: Path, stack: ExitStack) -> None:
        self.service = one(manifests, "RayService")
        self._stack, self._folder = stack, folder
        names = ("gcs", "dashboard", "serve", "head", "worker", "head-metrics", "worker-metrics", "client")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        variables = environment(manifests, templates(self.service)["replicas"])
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DDPM_", "RAY_"))},
            **variables,
            "PYTHONPATH": variables["PYTHONPATH"].replace("/app", str(ROOT)),
            "DDPM_DEADLINE_S": str(DEADLINE_S),
            "DDPM_RUNTIME": "torch",
            "DDPM_MAX_BATCH": "4",
            "DDPM_API_KEYS": "secret",
            "DDPM_RESUME_SECRET": "0123456789abcdef",
            # As KubeRay sets them, in mode `token`.
            "RAY_AUTH_MODE": self.service["spec"]["rayClusterConfig"]["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
            # Two HAProxies cannot have one port. test_replicas.py has one.
            "RAY_SERVE_ENABLE_HA_PROXY": "0",
        }
        cluster = self.service["spec"]["rayClusterConfig"]
        self.head = self._start(
            *("--head", f"--port={self.ports['gcs']}", f"--temp-dir={folder}"),
            *(f"--dashboard-port={self.ports['dashboard']}", "--dashboard-host=127.0.0.1"),
            *(f"--ray-client-server-port={self.ports['client']}", "--node-ip-address=127.0.0.1"),
            *self._flags("head", cluster["headGroupSpec"]),
        )
        until(lambda: self.get("head", "/api/healthz").status_code == 200, "the head")
        self.worker = self._start(
            *(f"--address=127.0.0.1:{self.ports['gcs']}", "--node-ip-address=127.0.0.1"),
            *self._flags("worker", cluster["workerGroupSpecs"][0]),
        )
        until(lambda: self.get("worker", "/api/healthz").status_code == 200, "the worker")

    def _flags(self, node: str, group: Manifest) -> list[str]:
        given = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        ports = f"--dashboard-agent-listen-port={self.ports[node]}", "--min-worker-port=0"
        return [
            *given,
            *ports,
            "--max-worker-port=0",
            f"--metrics-export-port={self.ports[f'{node}-metrics']}",
        ]

    def _start(self, *flags: str) -> psutil.Process:
        with (self._folder / "started.log").open("ab") as log:
            popen = subprocess.Popen(
                [Path(sys.executable).parent / "ray", "start", "--block", *flags],
                env=self.env,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        process = psutil.Process(popen.pid)
        self._stack.callback(self._stop, popen, process)
        return process

    @staticmethod
    def _stop(popen: subprocess.Popen[bytes], process: psutil.Process) -> None:
        whole = [*process.children(recursive=True), process] if process.is_running() else []
        for each in whole:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        popen.wait(20)

    def get(self, port: str, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=30, **options)

    def send(self, models: dict[str, Path]) -> None:
        """What KubeRay sends to the dashboard; one replica of each, since there is one worker."""
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        config["http_options"] = {"host": "127.0.0.1", "port": self.ports["serve"]}
        sources = ",".join(f"{name}={folder}" for name, folder in models.items())
        config["applications"][0]["args"] |= {"models": sources, "num_replicas": "1", "fronts": "1"}
        address = f"http://127.0.0.1:{self.ports['dashboard']}/api/serve/applications/"
        httpx.put(address, json=config, headers=RAY, timeout=60).raise_for_status()
        until(lambda: self.status()["status"] in ("RUNNING", "DEPLOY_FAILED"), "the application")
        assert self.status()["status"] == "RUNNING", self.status()

    def status(self) -> dict[str, Any]:
        found = self.get("dashboard", "/api/serve/applications/", headers=RAY).json()["applications"]
        return found.get("ddpm", {"status": "NOT_STARTED"})  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def fleet(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    manifests = kustomized(tmp_path_factory.mktemp("overlay").resolve(), "ray-cpu")
    with ExitStack() as stack:
        # Of pytest's own folders the names are too long for sockets.
        folder = stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        found = Fleet(manifests, Path(folder), stack)
        found.send(dict.fromkeys(MODELS, tiny_folder))
        yield found


def test_probes_answer(fleet: Fleet) -> None:
    probes = [
        (node, container[f"{kind}Probe"]["httpGet"])
        for node, template in templates(fleet.service).items()
        for container in template["spec"]["containers"]
        for kind in ("liveness", "readiness")
    ]
    assert len(probes) == 4
    for node, probe in probes:
        port = {"serve": "serve", 52365: "head" if node == "head" else "worker"}[probe["port"]]
        assert fleet.get(port, probe["path"]).status_code == 200, probe


def test_ray_takes_programs_only_of_its_own(fleet: Fleet) -> None:
    assert fleet.get("dashboard", "/api/jobs/").status_code == 401
    assert fleet.get("dashboard", "/api/jobs/", headers=RAY).status_code == 200


def test_every_model_answers_and_keys_are_asked_for(fleet: Fleet) -> None:
    assert fleet.get("serve", "/generate?num_inference_steps=2").status_code == 401
    for name in MODELS:
        answer = fleet.get(
            "serve",
            f"/generate?num_inference_steps=2&model={name}",
            headers={**KEY, "Accept": "image/png"},
        )
        assert answer.status_code == 200, answer.text
        assert answer.content.startswith(b"\x89PNG")


def test_what_is_scraped_is_there(fleet: Fleet) -> None:
    ours = {each.name for each in text_string_to_metric_families(fleet.get("serve", "/metrics").text)}
    assert {"ddpm_ready", "ddpm_samples_waiting"} <= ours
    until(lambda: "ray_serve_" in fleet.get("worker-metrics", "/metrics").text, "Ray's own metrics", 60)


def test_a_worker_that_leaves_finishes_what_it_has(
    fleet: Fleet, leave: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of this file: the worker is gone after it."""
    found = leave.replicas
    whole = {str(each.pid) for each in fleet.worker.children(recursive=True)}

    def of_this_worker() -> list[str]:
        if reader.is_alive():
            model = fleet.status()["deployments"]["avatars"]
            meanwhile.update(each["state"] for each in model["replicas"])
        return [each for each in found() if each in whole]

    monkeypatch.setattr(leave, "replicas", of_this_worker)
    for name, value in {**fleet.env, "RAY_ADDRESS": f"127.0.0.1:{fleet.ports['gcs']}"}.items():
        monkeypatch.setenv(name, value)
    nodes = fleet.get("dashboard", "/api/v0/nodes", headers=RAY).json()["data"]["result"]["result"]
    (worker,) = (each["node_id"] for each in nodes if not each["is_head_node"])
    begun = threading.Event()
    events: list[str] = []
    meanwhile: set[str] = set()

    def read() -> None:
        address = f"http://127.0.0.1:{fleet.ports['serve']}"
        with (
            closing(httpx.Client(base_url=address, timeout=60)) as client,
            client.stream("GET", LONG, headers=KEY) as answer,
        ):
            for event in sse(answer):
                events.append(event.name)
                begun.set()

    reader = threading.Thread(target=read)
    assert len(of_this_worker()) == 3  # two models, and the front
    reader.start()
    assert begun.wait(60)
    # Ray ends replicas that nobody takes over when the time that is left is what they may take.
    assert leave.main(DEADLINE_S + 6, f"--node-id={worker}") is None
    assert of_this_worker() == []
    reader.join(60)
    assert events[-1] == "completed", events
    assert "STOPPING" in meanwhile  # it was still being answered then


def test_nobody_to_tell_is_an_error(leave: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    assert str(leave.main(5, f"--node-id={'1' * 56}")).startswith("Ray cannot be told")


def test_replicas_are_known_by_their_title(leave: ModuleType) -> None:
    with subprocess.Popen(["bash", "-c", "exec -a ray::ServeReplica:ddpm:front sleep 60"]) as process:
        try:
            until(lambda: str(process.pid) in leave.replicas(), "the replica", 10)
        finally:
            process.terminate()
    assert str(process.pid) not in leave.replicas()
