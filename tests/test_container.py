"""The container keeps its promises: no root, nothing writable, no capabilities, and time to drain."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
FINAL_STAGE = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[-1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]


def instruction(name: str) -> str:
    """The argument of the only such instruction in the image's last stage."""
    [found] = re.finditer(rf"^{name} +(.+)$", FINAL_STAGE, re.MULTILINE)
    return found[1].strip()


def test_the_image_runs_as_nobody_in_particular():
    user, group = instruction("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0


def test_sigterm_reaches_python():
    assert json.loads(instruction("ENTRYPOINT")) == ["python", "-m", "service"]
    assert instruction("STOPSIGNAL") == "SIGTERM"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_locked_down(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert not service.get("privileged")
    assert not service.get("cap_add")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_write_to_volumes_only(name):
    for mount in SERVICES[name]["volumes"]:
        source, target, *mode = re.sub(r"^\$\{\w+:-([^}]+)\}", r"\1", mount).split(":")
        assert target.startswith("/")
        if source.startswith("."):  # a file or folder of the host
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", [name for name in SERVICES if "build" not in SERVICES[name]])
def test_the_image_of_others_is_of_one_version_and_has_a_health_check(name):
    assert re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"])
    check = SERVICES[name]["healthcheck"]["test"]
    [port] = SERVICES[name]["ports"]
    assert check[0] == "CMD"
    assert f"http://127.0.0.1:{port.rpartition(':')[2]}/" in check[-1]


def test_who_waits_for_whom():
    waits = {name: service.get("depends_on", {}) for name, service in SERVICES.items()}
    assert waits == {
        "ddpm": {},
        # It is to see the service load, or fail to.
        "prometheus": {"ddpm": {"condition": "service_started"}},
        "grafana": {"prometheus": {"condition": "service_healthy"}},
    }


def test_nobody_logs_in_to_grafana():
    settings = SERVICES["grafana"]["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"


def test_grafana_shows_what_is_mounted():
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{mounts['./docker/grafana/dashboards']}/ddpm.json"


@pytest.mark.parametrize("variable", ["HF_HOME", "TRITON_CACHE_DIR"])
def test_what_is_large_or_executable_goes_to_the_volume(variable):
    # A tmpfs is neither: its files take memory, and Docker mounts it with `noexec`.
    [folder] = re.findall(rf"\b{variable}=(\S+)", FINAL_STAGE)
    assert folder.startswith("/cache/")
    assert "cache:/cache" in SERVICES["ddpm"]["volumes"]
    # A new volume takes its owner from the image.
    user = instruction("USER").partition(":")[0]
    assert re.search(rf"install --directory --owner {user} --group {user} /cache\b", FINAL_STAGE)


@pytest.mark.parametrize("name", SERVICES)
def test_no_port_is_open_to_the_network_unless_asked_for(name):
    assert all(re.match(r"\$\{\w+:-127\.0\.0\.1:\d+\}:\d+$", port) for port in SERVICES[name]["ports"])


def test_the_grace_is_longer_than_the_drain():
    drain = float(SERVICES["ddpm"]["environment"]["DDPM_DRAIN_S"])
    grace = re.fullmatch(r"(\d+)s", SERVICES["ddpm"]["stop_grace_period"])
    assert grace is not None
    assert float(grace[1]) >= drain + 5


def test_every_setting_passes_through_compose():
    from service.settings import Settings

    fixed_in_the_image = {"DDPM_HOST", "DDPM_PORT"}
    wanted = {f"DDPM_{name}".upper() for name in Settings.model_fields} - fixed_in_the_image
    assert set(SERVICES["ddpm"]["environment"]) == wanted


BUILD_CHECK = ROOT / "docker" / "build-check"


def test_the_build_check_runs_the_image_as_compose_does():
    [run] = re.findall(r"^pod run .*?(?<!\\)$", BUILD_CHECK.read_text(), re.MULTILINE | re.DOTALL)
    service = SERVICES["ddpm"]
    [tmpfs] = service["tmpfs"]
    for flag in ("--read-only", f"--tmpfs {tmpfs}", "--cap-drop ALL", "--security-opt no-new-privileges"):
        assert f" {flag} " in run
    assert not re.search(r"--(user|entrypoint|env|privileged|volume)\b", run)


def test_the_build_check_says_what_it_can_do():
    result = subprocess.run([BUILD_CHECK, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    options = set(re.findall(r"^        (--[a-z-]+)\)", BUILD_CHECK.read_text(), re.MULTILINE)) - {"--help"}
    assert len(options) == 8
    assert all(option in result.stdout for option in options)


def test_the_build_check_refuses_an_unknown_option():
    result = subprocess.run(
        [BUILD_CHECK, "--nothing"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2


def test_only_what_is_copied_goes_to_the_builder():
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


LEFT_OUT = ("model/training", "model/evaluation")


def test_the_image_has_no_training_or_evaluation_code():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    # The last matching rule decides, so the exclusion must come after what lets model/ in.
    assert all(ignore.index("!model") < ignore.index(folder) for folder in LEFT_OUT)
    assert not [line for line in ignore if line.startswith(tuple(f"!{folder}" for folder in LEFT_OUT))]
    assert all((ROOT / folder / "__init__.py").exists() for folder in LEFT_OUT)


def in_the_image() -> list[Path]:
    """The Python files of our packages that the image holds."""
    left_out = tuple(f"{folder}/" for folder in LEFT_OUT)
    files = [path for package in ("model", "service") for path in (ROOT / package).rglob("*.py")]
    return [path for path in files if not path.relative_to(ROOT).as_posix().startswith(left_out)]


def imported(source: str) -> set[str]:
    """Every module that a source file may import, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", in_the_image(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_in_the_image_imports_what_it_lacks(path):
    development = ("model.training", "model.evaluation", "bench", "tests", "matplotlib", "tqdm")
    names = imported(path.read_text())
    assert not [name for name in names if name.startswith(development)]


@pytest.mark.parametrize(
    "source",
    [
        "import model.training.data",
        "from model.evaluation import plots",
        "def f():\n    from model import training",
    ],
)
def test_such_an_import_is_found(source):
    assert any(name.startswith(("model.training", "model.evaluation")) for name in imported(source))


class Ready(BaseHTTPRequestHandler):
    """Answers every GET with its server's `status`, and notes the paths."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def check_health(port: int) -> subprocess.CompletedProcess[str]:
    # A proxy that would swallow the probe, were it asked.
    environment = os.environ | {"DDPM_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    script = ROOT / "docker" / "healthcheck.py"
    return subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
def test_healthy_means_ready(status, code):
    server = HTTPServer(("127.0.0.1", 0), Ready)
    server.status, server.asked = status, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        result = check_health(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert result.returncode == code, result.stderr
    assert server.asked == ["/readyz"]  # type: ignore[attr-defined]


def test_nobody_there_is_not_healthy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        result = check_health(taken.getsockname()[1])
    assert result.returncode == 1
    assert "no answer" in result.stderr
    assert "Traceback" not in result.stderr
