from __future__ import annotations

import json
import math
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint import CheckpointError
from model.training.loop import ResumableTrainer, attended, batch_indices, learning_rate, train
from model.training.train import TrainConfig


@dataclass(frozen=True)
class LineConfig:
    """The least that a trainer needs."""

    steps: int = 8
    learning_rate: float = 0.1
    warmup_steps: int = 2
    seed: int = 0
    checkpoint_s: float = 1000.0


class LineTrainer(ResumableTrainer[LineConfig]):
    """Fits a line to points that are drawn from the step's seed, and notes what it exports."""

    state_file = "line.safetensors"
    trains = "line"

    def __init__(self, config: LineConfig, width: int = 1) -> None:
        torch.manual_seed(0)
        net = torch.nn.Linear(width, 1)
        super().__init__(net, torch.optim.AdamW(net.parameters()), config)
        self.exported: list[int] = []

    def step(self) -> float:
        x = torch.rand(4, 1, generator=torch.Generator().manual_seed(self.step_seed()))
        self.set_learning_rate()
        loss = (self.net(x) - 3 * x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step_number += 1
        return float(loss.detach())

    def export(self, folder: Path) -> None:
        self.exported.append(self.step_number)


CONFIG = LineConfig()


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    losses = list(train(LineTrainer(CONFIG), tmp_path / "straight"))
    first = LineTrainer(CONFIG)
    before = []
    for loss in train(first, tmp_path / "stopped"):
        before.append(loss)
        if first.step_number == 3:
            first.stop()
    second = LineTrainer(CONFIG)
    assert second.resume(tmp_path / "stopped")
    assert (second.step_number, second.seconds) == (3, first.seconds)
    assert before + list(train(second, tmp_path / "stopped")) == losses
    assert len(losses) == CONFIG.steps


def test_a_state_without_seconds_is_resumed(tmp_path: Path) -> None:
    """The noise classifier's states of version 0.1 have none."""
    it = LineTrainer(CONFIG)
    it.step()
    it.save(tmp_path)
    path = tmp_path / "training" / "line.safetensors"
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        assert json.loads(file.metadata()["config"]) == asdict(CONFIG)
    save_file(state, path, {"step": "1", "config": "{}"})
    again = LineTrainer(CONFIG)
    assert again.resume(tmp_path)
    assert (again.step_number, again.seconds) == (1, 0.0)
    assert again.step() == it.step()


def test_the_names_of_a_saved_state(tmp_path: Path) -> None:
    """States of earlier versions are resumed by these names."""
    it = LineTrainer(CONFIG)
    it.step()
    it.save(tmp_path)
    with safe_open(tmp_path / "training" / "line.safetensors", "pt") as file:
        names, meta = set(file.keys()), file.metadata()
    parameters = ("weight", "bias")
    kept = {f"optimizer.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters}
    assert names == {f"net.{name}" for name in parameters} | kept
    assert set(meta) == {"step", "seconds", "config"}


def test_the_state_of_something_else_is_refused(tmp_path: Path) -> None:
    LineTrainer(CONFIG).save(tmp_path)
    with pytest.raises(CheckpointError, match="the state of another line"):
        LineTrainer(CONFIG, width=2).resume(tmp_path)


def test_it_saves_as_often_as_asked_and_at_the_end(tmp_path: Path) -> None:
    often = LineTrainer(replace(CONFIG, checkpoint_s=0.0))
    list(train(often, tmp_path))
    assert often.exported == [*range(1, 9), 8]
    seldom = LineTrainer(CONFIG)
    list(train(seldom, tmp_path))
    assert seldom.exported == [8]


def test_a_spent_budget_ends_it_and_saves(tmp_path: Path) -> None:
    it = LineTrainer(CONFIG)
    assert list(train(it, tmp_path, budget_s=0.0)) == []
    assert it.exported == [0]


def test_an_error_in_a_step_saves_the_last_good_state(tmp_path: Path) -> None:
    it = LineTrainer(CONFIG)
    steps = train(it, tmp_path)
    next(steps)
    it.step = lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert it.exported == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_after_the_current_step(tmp_path: Path, number: int) -> None:
    it = LineTrainer(CONFIG)
    handler = signal.getsignal(number)
    with attended(it, disable=True):
        for _ in train(it, tmp_path):
            if it.step_number == 3:
                # As the system does; the command's own test sends a real one, to a process of its own.
                cast("Any", signal.getsignal(number))(number, None)
    assert (it.step_number, it.stopping) == (3, True)
    assert signal.getsignal(number) is handler


def test_every_epoch_sees_every_image_once() -> None:
    seen = np.concatenate([batch_indices(7, step, batch=4, length=10) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert batch_indices(7, 2, 4, 10).tolist() == seen[8:12].tolist()
    assert batch_indices(8, 2, 4, 10).tolist() != seen[8:12].tolist()
    # A batch may be larger than the whole set.
    assert sorted(batch_indices(7, 0, batch=25, length=10)[:20]) == sorted([*range(10)] * 2)


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=1000, warmup_steps=100, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02, rel=1e-3)
    assert max(rates) == rates[99] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi * 0.099)))
    assert rates[500] == pytest.approx(1.0)
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert rates[:100] == sorted(rates[:100])
    assert rates[99:] == sorted(rates[99:], reverse=True)
    assert learning_rate(replace(config, warmup_steps=0), 0) == 2.0
