"""The wheel holds what `pip install` needs to give a service that starts, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

from service.settings import INCLUDED

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, since a build leaves files behind that the next one would take."""
    source = tmp_path_factory.mktemp("source")
    for name in ("model", "service", "weights", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return ZipFile(path)


def below(folder: str, pattern: str = "*") -> set[str]:
    """The files of a folder of this repository."""
    found = (path for path in (ROOT / folder).rglob(pattern) if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_it_has_the_packages_and_the_pages(wheel: ZipFile) -> None:
    names = set(wheel.namelist())
    wanted = below("model", "*.py") | below("service", "*.py") | below("service/web")
    assert {"service/web/index.html", "service/cli.py", "model/training/train.py"} <= wanted
    assert wanted - names == set()
    assert {"service/py.typed", "model/py.typed"} <= names


def test_it_has_of_the_included_model_what_is_loaded(wheel: ZipFile) -> None:
    found = {name for name in wheel.namelist() if name.startswith("weights/")}
    listed = {line.split()[1] for line in (INCLUDED / "SHA256SUMS").read_text().splitlines()}
    wanted = listed | {"SHA256SUMS", "README.md", "typicality.json"}
    assert found == {f"weights/{INCLUDED.name}/{name}" for name in wanted}


def test_it_has_nothing_else(wheel: ZipFile) -> None:
    metadata = {name for name in wheel.namelist() if ".dist-info/" in name}
    others = {name.partition("/")[0] for name in set(wheel.namelist()) - metadata}
    assert others == {"model", "service", "weights"}
    assert sum(file.compress_size for file in wheel.infolist()) < 20_000_000


def test_it_gives_the_command(wheel: ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    scripts = ConfigParser()
    scripts.read_string(wheel.read(name).decode())
    assert dict(scripts["console_scripts"]) == {"ddpm": "service.cli:main"}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_the_included_model_is_found_where_the_wheel_is_unpacked(wheel: ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    program = "from service.settings import Settings; print(Settings(_env_file=None).model)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "site" / "weights" / "fashion-mnist", done.stderr
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
