"""One batched reverse step: stack the rows, call the network once, guide, update each sample by its table.

Three layers, as for any loop: `Denoiser.step` is one step for many samples, `trajectory` a generator of
steps for samples that start together, `generate` the drain of it. The engine uses only the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import noise
from model.checkpoint import Checkpoint
from model.diffusion import vlb_terms
from model.runtimes import Runtime
from model.samplers import A_G, A_O, A_X, C_0, C_N, C_P, C_V, C_X, K_0, K_N, Plan, T, W
from model.schedule import NoiseSchedule

Image = NDArray[np.float32]
"""[C, H, W] in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Mix:
    """Where a chain begins: a weighted sum of images and of starting noises, by their seeds."""

    images: tuple[tuple[float, Image], ...] = ()
    noises: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Known:
    """Pixels that are given: `image` where `mask`, [1 or C, H, W] bool, is true."""

    image: Image
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Chain:
    """What one sample is to become: everything a step needs to know besides its latent and row.

    label: class index, or None for the unconditional branch. start: None for the noise of its own seed.
    """

    plan: Plan
    seed: int
    label: int | None = None
    start: Mix | None = None
    known: Known | None = None


def noised(plan: Plan, image: Image, seed: int) -> Mix:
    """Where an edit begins: the image with as much noise as the plan's start asks for (Ho et al., eq. 4)."""
    return Mix(((plan.start, image),), ((math.sqrt(1 - plan.start**2), seed),))


@dataclass(slots=True)
class Latent:
    """The state of a sample between steps: x_t and the last x₀ guess, both [C, H, W] float32."""

    x: Tensor
    x0: Tensor


class ClassGradient(Protocol):
    """A noise-aware classifier, as guidance needs it."""

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """∇ₓ log p(y | x_t): x [B, C, H, W], t and y [B] int64. Returns as x."""


class Denoiser:
    """Advances samples by one row of their plans, many in one network call.

    shape: (C, H, W) of a sample. null_class: label index of the unconditional branch. conditional: whether
    the network takes labels at all. classifier: for plans with classifier guidance. A network with 2C outputs
    says in the second C how large its variance is (Nichol & Dhariwal 2021). schedule: for probes, whose
    guesses it measures.
    """

    def __init__(
        self,
        runtime: Runtime,
        shape: tuple[int, int, int],
        *,
        conditional: bool,
        null_class: int | None,
        classifier: ClassGradient | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        self.runtime, self.shape = runtime, shape
        self.conditional, self.null_class = conditional, null_class
        self.classifier, self.schedule = classifier, schedule

    @classmethod
    def of(cls, model: Checkpoint, runtime: Runtime) -> Denoiser:
        """The denoiser of a checkpoint whose network `runtime` runs."""
        config = model.unet.config
        classifier = deepcopy(model.classifier)  # as the runtime's network is: neither follows the caller's
        if classifier is not None:
            classifier.to(runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(
            runtime,
            (config.in_channels, config.sample_size, config.sample_size),
            conditional=config.num_class_embeds is not None,
            null_class=model.null_class,
            classifier=classifier,
            schedule=model.schedule,
        )

    def start(self, chain: Chain) -> Latent:
        """Where a chain begins: the noise of row −1 of its stream, or its mix.

        Raises ValueError for a label or guidance that the network has no class or null class for, and for
        classifier guidance without a classifier or a label.
        """
        guided = max(chain.plan.rows) == 2
        if chain.label is not None and not self.conditional:
            raise ValueError("the network takes no class labels")
        if guided and chain.label is None:
            raise ValueError("guidance needs a label")
        if self.conditional and self.null_class is None and (chain.label is None or guided):
            raise ValueError("the network has no null class: it needs a label, and guidance_scale 1")
        if chain.plan.table[:, A_G].any() and (self.classifier is None or chain.label is None):
            raise ValueError("classifier guidance needs a classifier and a label")
        mix = chain.start or Mix(noises=((1.0, chain.seed),))
        drawn = noise.normals([seed for _, seed in mix.noises], [noise.START] * len(mix.noises), self.shape)
        terms = [*mix.images, *((weight, z) for (weight, _), z in zip(mix.noises, drawn, strict=True))]
        x = terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else sum(np.float32(w) * v for w, v in terms)
        latent = torch.from_numpy(np.asarray(x, np.float32)).to(self.runtime.device)
        return Latent(latent, torch.zeros_like(latent))

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> Sequence[Latent]:
        """Advance each chain from its row: one network call of Σ chain.plan.rows[row] rows.

        Returns new latents, in order; the given ones are untouched, so a failed or cancelled step costs
        nothing.
        """
        x = torch.stack([latent.x for latent in latents])
        previous = torch.stack([latent.x0 for latent in latents])
        table = np.stack([chain.plan.table[row] for chain, row in zip(chains, rows, strict=True)])
        t = torch.from_numpy(table[:, T].astype(np.int64)).to(self.runtime.device)
        out, spread = self._guided(x, chains, t, table[:, W])

        clips = np.array([[chain.plan.clip] for chain in chains])
        columns = self._columns(np.concatenate((table, clips), axis=1)).unbind(1)
        guess = columns[A_X] * x + columns[A_O] * out
        led = np.flatnonzero(table[:, A_G]).tolist()
        if led:
            guess[led] += columns[A_G][led] * self._class_gradient(x, chains, t, led)
        x0 = torch.clamp(guess, -columns[-1], columns[-1])
        x = columns[C_X] * x + columns[C_0] * x0 + columns[C_P] * previous
        noisy = np.flatnonzero(table[:, C_N]).tolist()
        if noisy:
            scale = columns[C_N][noisy]
            if spread is not None:
                scale = scale * torch.exp(columns[C_V][noisy] * spread[noisy])
            x[noisy] += scale * self._noise([chains[i] for i in noisy], [rows[i] for i in noisy])
        given = [i for i, chain in enumerate(chains) if chain.known is not None]
        if given:
            self._put_known(x, chains, rows, given, (columns[K_0][given], columns[K_N][given]))
        return [Latent(*pair) for pair in zip(x.unbind(), x0.unbind(), strict=True)]

    def measure(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> list[tuple[float, float]]:
        """What probes found in these rows, just done: (term of the bound, mean squared error of the guess).

        The term is L_t in bits per dimension with the schedule's variance, the small one where it is learned;
        the error is that of x₀ in [-1, 1].
        """
        assert self.schedule is not None
        known = [chain.known for chain in chains if chain.known is not None]
        image = torch.from_numpy(np.stack([each.image for each in known])).to(self.runtime.device)
        guess = torch.stack([latent.x0 for latent in latents])
        t = torch.tensor([chain.plan.timesteps[row] for chain, row in zip(chains, rows, strict=True)])
        bits = vlb_terms(self.schedule, image, guess, t.to(image.device), self.schedule.variance_type)
        errors = (image - guess).double().square().flatten(1).mean(1)
        return list(zip(bits.tolist(), errors.tolist(), strict=True))

    def _guided(
        self, x: Tensor, chains: Sequence[Chain], t: Tensor, w: NDArray[np.float64]
    ) -> tuple[Tensor, Tensor | None]:
        """(output, where the variance lies between its ends, 0 to 1, if the network says) of each sample.

        The guided ones' output is combined from two rows of the same call.
        """
        guided = np.flatnonzero(w != 1).tolist()
        device = self.runtime.device
        y: Tensor | None = None
        if self.conditional:
            null = self.null_class if self.null_class is not None else 0
            labels = [null if chain.label is None else chain.label for chain in chains]
            y = torch.tensor(labels + [null] * len(guided), device=device)
        if not guided:
            return self._split(self.runtime.forward(x, t, y))
        source = torch.tensor([*range(len(chains)), *guided], device=device)
        out, spread = self._split(self.runtime.forward(x[source], t[source], y))
        # A copy: the runtime's output may be an inference tensor, which must not be written to.
        conditional, unconditional = out[: len(chains)].clone(), out[len(chains) :]
        scale = self._columns(w[guided][:, None])[:, 0]
        conditional[guided] = unconditional + scale * (conditional[guided] - unconditional)
        return conditional, None if spread is None else spread[: len(chains)]

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = self.shape[0]
        if out.shape[1] == channels:
            return out, None
        return out[:, :channels], (out[:, channels:] + 1) / 2

    def _class_gradient(self, x: Tensor, chains: Sequence[Chain], t: Tensor, led: Sequence[int]) -> Tensor:
        assert self.classifier is not None  # `start` has made sure
        labels = torch.tensor([chains[i].label for i in led], device=self.runtime.device)
        return self.classifier.gradient(x[led], t[led], labels)

    def _put_known(
        self,
        x: Tensor,
        chains: Sequence[Chain],
        rows: Sequence[int],
        given: Sequence[int],
        k: Sequence[Tensor],
    ) -> None:
        """Set the known pixels to what the forward process makes of them at the row's end."""
        device = self.runtime.device
        known = [chain.known for chain in chains if chain.known is not None]
        image = torch.from_numpy(np.stack([each.image for each in known])).to(device)
        mask = torch.from_numpy(np.stack([np.broadcast_to(each.mask, self.shape) for each in known]))
        z = self._noise([chains[i] for i in given], [rows[i] for i in given], noise.KNOWN)
        x[given] = torch.where(mask.to(device), k[0] * image + k[1] * z, x[given])

    def _columns(self, values: NDArray[np.float64]) -> Tensor:
        """[B, K] float64 → [B, K, 1, 1, 1] float32 on the device."""
        return torch.from_numpy(values.astype(np.float32)).to(self.runtime.device)[..., None, None, None]

    def _noise(self, chains: Sequence[Chain], rows: Sequence[int], stream: int = 0) -> Tensor:
        drawn = noise.normals([chain.seed for chain in chains], rows, self.shape, stream)
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


def from_pixels(pixels: NDArray[np.uint8]) -> Image:
    """An 8-bit image [H, W, C] as a sample [C, H, W] in [-1, 1]; `to_pixels` gives it back exactly."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1)
