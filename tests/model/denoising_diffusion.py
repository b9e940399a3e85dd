"""denoising-diffusion-pytorch for tests: its networks with random weights, and files as it saves them.

The package imports torchvision, of which its networks use nothing. PyPI's torchvision is built for PyPI's
torch for CUDA; beside a torch for the CPU it cannot be imported, and a stand-in is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import noise
from tests.model.conftest import randomise

STAND_INS = str(Path(__file__).parent.parent / "stand_ins")
ENVIRONMENT: dict[str, str] = {}
"""What another process needs to import it."""
try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    sys.path.insert(0, STAND_INS)
    ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([STAND_INS, os.environ.get("PYTHONPATH", "")])

from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion, Unet  # noqa: E402
from denoising_diffusion_pytorch import classifier_free_guidance as conditional  # noqa: E402
from ema_pytorch import EMA  # noqa: E402

if ENVIRONMENT:  # others look for the real one, and would use what the stand-in lacks
    sys.path.remove(STAND_INS)
    for name in [each for each in sys.modules if each.partition(".")[0] == "torchvision"]:
        del sys.modules[name]

__all__ = ["ENVIRONMENT", "LearnedGaussianDiffusion", "conditional"]

TINY: dict[str, Any] = {"dim": 8, "dim_mults": (1, 2)}


def network(seed: int = 0, **options: Any) -> nn.Module:
    """A small `Unet`, or with `num_classes` that of the package's module for guidance; weights are random."""
    kind = conditional.Unet if "num_classes" in options else Unet
    unet: nn.Module = kind(**(TINY | options)).eval()
    randomise(unet, seed)
    return unet


def diffusion(unet: nn.Module, **options: Any) -> Any:
    """The package's `GaussianDiffusion` of a network, for images of 16×16."""
    kind = conditional.GaussianDiffusion if isinstance(unet, conditional.Unet) else GaussianDiffusion
    return kind(unet, **({"image_size": 16, "timesteps": 40} | options)).eval()


def save_training(path: Path, averaged: Any, latest: Any) -> None:
    """A file as `Trainer.save` writes it, of the latest weights and their moving averages."""
    ema = EMA(latest, ema_model=averaged)
    content = {
        "step": 1000,
        "model": latest.state_dict(),
        "opt": torch.optim.Adam(latest.parameters()).state_dict(),
        "ema": ema.state_dict(),
        "scaler": None,
        "version": "2.3.4",
    }
    torch.save(content, path)


def draw_as_here(monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> None:
    """Let the package draw what a chain of this seed draws here: its start, then the noise of each step."""

    def ours() -> Iterator[Tensor]:
        for step in (noise.START, *range(steps)):
            yield torch.from_numpy(noise.normals([seed], [step], (3, 16, 16)))

    waiting = ours()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(waiting))
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(waiting))
