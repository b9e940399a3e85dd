"""One known result of a network, and folders that have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import checkpoint, self_test
from model.checkpoint import MANIFEST, WEIGHTS, CheckpointError
from model.evaluation.self_test import COUNT, main
from model.folder import check_manifest
from model.runtimes import TorchRuntime
from service.engine.warmup import run_self_test


@pytest.fixture
def tested(folder: Path) -> Path:
    """A folder with a self-test."""
    assert main([str(folder)]) == 0
    return folder


def test_the_file_is_written_listed_and_read(tested: Path) -> None:
    assert f"  {self_test.FILE}" in (tested / MANIFEST).read_text()
    check_manifest(tested)
    found = checkpoint.load(tested).self_test
    assert found is not None
    assert (found.seed, found.timestep, found.label, len(found.values)) == (0, 500, 0, COUNT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_weights_pass_in_every_dtype(tested: Path, dtype: Any) -> None:
    model = checkpoint.load(tested)
    result = run_self_test(model, TorchRuntime(model, "cpu", dtype))
    assert result is not None
    assert result.passed
    assert (result.difference < 1e-4) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_fail(tested: Path, dtype: Any) -> None:
    path = tested / "unet" / WEIGHTS
    state = load_file(path)
    save_file(state | {"conv_in.weight": state["conv_in.weight"].flip(0)}, path)
    checkpoint.write_manifest(tested)  # so that the checksums say nothing
    model = checkpoint.load(tested)
    result = run_self_test(model, TorchRuntime(model, "cpu", dtype))
    assert result is not None
    assert not result.passed


def test_what_is_not_finite_fails(tested: Path) -> None:
    model = checkpoint.load(tested)
    runtime = TorchRuntime(model)
    with torch.no_grad():
        next(runtime.unet.parameters()).fill_(torch.nan)
    result = run_self_test(model, runtime)
    assert result is not None
    assert not result.passed


def test_new_weights_have_no_self_test_of_old_ones(tested: Path) -> None:
    checkpoint.save(tested, checkpoint.load(tested))
    assert checkpoint.load(tested).self_test is None


def test_a_self_test_that_the_manifest_leaves_out_is_refused(tested: Path) -> None:
    lines = (tested / MANIFEST).read_text().splitlines()
    (tested / MANIFEST).write_text("\n".join(line for line in lines if self_test.FILE not in line))
    with pytest.raises(CheckpointError, match=r"self_test.json: not listed in SHA256SUMS"):
        checkpoint.load(tested)


@pytest.mark.parametrize(
    "values",
    [
        {"values": []},
        {"values": [0.0] * 65},
        {"values": [float("nan")]},
        {"values": "ab"},
        {"values": 7},
        {"seed": -1},
        {"seed": float("inf")},
        {"timestep": -1},
        {"timestep": 1e300},
        {"label": 4},
        {"label": None},
        {"tolerances": [0.1]},
    ],
)
def test_one_that_cannot_be_of_this_network_is_named(tested: Path, values: dict[str, Any]) -> None:
    path = tested / self_test.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (tested / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"self_test.json: "):
        checkpoint.load(tested)


def test_a_folder_that_cannot_be_loaded_gets_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("\n") == 1
