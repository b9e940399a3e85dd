"""A network small enough to build, run and train in a blink."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.encoder import EncoderConfig, NoiseClassifier
from model.runtimes import OpenVinoRuntime
from model.schedule import NoiseSchedule
from model.unet import UNet, UNetConfig

torch.set_num_threads(1)  # the networks here are too small to share out

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": None,
    "norm_num_groups": 4,
    "num_class_embeds": 4,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "timestep_spacing": "trailing",
}


def randomise(net: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter its own value, norms and biases too, so that none can hide as 0 or 1."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=rng))


@pytest.fixture
def tiny() -> Checkpoint:
    """A class-conditional network for three classes and the null class, with random weights."""
    return tiny_checkpoint()


@pytest.fixture
def folder(tiny: Checkpoint, tmp_path: Path) -> Path:
    """A folder as `save` writes it."""
    checkpoint.save(tmp_path / "tiny", tiny)
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def openvino() -> OpenVinoRuntime:
    """The same network, compiled once for all tests."""
    return OpenVinoRuntime(tiny_checkpoint(), threads=1)


def tiny_checkpoint(**options: Any) -> Checkpoint:
    """What `tiny` is, with other options of the network where given."""
    unet = UNet(UNetConfig(**(TINY | options))).eval()
    randomise(unet)
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    return Checkpoint("tiny", unet, schedule, SCHEDULER, ("cat", "dog", "fox"), null_class=3)


def tiny_unet(**options: Any) -> UNet:
    """The network of `tiny_checkpoint`."""
    return cast("UNet", tiny_checkpoint(**options).unet)


def tiny_classifier(classes: int = 3, seed: int = 1) -> NoiseClassifier:
    """A noise-aware classifier of as small images, with random weights."""
    classifier = NoiseClassifier(EncoderConfig((8, 8), 1, classes, (8, 16, 16), norm_num_groups=4)).eval()
    randomise(classifier, seed)
    return classifier.requires_grad_(False)
