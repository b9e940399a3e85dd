from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from model import checkpoint
from model.checkpoint import CheckpointError
from model.training import averaging
from model.training.averaging import STDS, PowerAverages, average, coefficients, gamma, overlap
from tests.model.conftest import tiny_checkpoint


@pytest.mark.parametrize(("std", "expected"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_have_the_exponents_of_the_paper(std: float, expected: float) -> None:
    found = gamma(std)
    assert found == pytest.approx(expected, abs=0.02)
    assert (found + 1) ** 0.5 / ((found + 2) * (found + 3) ** 0.5) == pytest.approx(std)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3])
def test_a_width_that_no_profile_has_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="width of an average"):
        gamma(std)


def path(steps: int) -> torch.Tensor:
    """Weights of a made-up training: one number that moves and trembles."""
    rng = torch.Generator().manual_seed(0)
    return torch.linspace(0, 1, steps).sqrt() + 0.1 * torch.randn(steps, generator=rng)


def number(value: float) -> nn.Linear:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def only(net: nn.Module) -> float:
    (parameter,) = net.parameters()
    return float(parameter)


def profile(std: float, steps: int) -> torch.Tensor:
    """The share of each step's weights in an average, from the closed form."""
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    return (edges ** (gamma(std) + 1)).diff()


def test_an_average_weights_each_step_as_its_profile_says() -> None:
    values = path(200)
    averages = PowerAverages(number(99.0))  # what was there before the first step counts for nothing
    for step, value in enumerate(values.tolist(), 1):
        averages.update(number(value), step)
    for std, module in averages.modules.items():
        expected = float((profile(std, 200) * values.double()).sum())
        assert only(module) == pytest.approx(expected, abs=1e-5)


def test_profiles_overlap_as_their_integral_says() -> None:
    grid = np.arange(0.0005, 3, 0.001)

    def shape(t: float, g: float) -> np.ndarray:
        return np.where(grid <= t, (g + 1) * grid**g / t ** (g + 1), 0)

    steps, gammas = np.array([1.0, 3.0]), np.array([2.0, 7.0])
    found = overlap(steps, gammas, steps, gammas)
    for i in range(2):
        for j in range(2):
            product = shape(steps[i], gammas[i]) * shape(steps[j], gammas[j])
            assert found[i, j] == pytest.approx(product.sum() * 0.001, rel=1e-2)


@pytest.mark.parametrize("std", [0.07, 0.15])
def test_another_width_is_reached_from_snapshots(tmp_path: Path, std: float) -> None:
    values = path(400)
    averages = PowerAverages(number(0.0))
    for step, value in enumerate(values.tolist(), 1):
        averages.update(number(value), step)
        if step % 20 == 0:
            averages.write(tmp_path, step)
    expected = float((profile(std, 400) * values.double()).sum())
    found = float(average(tmp_path, std)["weight"])
    assert found == pytest.approx(expected, abs=3e-3)
    nearest = min(abs(only(module) - expected) for module in averages.modules.values())
    assert abs(found - expected) < nearest / 3  # closer than either average that was kept


def test_the_width_of_a_kept_average_is_that_average(tmp_path: Path) -> None:
    averages = PowerAverages(number(0.0))
    for step in range(1, 5):
        averages.update(number(float(step)), step)
        averages.write(tmp_path, step)
    for std, module in averages.modules.items():
        torch.testing.assert_close(average(tmp_path, std)["weight"], module.weight)


def test_shares_of_snapshots_add_up_to_about_one() -> None:
    steps = np.repeat(np.arange(1.0, 9.0), len(STDS))
    shares = coefficients(steps, np.tile([gamma(std) for std in STDS], 8), 8.0, 0.15)
    assert shares.sum() == pytest.approx(1, abs=0.01)


def test_the_program_writes_a_folder_with_the_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint()
    run, out = tmp_path / "run", tmp_path / "out"
    checkpoint.save(run, model)
    assert averaging.main([str(run), "--out", str(out)]) == 3
    assert "no snapshots" in capsys.readouterr().err
    averages = PowerAverages(model.unet)
    other = tiny_checkpoint().unet
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.25)
    averages.update(other, 1)
    averages.write(run / "training" / "averages", 1)
    assert averaging.main([str(run), "--std", "0.05", "--out", str(out)]) == 0
    written = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(value, torch.tensor(0.25)) for value in written.values())
    assert averaging.main([str(run), "--std", "0.5", "--out", str(out)]) == 3


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000001.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a snapshot"):
        average(tmp_path, 0.1)
