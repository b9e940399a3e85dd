"""Wheels for a machine that has torch and no network: `python -m bench.wheels DIR --python 3.12`.

Downloads what the service, its tests and diffusers need besides torch and what torch brings, in the versions
installed here, for Linux on x86-64. `roots.txt` beside them lists what is asked for by name there
(`bench/gpu.sh`); pip finds the rest among the wheels, or installed already.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tomllib import loads

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
TORCH = frozenset({"torch", "numpy", "triton", "openvino", "filelock", "fsspec", "jinja2", "markupsafe"}) | {
    "mpmath",
    "networkx",
    "setuptools",
    "sympy",
}
"""There already, or of no use there."""
TOOLS = ("diffusers", "httpx", "hypothesis", "packaging", "psutil", "pytest")
"""Of the `dev` extra, what `bench.gpu` uses."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


def roots() -> list[Requirement]:
    """What is needed by name, with the least versions that this project takes."""
    project = loads(PYPROJECT.read_text())["project"]
    tools = [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    wanted = [Requirement(line) for line in project["dependencies"]]
    wanted += [each for each in tools if each.name in TOOLS]
    return [each for each in wanted if canonicalize_name(each.name) not in TORCH]


def closure(wanted: Sequence[Requirement]) -> dict[str, str]:
    """All that these need, by what is installed here: versions by name."""
    found: dict[str, str] = {}
    left = list(wanted)
    while left:
        each = left.pop()
        name = canonicalize_name(each.name)
        if name in found or name in TORCH or name.startswith("nvidia"):
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # for another system, say
        needs = [Requirement(line) for line in requires(name) or ()]
        extras = ["", *each.extras]
        left += [n for n in needs if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
    return dict(sorted(found.items()))


def fetch(folder: Path, python: str, packages: Sequence[str]) -> bool:
    """Download wheels for a version of Python; whether all were there."""
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    done = subprocess.run([*command, "--dest", str(folder), *packages], capture_output=True, check=False)
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Download, and say what is missing. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.wheels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", help="of the machine; repeatable (3.12)")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = roots()
    packages = [f"{name}=={number}" for name, number in closure(wanted).items()]
    missing = []
    for python in args.python or ["3.12"]:
        if not fetch(args.folder, python, packages):
            missing += [f"{each} ({python})" for each in packages if not fetch(args.folder, python, [each])]
    (args.folder / "roots.txt").write_text("".join(f"{each.name}{each.specifier}\n" for each in wanted))
    size = sum(path.stat().st_size for path in args.folder.glob("*.whl")) / 2**20
    print(f"{len(list(args.folder.glob('*.whl')))} wheels, {size:.0f} MiB, in {args.folder}")
    for each in missing:
        print(f"no wheel: {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
