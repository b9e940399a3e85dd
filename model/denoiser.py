"""One batched reverse step: stack the rows, call the network once, guide, update each sample by its table.

Three layers, as for any loop: `Denoiser.step` is one step for many samples, `trajectory` a generator of
steps for samples that start together, `generate` the drain of it. The engine uses only the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import noise
from model.checkpoint import Checkpoint
from model.runtimes import Runtime
from model.samplers import A_X, C_N, Plan, T


@dataclass(frozen=True, eq=False)
class Chain:
    """What one sample is to become: everything a step needs to know besides its latent and row.

    label: class index, or None for the unconditional branch. guidance_scale: classifier-free guidance
    w with out = out_∅ + w (out_y − out_∅) (Ho & Salimans 2022, with w counted so that 1 is no guidance).
    """

    plan: Plan
    seed: int
    label: int | None = None
    guidance_scale: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of the network call that one step of this sample costs."""
        return 2 if self.label is not None and self.guidance_scale != 1.0 else 1


@dataclass(slots=True)
class Latent:
    """The state of a sample between steps: x_t and the last x₀ guess, both [C, H, W] float32."""

    x: Tensor
    x0: Tensor


class Denoiser:
    """Advances samples by one row of their plans, many in one network call.

    shape: (C, H, W) of a sample. null_class: label index of the unconditional branch. conditional: whether
    the network takes labels at all.
    """

    def __init__(
        self, runtime: Runtime, shape: tuple[int, int, int], *, conditional: bool, null_class: int | None
    ) -> None:
        self.runtime, self.shape = runtime, shape
        self.conditional, self.null_class = conditional, null_class

    @classmethod
    def of(cls, model: Checkpoint, runtime: Runtime) -> Denoiser:
        """The denoiser of a checkpoint whose network `runtime` runs."""
        config = model.unet.config
        return cls(
            runtime,
            (config.in_channels, config.sample_size, config.sample_size),
            conditional=config.num_class_embeds is not None,
            null_class=model.null_class,
        )

    def start(self, chain: Chain) -> Latent:
        """x_T of a chain: the noise of row −1 of its stream.

        Raises ValueError for a label or guidance that the network has no class or null class for.
        """
        if chain.label is not None and not self.conditional:
            raise ValueError("the network takes no class labels")
        if self.conditional and self.null_class is None and (chain.label is None or chain.rows == 2):
            raise ValueError("the network has no null class: it needs a label, and guidance_scale 1")
        x = self._noise([chain], [noise.START])[0]
        return Latent(x, torch.zeros_like(x))

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> Sequence[Latent]:
        """Advance each chain from its row: one network call of Σ chain.rows rows.

        Returns new latents, in order; the given ones are untouched, so a failed or cancelled step costs
        nothing.
        """
        x = torch.stack([latent.x for latent in latents])
        previous = torch.stack([latent.x0 for latent in latents])
        table = np.stack([chain.plan.table[row] for chain, row in zip(chains, rows, strict=True)])
        out = self._guided(x, chains, table[:, T].astype(np.int64))

        clips = np.array([[chain.plan.clip] for chain in chains])
        columns = self._columns(np.concatenate((table[:, A_X:], clips), axis=1))
        a_x, a_o, c_x, c_0, c_p, c_n, clip = columns.unbind(1)
        x0 = torch.clamp(a_x * x + a_o * out, -clip, clip)
        x = c_x * x + c_0 * x0 + c_p * previous
        noisy = [i for i in range(len(chains)) if table[i, C_N] != 0]
        if noisy:
            x[noisy] += c_n[noisy] * self._noise([chains[i] for i in noisy], [rows[i] for i in noisy])
        return [Latent(*pair) for pair in zip(x.unbind(), x0.unbind(), strict=True)]

    def _guided(self, x: Tensor, chains: Sequence[Chain], t: NDArray[np.int64]) -> Tensor:
        """The network's output for each sample, the guided ones combined from two rows of the same call."""
        guided = [i for i, chain in enumerate(chains) if chain.rows == 2]
        device = self.runtime.device
        timesteps = torch.from_numpy(t).to(device)
        y: Tensor | None = None
        if self.conditional:
            null = self.null_class if self.null_class is not None else 0
            labels = [null if chain.label is None else chain.label for chain in chains]
            y = torch.tensor(labels + [null] * len(guided), device=device)
        if not guided:
            return self.runtime.forward(x, timesteps, y)
        source = torch.tensor([*range(len(chains)), *guided], device=device)
        out = self.runtime.forward(x[source], timesteps[source], y)
        # A copy: the runtime's output may be an inference tensor, which must not be written to.
        conditional, unconditional = out[: len(chains)].clone(), out[len(chains) :]
        scale = self._columns(np.array([[chains[i].guidance_scale] for i in guided]))[:, 0]
        conditional[guided] = unconditional + scale * (conditional[guided] - unconditional)
        return conditional

    def _columns(self, values: NDArray[np.float64]) -> Tensor:
        """[B, K] float64 → [B, K, 1, 1, 1] float32 on the device."""
        return torch.from_numpy(values.astype(np.float32)).to(self.runtime.device)[..., None, None, None]

    def _noise(self, chains: Sequence[Chain], rows: Sequence[int]) -> Tensor:
        drawn = noise.normals([chain.seed for chain in chains], rows, self.shape)
        return torch.from_numpy(drawn).to(self.runtime.device)


def trajectory(denoiser: Denoiser, chains: Sequence[Chain]) -> Iterator[Sequence[Latent]]:
    """Run chains with plans of one length side by side, yielding the latents after every row."""
    latents: Sequence[Latent] = [denoiser.start(chain) for chain in chains]
    for row in range(len(chains[0].plan)):
        latents = denoiser.step(chains, latents, [row] * len(chains))
        yield latents


def generate(denoiser: Denoiser, chains: Sequence[Chain]) -> Tensor:
    """The finished samples of `trajectory`: [B, C, H, W] float32, in [-1, 1] but for rounding."""
    latents: Sequence[Latent] = []
    for latents in trajectory(denoiser, chains):  # noqa: B007 (the last one is the result)
        pass
    return torch.stack([latent.x for latent in latents])


def to_pixels(x: Tensor) -> NDArray[np.uint8]:
    """Samples as 8-bit images: [..., C, H, W] in [-1, 1], clamped → the same shape, uint8 in [0, 255]."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round()
    return np.asarray(levels.to(torch.uint8).cpu().numpy())
