from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from model.encoder import EncoderConfig, NoiseClassifier
from model.schedule import NoiseSchedule, linear_betas
from model.training import noise_classifier
from model.training.loop import learning_rate, train
from model.training.noise_classifier import ClassifierTrainer, ClassifierTrainingConfig, accuracy
from tests.model.conftest import tiny_classifier
from tests.model.evaluation.test_evaluate import data, model, tiny_model  # noqa: F401 (two are fixtures)
from tests.model.evaluation.test_judge import stripes

SCHEDULE = NoiseSchedule(linear_betas(1000))
CONFIG = ClassifierTrainingConfig(steps=8, batch_size=6, warmup_steps=2)
SMALL = ["--channels", "8,16", "--groups", "4", "--batch-size", "12", "--warmup-steps", "2"]


def trainer(config: ClassifierTrainingConfig = CONFIG, **shape: Any) -> ClassifierTrainer:
    torch.manual_seed(0)
    options: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4} | shape
    return ClassifierTrainer(
        NoiseClassifier(EncoderConfig((16, 16), 1, 3, **options)), SCHEDULE, stripes(60), config
    )


def states(it: ClassifierTrainer) -> dict[str, torch.Tensor]:
    tensors = {f"net.{name}": value for name, value in it.net.state_dict().items()}
    for name, parameter in it.net.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in it.optimizer.state[parameter].items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that takes a classifier of 8×8 pixels and three classes; nothing here loads it."""
    checkpoint.save(tmp_path / "tiny", tiny_model())
    return tmp_path / "tiny"


def test_it_learns_what_the_noise_leaves_to_be_learnt() -> None:
    it = trainer(replace(CONFIG, steps=120, batch_size=30, learning_rate=1e-2))
    losses = [it.step() for _ in range(120)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:20])
    test_set = stripes(300, seed=1)
    clear, hidden = accuracy(it.net.eval(), SCHEDULE, test_set, [0, 999])
    assert clear > 0.95
    assert hidden == pytest.approx(1 / 3, abs=0.1)
    # What it learnt is also where its gradient leads: up to its class.
    x = torch.from_numpy(test_set.batch(np.arange(20)))
    t, y = torch.full((20,), 300), torch.from_numpy((test_set.labels[:20] + 1) % 3)
    moved = x + 0.3 * it.net.gradient(x, t, y).sign()
    before, after = (it.net(values, t).log_softmax(1)[torch.arange(20), y].mean() for values in (x, moved))
    assert after > before + 1


def test_accuracy_is_a_share_under_fixed_noise() -> None:
    net, dataset = trainer().net.eval(), stripes(120)
    shares = accuracy(net, SCHEDULE, dataset, [0, 300])
    assert shares == accuracy(net, SCHEDULE, dataset, [0, 300])
    assert all(0 <= share <= 1 for share in shares)
    # A classifier that always says "left" is right on a third.
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    assert accuracy(net, SCHEDULE, dataset, [0, 999]) == [pytest.approx(1 / 3)] * 2


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(folder: Path) -> None:
    straight = trainer()
    losses = [straight.step() for _ in range(7)]
    first = trainer()
    before = [first.step() for _ in range(3)]
    first.save(folder)
    second = trainer(replace(CONFIG, seed=0))
    with torch.no_grad():
        for parameter in second.net.parameters():
            parameter.zero_()
    assert second.resume(folder)
    assert second.step_number == 3
    assert before + [second.step() for _ in range(4)] == losses
    expected, resumed = states(straight), states(second)
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_the_learning_rate_rises_and_falls() -> None:
    config = ClassifierTrainingConfig(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    it = trainer(config)
    it.step()
    assert it.optimizer.param_groups[0]["lr"] == rates[0]


def test_it_saves_as_often_as_asked_and_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(ClassifierTrainer, "save", lambda self, _: saved.append(self.step_number))
    assert len(list(train(trainer(replace(CONFIG, checkpoint_s=0.0)), folder))) == 8
    assert saved == [*range(1, 9), 8]
    saved.clear()
    list(train(trainer(), folder))
    assert saved == [8]


def test_there_may_be_nothing_to_resume_or_something_else(folder: Path) -> None:
    assert not trainer().resume(folder)
    it = trainer()
    it.step()
    it.save(folder)
    with pytest.raises(CheckpointError, match="another classifier"):
        trainer(block_out_channels=(8, 16)).resume(folder)


def test_the_command_trains_reports_and_leaves_a_folder_that_loads(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["--model", str(model), "--data", str(data), *SMALL]
    assert noise_classifier.main([*command, "--steps", "60"]) == 0
    printed = capsys.readouterr().out
    assert "Right on 45 test images" in printed
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", printed, re.MULTILINE)
    assert [int(t) for t, *_ in rows] == [*range(0, 1000, 100), 999]
    assert float(rows[0][2]) > 0.7
    loaded = checkpoint.load(model)
    assert loaded.classifier is not None
    assert loaded.classifier.config.block_out_channels == (8, 16)
    assert "classifier/model.safetensors" in (model / checkpoint.MANIFEST).read_text()

    # Once more there is nothing to do but the report, which is the same.
    assert noise_classifier.main([*command, "--steps", "60"]) == 0
    again = capsys.readouterr().out
    assert "resumed at step 60" in again
    assert again.splitlines()[-11:] == printed.splitlines()[-11:]


def test_a_signal_ends_the_command_between_two_steps(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = ClassifierTrainer.step

    def signalled(self: ClassifierTrainer) -> float:
        if self.step_number == 2:
            cast("Any", signal.getsignal(signal.SIGTERM))(signal.SIGTERM, None)
        return step(self)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ClassifierTrainer, "step", signalled)
    assert noise_classifier.main(["--model", str(model), "--data", str(data), *SMALL]) == 0
    assert "stopped and saved at step 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler
    assert checkpoint.load(model).classifier is not None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "/nowhere"], "/nowhere: no such folder"),
        (["--data", "/nowhere"], "no folder train/"),
        (["--channels", "8"], "at least one level"),
        (["--groups", "3"], "norm_num_groups=3"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    options: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert noise_classifier.main(["--model", str(model), "--data", str(data), *SMALL, *options]) == 3
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_a_model_of_other_classes_is_refused(
    tmp_path: Path,
    data: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint.save(tmp_path / "five", tiny_model(classes=5))
    assert noise_classifier.main(["--model", str(tmp_path / "five"), "--data", str(data), *SMALL]) == 3
    assert "3 classes, but the model has 5" in capsys.readouterr().err


def test_what_was_trained_before_is_replaced_whole(folder: Path) -> None:
    checkpoint.save_classifier(folder, tiny_classifier(seed=1))
    other = tiny_classifier(seed=2)
    checkpoint.save_classifier(folder, other)
    loaded = checkpoint.load(folder).classifier
    assert loaded is not None
    assert torch.equal(loaded.head.weight, other.head.weight)
    assert not list(folder.glob("classifier.part*"))
