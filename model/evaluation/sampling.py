"""Samples of a checkpoint, for the commands of this package: its denoiser, and images by the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, to_pixels, trajectory
from model.runtimes import DtypeName, RuntimeName, load_runtime
from model.samplers import Plan
from model.training.data import Pixels


def denoiser_of(
    model: Checkpoint, runtime: RuntimeName = "auto", device: str = "auto", dtype: DtypeName = "float32"
) -> Denoiser:
    """A denoiser for the current weights: it copies them, and does not follow later changes."""
    return Denoiser.of(model, load_runtime(model, runtime, device, dtype, batch_invariant=False))


def sample(
    denoiser: Denoiser,
    plan: Plan,
    labels: Sequence[int | None],
    *,
    seed: int,
    batch: int,
    tick: Callable[[int], object],
) -> Pixels:
    """Generate an image for each label, the i-th with seed + i, `batch` side by side.

    tick: called with the network rows of each step. Returns uint8 [N, C, H, W]. Raises FloatingPointError
    when an image is not finite.
    """
    chains = [Chain(plan, seed + i, label) for i, label in enumerate(labels)]
    images = []
    for start in range(0, len(chains), batch):
        part = chains[start : start + batch]
        x = torch.empty(0)
        for row, latents in enumerate(trajectory(denoiser, part)):
            x = torch.stack([latent.x for latent in latents])
            tick(len(part) * plan.evaluations[row])
        if not x.isfinite().all():
            raise FloatingPointError(f"samples {start} to {start + len(part) - 1} are not finite")
        images.append(to_pixels(x, denoiser.data_range))
    return np.concatenate(images)
