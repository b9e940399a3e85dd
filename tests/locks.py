"""The lock files: every package that pyproject.toml asks for, directly or not, at the version installed here.

`python -m tests.locks FILE...` rewrites them from the environment it runs in (`make lock`); test_layers.py
compares. The servers of the comparison need other versions of a few packages than the service is tested with,
so they have an environment of their own, and test_layers.py looks at their lock as far as .venv has them.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FILES: dict[str, tuple[str, ...]] = {
    "requirements.txt": ("openvino", "hub", "otel", "train", "dev"),
    "requirements-serve.txt": ("openvino", "hub", "otel"),
    "requirements-cluster.txt": ("openvino", "hub", "otel", "cluster"),
}
PEERS: dict[str, tuple[str, ...]] = {"requirements-bench.txt": ("openvino", "train", "bench")}
# torch's CUDA build pins these itself, each at one version; its other builds don't want them.
CUDA = ("cuda-", "nvidia-", "triton")
NOT_CUDA = {"nvidia-ml-py"}  # asks the driver; BentoML wants it everywhere
# Each of its builds goes with one build of torch. Beside others it cannot be imported, nor can diffusers,
# which uses it where it is there. Tests need only something of its name (tests/stand_ins).
LEFT_OUT = {"torchvision"}

HEADER = """\
# Written by `make lock` from pyproject.toml ({what}); do not edit.
# The CUDA libraries of torch's CUDA build are not listed: that build pins them itself.
"""


def direct(extras: tuple[str, ...] = ()) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return [Requirement(line) for line in wanted]


def closure(extras: tuple[str, ...], *, missing: set[str] | None = None) -> dict[str, str]:
    """Name → installed version of everything that is needed with these extras on this machine.

    One that is not installed goes into `missing`, where that is given; what it needs stays unknown then.
    Raises PackageNotFoundError for it otherwise.
    """
    found: dict[str, str] = {}
    waiting = [(requirement, "") for requirement in direct(extras)]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name in LEFT_OUT or (name.startswith(CUDA) and name not in NOT_CUDA):
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            if missing is None:
                raise
            missing.add(name)
            continue
        found[name] = Version(package.version).public
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in package.requires or ()]
    return dict(sorted(found.items()))


def render(extras: tuple[str, ...]) -> str:
    """The text of the lock file with these extras."""
    what = ", ".join(["dependencies", *extras])
    pins = "".join(f"{name}=={version}\n" for name, version in closure(extras).items())
    return HEADER.format(what=what) + pins


if __name__ == "__main__":
    for file in sys.argv[1:] or FILES:
        (ROOT / file).write_text(render((FILES | PEERS)[file]))
