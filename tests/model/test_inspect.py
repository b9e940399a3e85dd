"""What `python -m model.inspect` says of a model, and how it ends."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from model import checkpoint
from model.checkpoint import WEIGHTS, Checkpoint
from model.inspect import inspect, main, plot, run_once
from model.unet import UNet, UNetConfig
from tests.model.conftest import SCHEDULER


def test_what_a_model_is_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("logs/events", "unet/diffusion_pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        f"tiny: DDPMPipeline, in {folder}",
        "network     UNet, ",
        "pictures    8 × 8, 1 channels (grey)",
        "classes     3 (cat, dog, fox), and the null class 3",
        f"taken       unet/config.json, unet/{WEIGHTS}, scheduler/scheduler_config.json, model_index.json,",
        "ignored     logs/events, unet/diffusion_pytorch_model.bin",
        "schedule    DDPMScheduler, T = 1000; predicts epsilon; x₀ clipped to ±1; fixed_small; trailing",
        "forward     at t = 999: ",
        "warning: nothing says that the weights are moving averages",
        "warning: clip_sample is missing from the scheduler's config",
    ):
        assert line in out


def test_the_same_for_programs(tiny: Checkpoint, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(parameter.numel() for parameter in tiny.unet.parameters())
    assert (found["shape"], found["classes"], found["is_ema"]) == ([1, 8, 8], ["cat", "dog", "fox"], None)
    assert (found["timesteps"], found["clip"], found["forward"]["finite"]) == (1000, 1.0, True)
    assert found["log_snr"] == pytest.approx([9.21, -10.12], abs=0.01)


def test_moving_averages_are_known_by_where_they_lie(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    (folder / "unet").rename(folder / "unet_ema")
    report, _ = inspect(str(folder))
    assert (report.is_ema, report.name) == (True, "tiny")
    assert f"unet_ema/{WEIGHTS}" in report.taken
    assert not any("moving averages" in warning for warning in report.warnings)


def test_what_is_logged_while_it_loads_is_in_the_report(folder: Path) -> None:
    (folder / "unet_ema").mkdir()
    report, _ = inspect(str(folder))
    assert report.is_ema is False
    assert f"{folder / 'unet' / WEIGHTS}: not moving averages" in report.warnings[0]
    assert not logging.getLogger("model").handlers


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"clip_sample": False}, "clip_sample is off although the network predicts ε: blurry or black"),
        ({"clip_sample": True}, None),
        ({"clip_sample": False, "prediction_type": "v_prediction"}, None),
        ({}, "clip_sample is missing from the scheduler's config"),
    ],
)
def test_predictions_that_are_not_clipped_are_warned_of(
    tiny: Checkpoint, folder: Path, values: dict[str, object], named: str | None
) -> None:
    checkpoint.save(folder, replace(tiny, scheduler_config=SCHEDULER | values))
    about = [each for each in inspect(str(folder))[0].warnings if "clip_sample" in each]
    assert len(about) == (named is not None)
    assert all(each.startswith(named or "") for each in about)


def test_a_network_that_says_nothing_is_warned_of(tiny: Checkpoint, folder: Path) -> None:
    untrained = UNet(cast("UNetConfig", tiny.unet.config))
    torch.nn.init.zeros_(untrained.conv_out.weight)
    checkpoint.save(folder, replace(tiny, unet=untrained, class_names=("a", "a", "b")))
    report, _ = inspect(str(folder))
    assert report.classes == ("a (0)", "a (1)", "b")
    warnings = "\n".join(report.warnings)
    assert "some class names are there twice" in warnings
    assert "the output on noise has standard deviation 0." in warnings


def test_the_forward_is_of_the_networks_size(tiny: Checkpoint) -> None:
    forward = run_once(tiny)
    assert (forward.t, forward.finite) == (999, True)
    assert forward.seconds > 0
    assert forward.std > 0


@pytest.mark.parametrize("model", ["nowhere", "hf:"])
def test_a_model_that_cannot_be_served_gives_one_line_and_code_3(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([model]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{model}: ")
    assert err.count("\n") == 1


def test_a_size_can_be_given(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    (folder / "SHA256SUMS").unlink()
    assert main([str(folder)]) == 3
    assert main([str(folder), "--sample-size", "8x16"]) == 0
    assert inspect(str(folder), (16, 16))[0].shape == (1, 16, 16)


def test_a_curve_as_text() -> None:
    lines = plot(np.linspace(5.0, -3.0, 100), rows=5, columns=20)
    assert len(lines) == 7
    assert lines[0].startswith("    5.00 │•")
    assert lines[4].startswith("   -3.00 │")
    assert lines[4].endswith("•")
    assert sum(line.count("•") for line in lines) == 20
    assert lines[-1].strip().split() == ["0", "99"]
    assert plot(np.array([0.5]))[-3].count("•") == 64  # a single timestep
