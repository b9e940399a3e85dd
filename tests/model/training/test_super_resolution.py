"""Training and evaluation of a network that is given a small picture beside x."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from model import checkpoint
from model.evaluation import super_resolution
from model.evaluation.super_resolution import psnr
from model.training import train
from model.training.data import Dataset, low_resolution, scaled
from model.training.loop import batch_indices


def squares(count: int = 12) -> np.ndarray:
    """Bright squares of a few places and sizes on black: [N, 1, 8, 8]."""
    images = np.zeros((count, 1, 8, 8), np.uint8)
    for i in range(count):
        images[i, 0, i % 4 : i % 4 + 3 + i % 2, i % 3 : i % 3 + 4] = 150 + 8 * i
    return images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """IDX files of both splits."""
    images = squares()
    for split in ("train", "t10k"):
        head = struct.pack(">4B3I", 0, 0, 8, 3, *images[:, 0].shape)
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = struct.pack(">4BI", 0, 0, 8, 1, len(images)) + bytes(len(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_low_resolution_is_what_an_upload_of_that_size_becomes() -> None:
    image = squares()[5, 0]
    small = Image.fromarray(image).resize((4, 4), Image.Resampling.LANCZOS)
    upload = np.asarray(small.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(low_resolution(image[None, None], 4)[0, 0], upload)
    wide = np.zeros((1, 3, 8, 16), np.uint8)
    assert low_resolution(wide, 4).shape == wide.shape


def test_the_network_is_trained_with_the_small_picture_beside(folder: Path, tmp_path: Path) -> None:
    """And the folder that is written says so, resumes, and can be evaluated."""
    out = tmp_path / "model"
    options = ["--data", str(folder), "--out", str(out), "--size", "8", "--low-resolution", "4"]
    options += ["--channels", "8,8", "--groups", "4", "--attention", "0", "--batch-size", "4"]
    for steps in ("2", "3"):
        assert train.main([*options, "--steps", steps]) == 0
    model = checkpoint.load(out)
    assert (model.condition, model.shape, model.class_names) == (("image",), (1, 8, 8), ())
    assert model.unet.config.in_channels == 2
    assert sorted(path.name for path in (out / "training").glob("sheet-*"))
    sheet = tmp_path / "sheet.png"
    wanted = ["--data", str(folder), "--model", str(out), "--low-resolution", "4", "--sheet", str(sheet)]
    assert super_resolution.main([*wanted, "--images", "8", "--steps", "2"]) == 0
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 8


def test_the_loss_sees_the_condition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--out unused --size 8 --low-resolution 4 --channels 8,8 --groups 4 --attention 0"
    args = train.parse(["--data", str(folder), *options.split()])
    dataset = Dataset(squares(), np.zeros(12, np.int64), ())
    config = train.TrainConfig(batch_size=4, low_resolution=4)
    it = train.Trainer(train.new_model("sr", dataset, args), dataset, config)
    seen: list[torch.Tensor] = []
    forward = it.forward

    def noting(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.clone())
        out: torch.Tensor = forward(x, t, y)
        return out

    monkeypatch.setattr(it, "forward", noting)
    it.step()
    (x,) = seen
    index = batch_indices(config.seed, 0, 4, len(dataset))
    np.testing.assert_array_equal(x[:, 1:], scaled(low_resolution(squares()[index], 4)))
    assert it.validate(dataset) > 0


def test_the_signal_to_noise_ratio() -> None:
    real = np.full((2, 1, 4, 4), 100, np.uint8)
    assert psnr(real + 10, real) == pytest.approx(10 * np.log10(255**2 / 100))
    assert psnr(real, real) > 70


def test_the_signal_to_noise_ratio_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (5, 3, 8, 6), np.uint8)
    noise = rng.normal(0, np.arange(1, 6)[:, None, None, None] * 10, real.shape)
    images = np.clip(real + noise, 0, 255).astype(np.uint8)
    theirs = peak_signal_noise_ratio(
        torch.from_numpy(images).double(), torch.from_numpy(real).double(), data_range=255.0, dim=(1, 2, 3)
    )
    assert psnr(images, real) == pytest.approx(theirs.item())


def test_low_resolution_goes_with_a_network_that_takes_a_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it a network that does would be given pictures of a single pixel."""
    shape = ["--data", str(folder), "--size", "8", "--channels", "8,8", "--groups", "4", "--attention", "0"]
    start = ["--steps", "1", "--batch-size", "4", "--out"]
    assert train.main([*shape, "--low-resolution", "4", *start, str(tmp_path / "sr")]) == 0
    assert train.main([*shape, "--init", str(tmp_path / "sr"), *start, str(tmp_path / "other")]) == 3
    assert "takes image beside x" in capsys.readouterr().err
