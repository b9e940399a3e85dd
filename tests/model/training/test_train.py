from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from model import checkpoint, diffusion
from model.checkpoint import CheckpointError
from model.diffusion import OBJECTIVES
from model.evaluation import plots
from model.schedule import NoiseSchedule
from model.training import train
from model.training.data import Dataset
from model.training.loop import learning_rate
from model.training.train import TrainConfig, Trainer, run
from model.unet import UNetConfig
from tests.model.conftest import SCHEDULER, randomise, tiny_checkpoint
from tests.model.training.states import states

ROOT = Path(__file__).parent.parent.parent.parent
CONFIG = TrainConfig(steps=8, batch_size=4, warmup_steps=2, learning_rate=1e-3, label_dropout=0.5)


def dataset(count: int = 10) -> Dataset:
    """Three classes: black, grey and white squares, with a little grain."""
    labels = np.arange(count, dtype=np.int64) % 3
    grain = np.random.default_rng(0).integers(0, 20, (count, 1, 8, 8))
    return Dataset(
        (grain + 110 * labels[:, None, None, None]).astype(np.uint8), labels, ("cat", "dog", "fox")
    )


def trainer(config: TrainConfig = CONFIG, **unet: Any) -> Trainer:
    return Trainer(tiny_checkpoint(**unet), dataset(), config)


@pytest.fixture(autouse=True)
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No pictures are drawn; what would have been is noted."""
    drawn: list[str] = []

    class Picture:
        def save(self, path: Path) -> None:
            drawn.append(Path(path).name)

    monkeypatch.setattr(plots, "class_sheet", lambda *_, **__: Picture())
    monkeypatch.setattr(plots, "loss_curve", lambda *_, **__: Picture())
    return drawn


@pytest.mark.parametrize(("dropout", "bf16", "snapshot_steps"), [(0.0, False, 2), (0.2, True, 0)])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    tmp_path: Path, dropout: float, bf16: bool, snapshot_steps: int
) -> None:
    config = replace(CONFIG, bf16=bf16, snapshot_steps=snapshot_steps)
    straight = trainer(config, dropout=dropout)
    losses = [straight.step() for _ in range(7)]

    first = trainer(config, dropout=dropout)
    before = [first.step() for _ in range(3)]
    first.seconds = 12.5
    first.save(tmp_path)
    torch.manual_seed(999)  # another process starts with another state of the global generator
    second = trainer(config, dropout=dropout)
    randomise(second.net, seed=5)
    assert second.resume(tmp_path)
    assert (second.step_number, second.seconds) == (3, 12.5)
    after = [second.step() for _ in range(4)]

    assert before + after == losses
    expected, resumed = states(straight), states(second)
    assert expected.keys() == resumed.keys()
    assert [name for name in expected if not torch.equal(expected[name], resumed[name])] == []


def test_steps_depend_on_the_seed() -> None:
    losses = [
        [it.step() for _ in range(3)] for it in (trainer(), trainer(), trainer(replace(CONFIG, seed=1)))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_there_may_be_nothing_to_resume(tmp_path: Path) -> None:
    assert not trainer().resume(tmp_path)


def test_a_run_stopped_before_its_first_step_resumes(tmp_path: Path) -> None:
    trainer().save(tmp_path)
    again = trainer()
    assert again.resume(tmp_path)
    assert again.step() == trainer().step()


def test_the_state_of_another_network_is_refused(tmp_path: Path) -> None:
    first = trainer()
    first.step()
    first.save(tmp_path)
    with pytest.raises(CheckpointError, match="another network"):
        trainer(layers_per_block=2).resume(tmp_path)


def test_what_is_saved_is_the_average(tmp_path: Path) -> None:
    it = trainer()
    for _ in range(3):
        it.step()
    it.save(tmp_path)
    loaded = checkpoint.load(tmp_path).unet.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in it.ema.state_dict().items())
    assert not torch.equal(loaded["conv_in.weight"], it.net.state_dict()["conv_in.weight"])


def test_the_average_by_hand() -> None:
    it = trainer(replace(CONFIG, ema_decay=0.15))
    weight = it.ema.get_parameter("conv_in.weight")
    expected = weight.detach().clone()
    for decay in (1 / 10, 0.15, 0.15):  # the first decays are shorter: (1 + step) / (10 + step)
        it.step()
        expected = decay * expected + (1 - decay) * it.net.conv_in.weight.detach()
        torch.testing.assert_close(weight.detach(), expected)


def test_labels_are_dropped_at_the_asked_rate() -> None:
    def dropped(rate: float) -> float:
        it = trainer(replace(CONFIG, label_dropout=rate))
        index = np.arange(6000) % 10
        labels = it._labels(index, torch.Generator().manual_seed(0))
        assert labels is not None
        kept = labels != 3
        assert (labels[kept].numpy() == it.dataset.labels[index][kept.numpy()]).all()
        return 1 - float(kept.float().mean())

    assert dropped(0.0) == 0
    assert dropped(0.1) == pytest.approx(0.1, abs=0.015)
    assert dropped(1.0) == 1


def test_the_learning_rate_is_used_and_gradients_are_clipped() -> None:
    it = trainer(replace(CONFIG, clip_norm=1e-3))
    norms: list[float] = []
    it.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(
            float(torch.stack([p.grad.norm() for p in it.net.parameters() if p.grad is not None]).norm())
        )
    )
    it.step()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert it.optimizer.param_groups[0]["lr"] == learning_rate(it.config, 0)


def test_the_loss_falls() -> None:
    it = trainer(replace(CONFIG, steps=60, learning_rate=1e-2, warmup_steps=5, batch_size=8))
    before = it.validate(dataset(30))
    for _ in range(60):
        it.step()
    after = it.validate(dataset(30))
    assert after < 0.5 * before
    assert it.validate(dataset(30)) == after, "the same images, timesteps and noise each time"


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "posterior_mean"])
def test_other_parametrisations_train(kind: Any) -> None:
    it = trainer(replace(CONFIG, steps=40, learning_rate=5e-3, batch_size=8))
    it.model = replace(it.model, schedule=replace(it.model.schedule, prediction_type=kind))
    before = it.validate(dataset(30))
    for _ in range(40):
        it.step()
    assert it.validate(dataset(30)) < 0.8 * before


def learning_its_variance(config: TrainConfig) -> Trainer:
    """A trainer of a network with outputs for its variance."""
    it = trainer(config, out_channels=2)
    scheduler = SCHEDULER | {"variance_type": "learned_range"}
    schedule = NoiseSchedule.from_diffusers(scheduler)
    it.model = replace(it.model, schedule=schedule, scheduler_config=scheduler)
    return it


@torch.no_grad()
def bound(it: Trainer) -> float:
    """L_vlb/T of the averaged weights on fixed images, noise and timesteps, but for the decoder's term."""
    x0 = torch.from_numpy(dataset(30).batch(np.arange(30)))
    rng = torch.Generator().manual_seed(0)
    t, eps = torch.arange(1, 31) * 30, torch.randn(x0.shape, generator=rng)
    x, y = diffusion.q_sample(it.model.schedule, x0, t, eps), torch.from_numpy(dataset(30).labels)
    return float(diffusion.objective(it.model.schedule, "vlb", x0, x, t, eps, it.ema(x, t, y)).mean())


@pytest.mark.parametrize("objective", ["simple", "vlb"])
def test_the_bound_falls_and_a_learned_variance_comes_back(tmp_path: Path, objective: Any) -> None:
    config = replace(
        CONFIG, steps=80, learning_rate=1e-2, warmup_steps=5, batch_size=8, objective=objective, ema_decay=0.9
    )
    it = learning_its_variance(config)
    before, simple_before = bound(it), it.validate(dataset(30))
    variance = it.ema.get_parameter("conv_out.weight")[1].detach().clone()
    for _ in range(80):
        it.step()
    assert bound(it) < 0.7 * before
    assert it.validate(dataset(30)) < 0.8 * simple_before, "which looks at the mean alone"
    assert not torch.equal(it.ema.get_parameter("conv_out.weight")[1], variance)
    it.save(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.schedule.variance_type == "learned_range"
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 950]), torch.tensor([1, 3])
    assert torch.equal(loaded.unet(x, t, y), it.ema(x, t, y))


def test_objectives_lead_to_different_weights() -> None:
    ends = []
    for kind in OBJECTIVES:
        it = trainer(replace(CONFIG, objective=kind))
        it.step()
        it.step()
        ends.append(it.net.conv_out.weight.detach())
    for first, second in combinations(ends, 2):
        assert not torch.allclose(first, second, rtol=1e-3)


def test_the_time_budget_ends_a_run_and_saves(tmp_path: Path, sheets: list[str]) -> None:
    it = trainer(replace(CONFIG, steps=1_000_000, budget_s=0.3))
    assert all(record["step"] % 50 == 0 for record in run(it, tmp_path, None))
    assert 0 < it.step_number < 1_000_000
    assert it.seconds >= 0.3
    assert trainer().resume(tmp_path)
    assert sheets == [f"sheet-{it.step_number:06d}.png"]


def test_an_interrupt_saves(tmp_path: Path) -> None:
    it = trainer()
    for _ in range(2):
        it.step()
    step = it.step

    def interrupted() -> float:
        if it.step_number == 5:
            raise KeyboardInterrupt
        return step()

    it.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        list(run(it, tmp_path, None))
    again = trainer()
    assert again.resume(tmp_path)
    assert again.step_number == 5
    checkpoint.load(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    it = trainer()
    for _ in range(3):
        it.step()
    good = states(it)
    it.dataset = replace(it.dataset, images=np.full((10, 1, 8, 8), np.nan, np.float32))
    with pytest.raises(RuntimeError, match="the loss is nan at step 3"):
        list(run(it, tmp_path, None))
    again = trainer()
    again.resume(tmp_path)
    assert again.step_number == 3
    saved = states(again)
    assert all(torch.equal(value, saved[name]) for name, value in good.items())


def write_idx(folder: Path, split: str) -> None:
    small = dataset(12)
    images = np.asarray(small.images[np.arange(12)])[:, 0]
    for name, array in (("images-idx3", images), ("labels-idx1", small.labels.astype(np.uint8))):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A command line for a tiny network on a tiny set of IDX files, into tmp_path/out."""
    (tmp_path / "data").mkdir()
    write_idx(tmp_path / "data", "train")
    shape = "--size 8 --channels 8,16 --attention 4 --groups 4 --batch-size 4 --warmup-steps 2"
    return ["--data", f"{tmp_path / 'data'}", "--out", f"{tmp_path / 'out'}", *shape.split()]


def test_the_command_writes_a_folder_that_loads(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], sheets: list[str]
) -> None:
    assert train.main([*command, "--steps", "50"]) == 0
    assert "no file t10k-images-idx3-ubyte*: there will be no held-out loss" in capsys.readouterr().out

    model = checkpoint.load(tmp_path / "out")
    assert (model.name, model.class_names, model.null_class) == ("out", ("0", "1", "2"), 3)
    assert model.unet.config.num_class_embeds == 4
    assert cast("UNetConfig", model.unet.config).down_block_types == ("DownBlock2D", "AttnDownBlock2D")
    assert cast("UNetConfig", model.unet.config).up_block_types == ("AttnUpBlock2D", "UpBlock2D")
    log = (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()
    record = json.loads(log[0])
    assert (len(log), record["step"], record["images"]) == (1, 50, 200)
    assert 0 < record["loss"] < 10
    assert sheets == ["sheet-000050.png"]


def test_the_command_resumes_and_reports_a_held_out_loss(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path / "data", "t10k")
    monkeypatch.setattr(Trainer, "validate", lambda self, held_out: len(held_out))

    def step(self: Trainer) -> float:
        self.step_number += 1
        return 1.0

    monkeypatch.setattr(Trainer, "step", step)
    # A record of a step that was lost, since the state was saved before it.
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "log.jsonl").write_text('{"step": 50, "loss": 9, "images": 1}\n')
    assert train.main([*command, "--steps", "120"]) == 0
    assert train.main([*command, "--steps", "500"]) == 0
    assert "resumed at step 120" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "out/training/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(50, 501, 50))
    assert {record["loss"] for record in records} == {1.0}
    assert [record.get("held_out_loss") for record in records] == [None] * 9 + [12]


SIGNALLED = """
import os, signal, sys
import torch
from model.training import train

torch.set_num_threads(1)
lerp, handler, calls = torch._foreach_lerp_, signal.getsignal(signal.SIGTERM), []

def signalled(*args):  # in the middle of a step: the network is already updated, its average not yet
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    lerp(*args)

torch._foreach_lerp_ = signalled
code = train.main(sys.argv[1:])
assert signal.getsignal(signal.SIGTERM) is handler
sys.exit(code)
"""


def test_a_signal_ends_the_command_between_two_steps(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: what other tests have loaded here may have its own way with signals."""
    program = [sys.executable, "-c", SIGNALLED, *command, "--steps", "1000"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "stopped and saved at step 3" in done.stdout

    first = checkpoint.load(tmp_path / "out").unet.state_dict()
    straight = [*command[:3], f"{tmp_path / 'straight'}", *command[4:]]
    stop_at = Trainer.step

    def three(self: Trainer) -> float:
        loss = stop_at(self)
        self.stopping = self.step_number == 3
        return loss

    monkeypatch.setattr(Trainer, "step", three)
    assert train.main([*straight, "--steps", "1000"]) == 0
    second = checkpoint.load(tmp_path / "straight").unet.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_command_starts_from_another_models_weights(command: list[str], tmp_path: Path) -> None:
    it = trainer()
    checkpoint.save(tmp_path / "init", it.model)
    weights = it.model.unet.get_parameter("conv_in.weight").detach().clone()
    options = ["--init", f"{tmp_path / 'init'}", "--steps", "1", "--learning-rate", "0"]
    assert train.main([*command, *options]) == 0
    torch.testing.assert_close(
        checkpoint.load(tmp_path / "out").unet.get_parameter("conv_in.weight").detach(), weights
    )


def test_the_command_trains_on_pictures_that_are_not_square(command: list[str], tmp_path: Path) -> None:
    assert train.main([*command, "--size", "8x16", "--attention", "8", "--steps", "1"]) == 0
    config = cast("UNetConfig", checkpoint.load(tmp_path / "out").unet.config)
    assert config.shape == (1, 8, 16)
    assert config.down_block_types == ("DownBlock2D", "AttnDownBlock2D"), "at the level of 4×8"
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] == [8, 16]


def test_the_command_trains_a_network_that_learns_its_variance(command: list[str], tmp_path: Path) -> None:
    options = ["--learned-variance", "--prediction-type", "v_prediction", "--objective", "vlb"]
    assert train.main([*command, *options, "--steps", "2"]) == 0
    model = checkpoint.load(tmp_path / "out")
    assert model.unet.config.out_channels == 2
    assert (model.schedule.variance_type, model.schedule.prediction_type) == ("learned_range", "v_prediction")
    written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert DDPMScheduler.from_config(written).config.variance_type == "learned_range"
    with pytest.raises(SystemExit, match="2"):
        train.main([*command, "--objective", "kl"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data", "/nowhere"], "/nowhere: no such folder"),
        (["--size", "4"], "do not fit into 4×4"),
        (["--image-channels", "3"], "one channel"),
        (["--groups", "3"], "norm_num_groups=3"),
        (["--init", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_unusable_data_or_options_are_one_line_and_exit_code_3(
    command: list[str], options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*command, *options]) == 3
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_the_command_refuses_to_resume_another_network(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*command, "--steps", "1"]) == 0
    assert train.main([*command, "--steps", "2", "--layers", "2"]) == 3
    assert "another network" in capsys.readouterr().err


def test_without_label_dropout_there_is_no_null_class(command: list[str], tmp_path: Path) -> None:
    assert train.main([*command, "--steps", "1", "--label-dropout", "0"]) == 0
    model = checkpoint.load(tmp_path / "out")
    assert (model.null_class, model.unet.config.num_class_embeds) == (None, 3)
