"""The layers as tests: who may import whom, how long a file gets, what the lock files hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests import locks

ROOT = Path(__file__).parent.parent
OURS = ("model", "service")
MAX_LINES = 450

# ----------------------------------------------------------------------------------------------------
# Layers, from the top down: wiring, http, tasks, engine, model. A module may import what its line names and
# the standard library; its line is the one of its own name, else that of its folder.

HTTP = "fastapi starlette pydantic"

SERVICE = {
    "service": "",
    # Wiring: the one place where all layers meet.
    "service.__main__": (
        "service.app service.engine.connection service.engine.messages service.server service.settings"
        " service.startup service.telemetry"
    ),
    "service.startup": "",
    "service.app": (
        "service service.engine.client service.engine.connection service.engine.messages"
        " service.engine.streams service.http.answers service.http.callers"
        " service.http.middleware service.http.openai service.http.openapi service.http.prefix"
        " service.http.problems service.http.routes.*"
        " service.http.state"
        " service.settings service.telemetry fastapi"
    ),
    "service.server": (
        "service.engine.worker service.errors service.heap service.http.state service.protocol"
        " service.settings service.startup uvicorn starlette"
    ),
    "service.protocol": "service.settings httptools uvicorn",
    "service.heap": "",
    "service.settings": "service.engine.messages model.unet_config pydantic pydantic_core pydantic_settings",
    # The client: what it talks to is at the other end of a connection.
    "service.client": "service.client.*",
    "service.client.*": "service.client.* httpx httpx_sse stamina numpy PIL",
    # The command: it calls a service through the client, and starts the programs by their names.
    "service.cli": (
        "service service.client service.client.fields service.command_line service.settings service.terminal"
        " pydantic pydantic_settings rich stamina"
    ),
    "service.command_line": "pydantic_settings shtab",
    "service.terminal": "service.client PIL rich",
    # HTTP: no tensors.
    "service.http": "",
    "service.http.*": (
        "service service.http.* service.tasks.* service.engine.client service.engine.jobs"
        " service.engine.messages service.engine.streams service.engine.worker service.errors"
        " service.settings service.telemetry"
        f" model.likelihood model.samplers model.sheets msgspec opentelemetry {HTTP}"
    ),
    # From a request to a job: no HTTP, and nothing of the engine but what a job is.
    "service.tasks": "",
    "service.tasks.*": (
        "service.tasks.* service.engine.jobs service.engine.messages service.errors model.chain"
        " model.class_names model.condition model.interpolation model.likelihood model.samplers"
        " model.schedule model.sheets"
        " model.typicality numpy PIL pydantic pydantic_core"
    ),
    # The engine: no HTTP. The API's end of it first, which knows no tensors; then the engine's own process.
    "service.engine": "",
    "service.engine.client": (
        "service service.engine.admission service.engine.jobs service.engine.messages service.engine.tracing"
        " service.engine.connection service.engine.worker service.errors service.telemetry msgspec"
    ),
    "service.engine.admission": "service.errors",
    "service.engine.tracing": "service.engine.jobs service.engine.messages opentelemetry",
    "service.engine.worker": (
        "service.engine.connection service.engine.jobs service.engine.messages service.errors msgspec"
    ),
    "service.engine.connection": "service.engine.messages service.engine.wire",
    "service.engine.wire": "service.engine.messages service.errors model.samplers msgspec numpy",
    "service.engine.process": (
        "service.engine.messages service.engine.warmup service.engine.wire service.heap service.telemetry"
        " model.checkpoint model.hub model.runtimes msgspec"
    ),
    "service.engine.warmup": (
        "service.engine.engine service.engine.estimates service.engine.messages service.engine.scheduler"
        " model.chain model.checkpoint model.class_names model.condition model.denoiser model.runtimes"
        " model.samplers model.scheduler_config model.self_test model.state numpy torch"
    ),
    "service.engine.engine": (
        "service.engine.flight service.engine.isolation service.engine.jobs service.engine.messages"
        " service.engine.scheduler service.engine.width"
        " service.errors model.chain model.denoiser model.runtimes model.state msgspec"
    ),
    "service.engine.flight": "service.engine.jobs model.chain model.denoiser model.state",
    "service.engine.width": "",
    "service.engine.isolation": "service.engine.jobs service.errors model.runtimes torch",
    "service.engine.scheduler": (
        "service.engine.arrivals service.engine.estimates service.engine.jobs service.engine.lanes"
        " service.engine.messages service.engine.promises service.errors"
    ),
    "service.engine.lanes": "service.engine.jobs service.engine.order",
    "service.engine.order": "",
    "service.engine.promises": "service.engine.estimates service.engine.jobs sortedcontainers",
    "service.engine.arrivals": "",
    "service.engine.estimates": "service.engine.jobs",
    # A fleet: what needs no Ray is pure.
    "service.cluster": (
        "service.cluster.front service.cluster.naming service.cluster.options service.cluster.replica"
        " service.settings ray"
    ),
    "service.cluster.front": (
        "service.cluster.forwarding service.cluster.metrics service.cluster.naming service.errors"
        " service.http.middleware"
        " service.http.openai service.http.problems service.http.respond service.settings service.telemetry"
        " fastapi msgspec ray starlette"
    ),
    "service.cluster.metrics": "prometheus_client",
    "service.cluster.replica": (
        "service.app service.engine.connection service.engine.messages service.engine.worker"
        " service.http.state service.settings service.telemetry ray starlette"
    ),
    "service.cluster.routing": "service.cluster.policies ray",
    "service.cluster.forwarding": "service.http.event_ids starlette",
    "service.cluster.naming": "service.http.event_ids msgspec starlette",
    "service.cluster.options": "service.settings",
    "service.cluster.policies": "",
    "service.engine.streams": "service.engine.messages service.errors msgspec",
    "service.engine.messages": (
        "service.engine.jobs service.errors model.condition model.schedule model.typicality msgspec numpy"
    ),
    "service.engine.jobs": "model.chain",
    # Leaves.
    "service.errors": "",
    "service.telemetry": "prometheus_client pythonjsonlogger",
}
MODEL = {
    "model": "",
    # Data and pure functions: no torch.
    "model.betas": "numpy",
    "model.scheduler_config": "model.betas numpy",
    "model.schedule": "model.betas model.scheduler_config numpy",
    "model.noise": "numpy",
    "model.samplers": "model.betas model.schedule numpy",
    "model.chain": "model.samplers model.schedule numpy",
    "model.condition": "model.chain model.schedule numpy",
    "model.interpolation": "model.chain numpy",
    "model.likelihood": "model.noise model.schedule numpy",
    "model.typicality": "model.files model.folder numpy",
    "model.sheets": "numpy",
    "model.class_names": "",
    "model.files": "",
    # Networks and what runs them.
    "model.network": "torch",
    "model.unet_config": "",
    "model.blocks": "model.unet_config torch",
    "model.unet": "model.blocks model.network model.unet_config torch",
    "model.denoising_diffusion": "model.network model.unet_config torch denoising_diffusion_pytorch",
    "model.encoder": "model.blocks model.unet_config torch",
    "model.diffusion": "model.schedule torch numpy",
    "model.device_noise": "model.noise model.noise_kernel numpy torch",
    "model.noise_kernel": "torch triton",
    # Model folders: what lies where, what it is, and what of it is loaded.
    "model.folder": "",
    "model.self_test": "model.files model.folder model.noise numpy torch",
    "model.pipeline": "model.denoising_diffusion model.folder",
    "model.memory": "safetensors",
    "model.weights": "model.files model.folder torch safetensors",
    "model.layout": "model.folder model.pipeline model.unet_config model.weights",
    "model.hub": "model.folder model.layout model.pipeline huggingface_hub",
    "model.inspect": (
        "model.checkpoint model.class_names model.hub model.layout model.schedule model.scheduler_config"
        " model.unet_config numpy torch"
    ),
    "model.checkpoint": (
        "model.condition model.denoising_diffusion model.encoder model.files model.folder model.layout"
        " model.memory model.network model.pipeline model.schedule model.scheduler_config model.self_test"
        " model.typicality model.unet model.unet_config model.weights torch"
    ),
    "model.runtimes": (
        "model.runtimes.base model.runtimes.load model.runtimes.openvino model.runtimes.queues"
        " model.runtimes.recorded model.runtimes.torch"
    ),
    "model.runtimes.base": "model.runtimes.queues torch",
    "model.runtimes.queues": "numpy torch",
    "model.runtimes.recorded": "torch",
    "model.runtimes.lowering": "model.blocks model.unet torch openvino",
    "model.runtimes.torch": (
        "model.checkpoint model.runtimes.base model.runtimes.queues model.runtimes.recorded torch"
    ),
    "model.runtimes.openvino": (
        "model.checkpoint model.runtimes.base model.runtimes.lowering model.runtimes.queues model.unet torch"
        " numpy openvino"
    ),
    "model.runtimes.simulated": "model.runtimes.base model.runtimes.queues torch",
    "model.runtimes.load": (
        "model.checkpoint model.runtimes.base model.runtimes.openvino model.runtimes.torch torch"
    ),
    "model.state": "model.chain model.runtimes model.samplers numpy torch",
    "model.denoiser": (
        "model.chain model.checkpoint model.device_noise model.diffusion model.interpolation model.noise"
        " model.runtimes model.samplers model.schedule model.state torch numpy"
    ),
    # Other projects' checkpoints: a program for the terminal; nothing above imports it.
    "model.convert": "",
    "model.convert.*": (
        "model.checkpoint model.condition model.convert.* model.denoising_diffusion model.encoder"
        " model.folder model.layout model.pipeline model.schedule model.unet_config model.weights numpy"
        " torch safetensors"
    ),
    # Programs for developers, not in the image; nothing above imports them.
    "model.training": "",
    "model.training.*": (
        "model.chain model.checkpoint model.denoiser model.denoising_diffusion model.diffusion model.encoder"
        " model.files model.network model.runtimes model.samplers model.schedule model.training.* model.unet"
        " model.unet_config model.evaluation.plots numpy torch safetensors PIL tqdm"
    ),
    "model.evaluation": "",
    "model.evaluation.*": (
        "model.chain model.checkpoint model.denoiser model.diffusion model.evaluation.* model.files"
        " model.likelihood model.noise model.runtimes model.samplers model.schedule model.self_test"
        " model.sheets model.training.data model.typicality numpy torch safetensors PIL tqdm matplotlib"
    ),
}
ALLOWED = SERVICE | MODEL


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of ours."""
    found = {}
    for path in sorted(path for package in OURS for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, name: str, is_package: bool, known: set[str]) -> set[str]:
    """What a module imports, wherever in it: our modules by dotted name, others by their top one."""
    found = set()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            # `from service import engine` imports a module, `from service import __version__` a name in one
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                found.add(inner if inner in known else origin)
    return {module if module.split(".")[0] in OURS else module.split(".")[0] for module in found}


def line_of(name: str) -> str | None:
    """The key in the table that a module goes by: its own name first, then the first pattern that fits."""
    if name in ALLOWED:
        return name
    return next((key for key in ALLOWED if "*" in key and fnmatch(name, key)), None)


def forbidden(source: str, name: str, is_package: bool = False, known: set[str] | None = None) -> set[str]:
    """What this module imports and may not. Raises LookupError for a module that the table doesn't know."""
    line = line_of(name)
    if line is None:
        raise LookupError(f"{name}: a new module; add it to this table")
    allowed = ALLOWED[line].split()
    found = imports(source, name, is_package, known if known is not None else set(modules()))
    return {
        module
        for module in found
        if module not in sys.stdlib_module_names and not any(fnmatch(module, entry) for entry in allowed)
    }


@pytest.mark.parametrize("name", modules())
def test_imports_point_downward(name):
    path = modules()[name]
    found = forbidden(path.read_text(), name, path.name == "__init__.py")
    assert not found, (
        f"{name} may not import {', '.join(sorted(found))}: see the table in {Path(__file__).name}"
    )


@pytest.mark.parametrize("key", ALLOWED)
def test_the_table_allows_nothing_that_is_not_used(key):
    members = [name for name in modules() if line_of(name) == key]
    assert members, f"{key} does not exist"
    used = set()
    for name in members:
        path = modules()[name]
        used |= imports(path.read_text(), name, path.name == "__init__.py", set(modules()))
    unused = [entry for entry in ALLOWED[key].split() if not any(fnmatch(module, entry) for module in used)]
    assert not unused, f"{key} does not import {', '.join(unused)}"


KNOWN = set(modules())


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("model.unet", "import service", {"service"}),
        ("model.chain", "import torch", {"torch"}),
        ("model.denoiser", "from model.evaluation import plots", {"model.evaluation.plots"}),
        ("model.training.train", "from service.engine import jobs", {"service.engine.jobs"}),
        ("model.training.train", "import fastapi", {"fastapi"}),
        ("service.engine.scheduler", "import torch.nn as nn", {"torch"}),
        ("service.engine.scheduler", "from torch import Tensor", {"torch"}),
        ("service.engine.scheduler", "from service.engine import engine", {"service.engine.engine"}),
        ("service.engine.scheduler", "from . import engine, jobs", {"service.engine.engine"}),
        ("service.engine.scheduler", "from .engine import Engine", {"service.engine.engine"}),
        ("service.engine.scheduler", "def f():\n    import service.engine.engine", {"service.engine.engine"}),
        ("service.engine.engine", "import fastapi.sse", {"fastapi"}),
        ("service.engine.engine", "from model.training import data", {"model.training.data"}),
        ("service.engine.process", "from service.engine.client import Phase", {"service.engine.client"}),
        ("service.engine.jobs", "import pydantic", {"pydantic"}),
        ("service.tasks.edit", "from service.http import forms", {"service.http.forms"}),
        ("service.tasks.edit", "import torch", {"torch"}),
        ("service.tasks.edit", "from service.engine import engine", {"service.engine.engine"}),
        ("service.http.routes.generate", "import torch", {"torch"}),
        ("service.http.routes.generate", "from ...app import create_app", {"service.app"}),
        ("service.http.answers", "from service.engine import scheduler", {"service.engine.scheduler"}),
        ("service.errors", "from service.engine.messages import Event", {"service.engine.messages"}),
        ("service.telemetry", "from service import errors", {"service.errors"}),
    ],
)
def test_a_forbidden_import_is_caught(name, source, found):
    assert forbidden(source, name, known=KNOWN) == found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "service.engine.scheduler",
            "import math\nfrom collections.abc import Sequence\nfrom . import jobs, messages",
        ),
        ("service.engine.isolation", "import torch\nfrom service.errors import ComputeError"),
        ("service.http.routes.generate", "from fastapi import APIRouter\nfrom service import __version__"),
        ("model.training.train", "from model import checkpoint"),
    ],
)
def test_an_allowed_import_is_not(name, source):
    assert forbidden(source, name, known=KNOWN) == set()


def test_an_unknown_module_is_not_in_the_table():
    with pytest.raises(LookupError, match="add it to this table"):
        forbidden("", "service.brandnew", known=KNOWN)


def test_the_process_that_serves_http_has_no_torch():
    """Imported for real, so that what is imported by what is imported counts too."""
    program = "import sys, service.app, service.server, service.__main__\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def import_graph() -> dict[str, set[str]]:
    known = modules()
    return {
        name: {
            module
            for module in imports(path.read_text(), name, path.name == "__init__.py", set(known))
            if module in known and module != name
        }
        for name, path in known.items()
    }


def test_no_two_modules_import_each_other():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' → '.join(error.args[1])}")


# ----------------------------------------------------------------------------------------------------
# Files.


def test_the_packages_are_there():
    assert {"model.samplers", "service.engine.scheduler", "service.http.routes"} <= set(modules())


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_about_one_thing(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: is there a second module in it?"


def test_no_file_is_called_utils():
    junk = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    ours = [path for package in (*OURS, "tests", "bench", "docker") for path in (ROOT / package).rglob("*")]
    named = [path for path in ours if path.stem.lower() in junk]
    assert not [path for path in named if "node_modules" not in path.parts]


# ----------------------------------------------------------------------------------------------------
# The lock files.


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("file", locks.FILES)
def test_a_lock_names_all_that_is_needed_and_no_more(file):
    found = locks.closure(locks.FILES[file])
    assert pins(file) == found, "run `make lock`, or install what the lock says"


@pytest.mark.parametrize("file", locks.FILES | locks.PEERS)
def test_a_lock_is_within_the_ranges(file):
    for requirement in locks.direct((locks.FILES | locks.PEERS)[file]):
        version = pins(file)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not take {version}"


@pytest.mark.parametrize("file", ["requirements-serve.txt", "requirements-cluster.txt"])
def test_what_is_served_is_what_is_tested(file):
    assert pins(file).items() <= pins("requirements.txt").items()


# BentoML's instrumentation is not there yet for the version that the service is tested with.
OTHER_IN_THE_COMPARISON = {
    f"opentelemetry-{name}" for name in ("api", "exporter-prometheus", "sdk", "semantic-conventions")
}


def test_what_is_compared_is_what_is_tested():
    ours, theirs = pins("requirements.txt"), pins("requirements-bench.txt")
    differing = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert differing == OTHER_IN_THE_COMPARISON


@pytest.mark.parametrize("file", locks.PEERS)
def test_the_lock_of_the_comparison_names_all_that_is_known_to_be_needed(file):
    missing: set[str] = set()
    found = locks.closure(locks.PEERS[file], missing=missing)
    assert (found.keys() | missing) - pins(file).keys() == set()
    assert {"torch", "diffusers"} <= found.keys()
