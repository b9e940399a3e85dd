"""The conventions as tests: who may import whom, how big a file gets, what the lock files hold."""

from __future__ import annotations

import ast
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
# Imports: all that a module may import besides the standard library, from the door down; a room may look at
# what is below it or beside it, never up. errors and telemetry are leaves: they import nothing of ours.

BELOW_ROUTES = "service.edits service.scores service.schemas service.streams service.worker service.images"
BELOW_ENGINE = "service.scheduler service.jobs service.events"
BELOW_WORKER = f"service.engine {BELOW_ENGINE}"
LEAVES = "service.errors service.telemetry"
DOOR = "service service.app service.server service.settings"
HTTP = "fastapi starlette pydantic"

SERVICE = {
    "service": "",
    "service.__main__": f"{DOOR} {LEAVES} uvicorn model.checkpoint model.runtimes",
    "service.cluster": f"{DOOR} {LEAVES} ray model.checkpoint",
    # Wiring: the one place where the network meets the service.
    "service.app": (
        f"{DOOR} service.warmup service.routes service.routes.* {BELOW_ROUTES} {BELOW_WORKER} {LEAVES}"
        f" model.* {HTTP}"
    ),
    "service.warmup": f"service.settings {BELOW_WORKER} {LEAVES} model.* numpy",
    "service.server": f"service.settings service.routes {BELOW_ROUTES} {LEAVES} uvicorn",
    "service.settings": "service.errors pydantic pydantic_settings",
    # HTTP: no tensors.
    "service.routes": f"service service.routes.* {BELOW_ROUTES} {BELOW_WORKER} {LEAVES} {HTTP}",
    "service.routes.*": (
        "service service.routes service.routes.answers service.routes.bodies"
        f" {BELOW_ROUTES} {BELOW_WORKER} {LEAVES} {HTTP}"
    ),
    "service.schemas": (
        "service.images service.jobs service.events service.errors"
        f" model.samplers model.schedule model.denoiser model.typicality {HTTP}"
    ),
    "service.scores": (
        "service.schemas service.edits service.uploads service.images service.events service.errors"
        f" model.samplers model.denoiser model.likelihood model.typicality {HTTP}"
    ),
    "service.edits": (
        "service.schemas service.uploads service.jobs service.events service.errors"
        f" model.samplers model.denoiser model.interpolation {HTTP}"
    ),
    # Between the two: threads, queues and pictures, and neither HTTP nor tensors.
    "service.streams": f"service.jobs service.events {LEAVES}",
    "service.images": "service.events service.errors model.sheets numpy PIL",
    "service.uploads": "service.events service.errors numpy PIL",
    "service.worker": f"{BELOW_WORKER} service.streams {LEAVES}",
    # The engine owns the tensors; what is below it has never heard of them.
    "service.engine": f"{BELOW_ENGINE} service.errors model.denoiser torch numpy",
    "service.scheduler": "service.jobs service.events service.errors numpy sortedcontainers",
    "service.jobs": "service.events service.errors",
    "service.events": "service.errors numpy",
    "service.errors": "",
    "service.telemetry": "prometheus_client",
}
PROGRAMS = "model model.* numpy torch safetensors PIL tqdm matplotlib"
MODEL = {
    "model": "",
    "model.unet": "torch",
    "model.encoder": "model.unet torch",
    "model.schedule": "numpy",
    "model.noise": "numpy",
    "model.samplers": "model.schedule model.diffusion numpy",
    "model.diffusion": "model.schedule torch numpy",
    "model.files": "",
    "model.sheets": "numpy",
    "model.likelihood": "model.noise model.schedule numpy",
    "model.typicality": "model.files numpy",
    "model.checkpoint": (
        "model.encoder model.files model.schedule model.typicality model.unet torch safetensors"
    ),
    "model.interpolation": "model.denoiser numpy",
    "model.runtimes": "model.runtimes.*",
    "model.runtimes.base": "torch",
    "model.runtimes.lowering": "model.unet torch openvino",
    "model.runtimes.torch": "model.checkpoint model.runtimes.base torch",
    "model.runtimes.openvino": (
        "model.checkpoint model.runtimes.base model.runtimes.lowering torch numpy openvino"
    ),
    "model.runtimes.load": (
        "model.checkpoint model.runtimes.base model.runtimes.openvino model.runtimes.torch torch"
    ),
    "model.denoiser": (
        "model.runtimes model.checkpoint model.diffusion model.samplers model.schedule model.noise"
        " torch numpy"
    ),
    # Programs for developers; not in the image.
    "model.training": "",
    "model.training.*": PROGRAMS,
    "model.evaluation": "",
    "model.evaluation.*": PROGRAMS,
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


def room_of(name: str) -> str | None:
    """The key in the table that a module goes by: its own name first, then the first pattern that fits."""
    if name in ALLOWED:
        return name
    return next((key for key in ALLOWED if "*" in key and fnmatch(name, key)), None)


def forbidden(source: str, name: str, is_package: bool = False, known: set[str] | None = None) -> set[str]:
    """What this module imports and may not. Raises LookupError for a module that the table doesn't know."""
    room = room_of(name)
    if room is None:
        raise LookupError(f"{name}: a new module; give it a room in this table")
    allowed = ALLOWED[room].split()
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


KNOWN = {"service", "model", *(key for key in ALLOWED if "*" not in key)}


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("model.unet", "import service", {"service"}),
        ("model.training.train", "from service import jobs", {"service.jobs"}),
        ("model.training.train", "import fastapi", {"fastapi"}),
        ("service.scheduler", "import torch.nn as nn", {"torch"}),
        ("service.scheduler", "from torch import Tensor", {"torch"}),
        ("service.scheduler", "from service import engine", {"service.engine"}),
        ("service.scheduler", "from . import engine, jobs", {"service.engine"}),
        ("service.scheduler", "from .engine import Engine", {"service.engine"}),
        ("service.scheduler", "def f():\n    import service.engine", {"service.engine"}),
        ("service.engine", "import fastapi.sse", {"fastapi"}),
        ("service.engine", "from service.worker import Worker", {"service.worker"}),
        ("service.worker", "from service.routes.generate import router", {"service.routes.generate"}),
        ("service.routes.generate", "import torch", {"torch"}),
        ("service.routes.generate", "from ..app import create_app", {"service.app"}),
        ("service.routes.generate", "from service import app", {"service.app"}),
        ("service.errors", "from service.events import Event", {"service.events"}),
        ("service.telemetry", "from service import errors", {"service.errors"}),
        ("service.jobs", "import pydantic", {"pydantic"}),
    ],
)
def test_a_forbidden_import_is_caught(name, source, found):
    assert forbidden(source, name, known=KNOWN) == found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "service.scheduler",
            "import math\nfrom collections.abc import Sequence\nfrom . import jobs, events",
        ),
        ("service.engine", "import torch\nfrom model.denoiser import Chain"),
        ("service.routes.generate", "from fastapi import APIRouter\nfrom service import __version__"),
        ("service.app", "from model import runtimes"),
        ("model.training.train", "from model import checkpoint"),
    ],
)
def test_a_rightful_import_is_not(name, source):
    assert forbidden(source, name, known=KNOWN | {"model.checkpoint", "model.runtimes"}) == set()


def test_an_unknown_module_has_no_room():
    with pytest.raises(LookupError, match="give it a room in this table"):
        forbidden("", "service.brandnew", known=KNOWN)


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
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


# ----------------------------------------------------------------------------------------------------
# Files.


def test_the_packages_are_there():
    assert {"model.samplers", "service.scheduler", "service.routes"} <= set(modules())


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_trade(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: is there a second module in it?"


def test_no_file_is_a_junk_room():
    junk = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
    ours = [path for package in (*OURS, "tests", "bench", "docker") for path in (ROOT / package).rglob("*")]
    assert not [path for path in ours if path.stem.lower() in junk]


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


def test_what_is_served_is_what_is_tested():
    assert pins("requirements-serve.txt").items() <= pins("requirements.txt").items()


# BentoML's instrumentation is not there yet for the version that the service is tested with.
OTHER_IN_THE_COMPARISON = {"opentelemetry-api"}


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
