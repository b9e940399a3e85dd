"""The program on a tiny model: it measures once, writes everything, and tells what does not belong."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint, likelihood, noise, typicality
from model.chain import from_pixels
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser
from model.diffusion import predict_x0, q_sample, vlb_terms
from model.evaluation import anomaly
from model.noise import NoiseStream
from model.runtimes import TorchRuntime
from model.schedule import NoiseSchedule
from model.unet import UNet, UNetConfig
from tests.model.conftest import SCHEDULER, TINY, randomise

FEW = ["--train-images", "90", "--test-images", "20", "--outliers", "12", "--few", "8"]
SHORT = ["--terms", "40", "--flow-steps", "3", "--runtime", "torch"]


def tiny_model(null_class: bool = True) -> Checkpoint:
    unet = UNet(UNetConfig(**TINY | {"num_class_embeds": 3 + null_class})).eval()
    randomise(unet)
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    return Checkpoint("tiny", unet, schedule, SCHEDULER, ("0", "1", "2"), 3 if null_class else None)


def write_idx(folder: Path, split: str, images: np.ndarray) -> None:
    labels = np.arange(len(images), dtype=np.uint8) % 3
    for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
        (folder / f"{split}-{name}").write_bytes(header + values.tobytes())


def smooth(count: int, seed: int) -> np.ndarray:
    """Ramps of a random slope and height: uint8 [count, 8, 8]."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, 8)[None, None, :] * random.uniform(10, 90, (count, 1, 1))
    return np.broadcast_to(np.clip(128 + ramp, 0, 255), (count, 8, 8)).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, its data, and other data."""
    checkpoint.save(tmp_path / "tiny", tiny_model())
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    write_idx(tmp_path / "data", "train", smooth(120, 0))
    write_idx(tmp_path / "data", "t10k", smooth(30, 1))
    write_idx(
        tmp_path / "other", "train", np.random.default_rng(2).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    )
    return tmp_path / "tiny", tmp_path / "data", tmp_path / "other"


def run(folders: tuple[Path, Path, Path], *more: str) -> int:
    model, data, other = map(str, folders)
    return anomaly.main(
        ["--model", model, "--data", data, "--against", f"static={other}", *FEW, *SHORT, *more]
    )


def test_everything_is_written_and_nothing_measured_twice(folders, monkeypatch, capsys):
    assert run(folders) == 0
    model, _, _ = folders
    report = json.loads((model / "likelihood.json").read_text())
    page = (model / "likelihood.md").read_text()
    assert page in capsys.readouterr().out
    assert report["weights_sha256"] == checkpoint.weights_sha256(model)
    assert [row["set"] for row in report["detection"]] == [
        "static", "noise", "blur", "inversion", "upside down",
    ]  # fmt: skip
    assert (
        report["test"]["images"],
        report["detection"][0]["images"],
        report["bound_and_flow"]["images"],
    ) == (
        20,
        12,
        8,
    )
    assert f"{report['test']['bits_per_dim'][0]:.3f} ±" in page
    assert "static=" in report["command"]
    with Image.open(model / "rate-distortion.png") as picture:
        assert picture.width > picture.height
    loaded = checkpoint.load(model).typicality
    assert loaded is not None
    assert loaded.images == 90
    # Noise on every pixel is told from ramps by a network that has learned nothing.
    static = report["detection"][0]["auc"]
    assert static["typicality"][0] > 0.8  # twelve images of a network that nobody trained; chance is 0.5

    monkeypatch.setattr(anomaly, "measure", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("model.evaluation.flow.log_density", lambda *_: pytest.fail("measured again"))
    assert run(folders) == 0
    assert json.loads((model / "likelihood.json").read_text()) == report


def test_other_weights_are_measured_anew(folders):
    assert run(folders) == 0
    model, _, _ = folders
    before = json.loads((model / "likelihood.json").read_text())
    other = tiny_model()
    randomise(other.unet, seed=1)
    checkpoint.save(model, other)
    assert not (model / typicality.FILE).exists()
    assert run(folders) == 0
    after = json.loads((model / "likelihood.json").read_text())
    assert after["test"]["bits_per_dim"] != before["test"]["bits_per_dim"]


def test_a_stopped_run_resumes(folders, monkeypatch, capsys):
    real = anomaly.measure
    calls: list[int] = []

    def interrupted(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["seed"])
        return real(*args, **options)

    monkeypatch.setattr(anomaly, "measure", interrupted)
    assert run(folders) == 130
    assert "the same command resumes" in capsys.readouterr().out

    def counted(*args, **options):
        calls.append(options["seed"])
        return real(*args, **options)

    monkeypatch.setattr(anomaly, "measure", counted)
    assert run(folders) == 0
    assert len(calls) == len(set(calls)) == 2 + 1 + 5 + 1  # train in two chunks, test, five others, the few


def test_measures_are_those_of_diffusion():
    model = tiny_model()
    denoiser = Denoiser.of(model, TorchRuntime(model))
    images = smooth(3, 5)[:, None]
    found = anomaly.measure(denoiser, images, 12, seed=7, batch=2, tick=int)
    for i, image in enumerate(images):
        assert found.timesteps[i].tolist() == likelihood.choose_timesteps(1000, 12, 7 + i).tolist()
        x0 = torch.from_numpy(from_pixels(image.transpose(1, 2, 0)))[None]
        for row, timestep in enumerate(found.timesteps[i].tolist()):
            place = (noise.START, NoiseStream.STEP) if row == 0 else (row - 1, NoiseStream.KNOWN_PIXELS)
            eps = torch.from_numpy(noise.normal(7 + i, place[0], (1, 8, 8), place[1]))[None]
            t = torch.tensor([timestep])
            x = q_sample(model.schedule, x0, t, eps)
            with torch.no_grad():
                guess = predict_x0(model.schedule, x, t, model.unet(x, t, torch.tensor([3]))).clamp(-1, 1)
            bits = vlb_terms(model.schedule, x0, guess, t, "fixed_small").item()
            assert found.bits[i, row] == pytest.approx(bits, rel=1e-3, abs=1e-8)
            assert found.mse[i, row] == pytest.approx((guess - x0).square().mean().item(), rel=1e-3, abs=1e-8)


def test_a_curve_is_an_average_of_all_that_was_asked():
    total, n = 30, 12
    chosen = np.stack([likelihood.choose_timesteps(total, n, seed) for seed in range(200)])
    bits = 1 / (1.0 + chosen)
    found = anomaly.Measured(total, chosen, bits, (chosen / 127.5) ** 2, np.full(200, 0.25))
    curve = anomaly.curve_of(found)
    assert curve["timestep"][-1] == 0
    assert curve["timestep"] == sorted(curve["timestep"], reverse=True)
    assert curve["rate"] == sorted(curve["rate"])
    assert curve["rate"][-1] == pytest.approx(0.25 + (1 / np.arange(2, 31)).sum(), rel=0.02)
    for t, distortion in zip(curve["timestep"], curve["rmse"], strict=True):
        assert distortion == pytest.approx(t, rel=0.1)


def test_a_mean_has_its_standard_error():
    mean, error = anomaly.mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_a_network_without_an_unconditional_branch_is_refused(folders, capsys):
    model, _, _ = folders
    checkpoint.save(model, tiny_model(null_class=False))
    assert run(folders) == 3
    assert "no unconditional branch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--against", "folder"], ["--terms", "2"], ["--outliers", "3"], ["--flow-steps", "0"]]
)
def test_impossible_options_are_refused(folders, wrong):
    with pytest.raises(SystemExit) as refused:
        run(folders, *wrong)
    assert refused.value.code == 2


def test_too_few_training_images_are_refused(folders, capsys):
    assert run(folders, "--train-images", "40") == 3
    assert "too few" in capsys.readouterr().err
