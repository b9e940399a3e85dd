"""Too little memory is found before a network is loaded, from the machine's figures and the groups'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint, memory
from model.checkpoint import CheckpointError
from model.memory import available, needed
from tests.service.fakes import tiny_model

MEMINFO = "MemTotal:       64 kB\nMemAvailable:   40 kB\nSwapFree:        8 kB\nHugePages_Total: 0\n"


def machine(root: Path, groups: str = "", **files: str) -> Path:
    """A file system with what Linux says of memory; `__` in a name is a slash."""
    for name, content in {"proc__meminfo": MEMINFO, "proc__self__cgroup": groups, **files}.items():
        path = root / name.replace("__", "/").replace("-", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def group(place: str, limit: str, used: str, stat: str, version: int = 2) -> dict[str, str]:
    names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    values = {names[0]: limit, names[1]: used, "stat": stat}
    return {f"sys__fs__cgroup__{place}memory-{name}": value for name, value in values.items()}


def test_a_machine_has_what_is_available_and_its_swap(tmp_path: Path) -> None:
    assert available(machine(tmp_path)) == 48 << 10


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    assert available(tmp_path) is None


def test_a_group_may_have_less_and_files_in_memory_can_be_dropped(tmp_path: Path) -> None:
    files = group("a__b__", "9000\n", "5000\n", "anon 1\ninactive_file 1000\n")
    assert available(machine(tmp_path, "0::/a/b\n", **files)) == 5000


def test_so_may_the_group_around_it_and_one_without_a_limit_says_nothing(tmp_path: Path) -> None:
    files = group("a__b__", "max\n", "5000\n", "anon 1\n") | group("a__", "7000\n", "5000\n", "anon 1\n")
    assert available(machine(tmp_path, "0::/a/b\n", **files)) == 2000


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    files = group("", "6000\n", "5000\n", "anon 1\n")
    assert available(machine(tmp_path, "0::/docker/1234\n", **files)) == 1000


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    files = group("memory__a__", "6000\n", "5000\n", "inactive_file 1\ntotal_inactive_file 500\n", version=1)
    assert available(machine(tmp_path, "5:cpu:/z\n4:memory:/a\n", **files)) == 1500


def test_weights_take_four_bytes_each_whatever_they_are_stored_in(tmp_path: Path) -> None:
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "missing.safetensors"
    save_file({"x": torch.zeros(3, 5, dtype=torch.float16), "y": torch.tensor(1.0)}, paths[0])
    save_file({"z": torch.zeros(7, dtype=torch.bfloat16)}, paths[1])
    (tmp_path / "c.safetensors").write_bytes(b"none")
    assert needed([*paths, tmp_path / "c.safetensors"]) == 4 * (15 + 1 + 7)


def test_a_model_that_does_not_fit_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "tiny", tiny_model())
    takes = sum(each.numel() for each in tiny_model().unet.parameters()) * 4
    monkeypatch.setattr(memory, "available", lambda: takes)
    checkpoint.load(tmp_path / "tiny")
    monkeypatch.setattr(memory, "available", lambda: takes - 1)
    with pytest.raises(CheckpointError, match=r"memory for its weights, and only .* available$") as found:
        checkpoint.load(tmp_path / "tiny")
    assert "\n" not in str(found.value)
