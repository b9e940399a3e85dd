from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import ablation
from bench.ablation import CHOICES, Choice, bits_per_dimension, steps_done
from model import checkpoint
from model.diffusion import q_posterior
from model.schedule import NoiseSchedule
from model.training import train
from model.training.data import Dataset
from model.training.train import Trainer
from tests.model.conftest import SCHEDULER, tiny_checkpoint
from tests.model.evaluation.test_evaluate import data, model  # noqa: F401 (fixtures)
from tests.model.gaussian import prior_divergence

SHORT = (
    "--steps 2 --samples 12 --sampling-steps 2 --bound-images 4"
    " --train '--channels 8,16 --attention 4 --groups 4 --batch-size 4 --warmup-steps 1'"
)


def command(model: Path, data: Path, work: Path, *more: str) -> int:  # noqa: F811
    import shlex

    given = ["--data", str(data), "--judge", str(model), "--work", str(work), *shlex.split(SHORT), *more]
    return ablation.main(given)


def test_everything_is_trained_sampled_and_judged_once(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = ("--choices", "epsilon-simple-learned", "epsilon-vlb")
    threads = torch.get_num_threads()
    assert command(model, data, tmp_path / "work", *chosen) == 0
    assert torch.get_num_threads() == threads
    rows = json.loads((tmp_path / "work" / "ablation.json").read_text())["rows"]
    assert [(row["objective"], row["learned"], row["variance"]) for row in rows] == [
        ("vlb", False, "fixed_small"),
        ("vlb", False, "fixed_large"),
        ("simple", True, "learned_range"),
    ]
    for row in rows:
        assert row["frechet"] > 0
        assert row["bits"] > 0
        assert 0 <= row["recall"] <= 1
    assert rows[0]["frechet"] != rows[1]["frechet"]
    printed = capsys.readouterr().out
    for line in ("| ε | L_vlb | fixed small |", "| ε | L_vlb | fixed large |", "| ε | L_hybrid | learned |"):
        assert line in printed
    trained = checkpoint.load(tmp_path / "work" / "epsilon-simple-learned")
    assert trained.schedule.variance_type == "learned_range"

    # Once more, and there is nothing left to do; another budget is another comparison.
    monkeypatch.setattr(train, "main", None)
    monkeypatch.setattr(ablation, "sampled", None)
    assert command(model, data, tmp_path / "work", *chosen) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == printed.splitlines()[-5:]
    monkeypatch.setattr(ablation, "CHOICES", CHOICES[::-1])  # the table's order is theirs, not the work's
    assert command(model, data, tmp_path / "work", *chosen) == 0
    assert "L_hybrid" in capsys.readouterr().out.splitlines()[-3]
    assert command(model, data, tmp_path / "work", *chosen, "--samples", "15") == 3
    assert "another budget" in capsys.readouterr().err


def test_a_stopped_training_is_resumed(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ablation, "CHOICES", CHOICES[:1])
    step = Trainer.step

    def stopped(self: Trainer) -> float:
        self.stop()
        return step(self)

    folder = tmp_path / "work" / CHOICES[0].folder
    assert steps_done(folder) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        assert command(model, data, tmp_path / "work") == 130
    assert steps_done(folder) == 1
    assert not (tmp_path / "work" / "ablation.json").exists()
    assert command(model, data, tmp_path / "work") == 0
    assert steps_done(folder) == 2


def test_unusable_input_is_reported_in_one_line(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ablation.main(["--data", str(data), "--judge", "/nowhere"]) == 3
    assert command(model, tmp_path / "nothing", tmp_path / "work") == 3
    assert "/nowhere: no such folder" in capsys.readouterr().err


def test_choices_are_options_of_the_training() -> None:
    for choice in CHOICES:
        args = train.parse(["--data", "d", "--out", "o", *choice.options])
        assert (args.prediction_type, args.objective) == (choice.prediction, choice.objective)
        assert args.learned_variance == choice.learned
    assert len({choice.folder for choice in CHOICES}) == len(CHOICES)
    assert Choice("sample", "vlb").title == ("x₀", "L_vlb")


class Knowing(torch.nn.Module):
    """Says that x₀ is grey, and a variance in the middle of its range."""

    def __init__(self, config: Any, outputs: int) -> None:
        super().__init__()
        self.config, self.outputs = config, outputs

    def forward(self, x: torch.Tensor, _t: torch.Tensor, _y: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(x), self.outputs, *x.shape[2:])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_the_sum_of_its_terms(variance: Any) -> None:
    """Of a network that always predicts 0, whose terms have a closed form."""
    config = SCHEDULER | {"prediction_type": "sample", "num_train_timesteps": 40, "variance_type": variance}
    schedule = NoiseSchedule.from_diffusers(config)
    tiny = tiny_checkpoint()
    unet: Any = Knowing(tiny.unet.config, 2)
    # As many draws as there are timesteps between, so each comes as often as any other; and the same pixels
    # in each image, so that it does not matter which image gets which.
    pixels = np.random.default_rng(0).integers(0, 256, 64).astype(np.uint8)
    pixels = np.stack([np.roll(pixels, place).reshape(1, 8, 8) for place in range(3)])
    dataset = Dataset(pixels, np.zeros(3, np.int64), ("cat", "dog", "fox"))
    known = replace(tiny, unet=unet, schedule=schedule)
    found, error = bits_per_dimension(known, dataset, variance, count=3, draws=39)
    assert error > 0

    small, large = schedule.posterior_variance("fixed_small"), schedule.betas
    middle = np.exp((np.log(np.append(small[1], small[1:])) + np.log(large)) / 2)
    variances = {"fixed_small": small, "fixed_large": large, "learned_range": middle}[variance]
    x0 = torch.from_numpy(dataset.batch(np.arange(3))).double()
    total = float(np.mean([prior_divergence(schedule, image) for image in x0]))
    for t in range(1, 40):
        times = torch.full((3,), t)
        means = [q_posterior(schedule, x0_pred, x0, times)[0] for x0_pred in (x0, 0 * x0)]
        off = (means[0] - means[1]).square().mean()
        ratio = small[t] / variances[t]
        total += float(0.5 * (ratio - 1 - math.log(ratio) + off / variances[t])) / math.log(2)
    spread = math.sqrt(middle[0] if variance == "learned_range" else small[1])
    normal = torch.distributions.Normal(0.0, spread)
    upper = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
    total += float((upper - lower).clamp(min=1e-12).log().mean()) / -math.log(2)
    assert found == pytest.approx(total, rel=1e-4)
