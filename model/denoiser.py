"""One batched reverse step: stack the samples, call the network once, guide, update each by its own plan.

Three layers, as for any loop: `Denoiser.step` is one step for many samples, `trajectory` a generator of
steps for samples that start together, `generate` the drain of it. The engine uses only the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import noise
from model.chain import Chain, Image, InitialLatent
from model.checkpoint import Checkpoint
from model.diffusion import vlb_terms
from model.interpolation import angle_between, spherical
from model.noise import NoiseStream
from model.runtimes import Runtime
from model.samplers import COLUMNS, ROW, Table
from model.schedule import NoiseSchedule

Columns = Mapping[str, Tensor]
"""The columns of a batch's rows by name, each [B, 1, 1, 1] float32."""


@dataclass(slots=True)
class Latent:
    """The state of a sample between steps: x_t and the latest x₀ prediction, both [C, H, W] float32."""

    x: Tensor
    x0: Tensor


class ClassGradient(Protocol):
    """A noise-aware classifier, as guidance needs it."""

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """∇ₓ log p(y | x_t): x [B, C, H, W], t and y [B] int64. Returns as x."""


class Denoiser:
    """Advances samples by one step of their plans, many in one network call.

    shape: (C, H, W) of a sample. null_class: label index of the unconditional branch. conditional: whether
    the network takes labels at all. classifier: for plans with classifier guidance. schedule: for `measure`.
    A network with 2C outputs predicts its variance in the second C (Nichol & Dhariwal 2021).
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
        classifier = deepcopy(model.classifier)  # like the runtime's network, independent of the caller's
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

    def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
        """Where a chain begins: noise from its own seed, or as its `start` says.

        carried: the latents that the stage before this one left. Raises ValueError for a label or guidance
        that the network has no class or null class for, and for classifier guidance without a classifier or
        a label.
        """
        self._check(chain)
        if chain.start is not None and chain.start.carried is not None:
            mix = chain.start.carried
            ends = carried[mix.first], carried[mix.second]
            weights = spherical(mix.share, angle_between(*ends))
            terms = [(weight, end) for weight, end in zip(weights, ends, strict=True) if weight]
        else:
            start = chain.start or InitialLatent(noises=((1.0, chain.seed),))
            seeds = [seed for _, seed in start.noises]
            drawn = noise.normals(seeds, [noise.START] * len(seeds), self.shape)
            noises = [(weight, z) for (weight, _), z in zip(start.noises, drawn, strict=True)]
            terms = [*start.images, *noises]
        x = terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else sum(np.float32(w) * v for w, v in terms)
        # A copy: images that came as bytes are read-only.
        latent = torch.from_numpy(np.array(x, np.float32)).to(self.runtime.device)
        return Latent(latent, torch.zeros_like(latent))

    def _check(self, chain: Chain) -> None:
        guided = max(chain.plan.evaluations) == 2
        if chain.label is not None and not self.conditional:
            raise ValueError("the network takes no class labels")
        if guided and chain.label is None:
            raise ValueError("guidance needs a label")
        if self.conditional and self.null_class is None and (chain.label is None or guided):
            raise ValueError("the network has no null class: it needs a label, and guidance_scale 1")
        if chain.plan.table["a_g"].any() and (self.classifier is None or chain.label is None):
            raise ValueError("classifier guidance needs a classifier and a label")

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[Latent]:
        """Run one step of each chain in one network call, of Σ chain.plan.evaluations[step] rows.

        Returns new latents, in order. The given ones are untouched, so a failed or cancelled step changes
        nothing.
        """
        x = torch.stack([latent.x for latent in latents])
        previous = torch.stack([latent.x0 for latent in latents])
        table = np.array([chain.plan.table[step] for chain, step in zip(chains, steps, strict=True)], ROW)
        t = torch.from_numpy(table["t"].astype(np.int64)).to(self.runtime.device)
        columns = self._columns(table)
        out, variance_frac = self._guided(x, chains, t, table["w"], columns["w"])

        x0_pred = columns["a_x"] * x + columns["a_o"] * out
        classifier_guided = np.flatnonzero(table["a_g"]).tolist()
        if classifier_guided:
            gradient = self._class_gradient(x, chains, t, classifier_guided)
            x0_pred[classifier_guided] += columns["a_g"][classifier_guided] * gradient
        x0 = torch.clamp(x0_pred, -columns["clip"], columns["clip"])
        x = columns["c_x"] * x + columns["c_0"] * x0 + columns["c_p"] * previous
        noisy = np.flatnonzero(table["c_n"]).tolist()
        if noisy:
            scale = columns["c_n"][noisy]
            if variance_frac is not None:
                scale = scale * torch.exp(columns["c_v"][noisy] * variance_frac[noisy])
            x[noisy] += scale * self._noise([chains[i] for i in noisy], [steps[i] for i in noisy])
        self._put_known(x, chains, steps, columns)
        return [Latent(*state) for state in zip(x.unbind(), x0.unbind(), strict=True)]

    def measure(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> list[tuple[float, float]]:
        """What these steps, just run, found about known images: (bits per dimension, squared error) of each.

        The bits are L_t with the schedule's variance, the small one where it is learned; the mean squared
        error is that of the x₀ prediction, in [-1, 1].
        """
        assert self.schedule is not None
        known = [chain.known for chain in chains if chain.known is not None]
        image = torch.from_numpy(np.stack([each.image for each in known]))
        x0_pred = torch.stack([latent.x0 for latent in latents]).cpu()  # not every device has float64
        t = torch.tensor([chain.plan.timesteps[step] for chain, step in zip(chains, steps, strict=True)])
        bits = vlb_terms(self.schedule, image, x0_pred, t, self.schedule.variance_type)
        errors = (image - x0_pred).double().square().flatten(1).mean(1)
        return list(zip(bits.tolist(), errors.tolist(), strict=True))

    def _guided(
        self, x: Tensor, chains: Sequence[Chain], t: Tensor, w: NDArray[np.float64], scale: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(output, position between the small variance and the large one, 0 to 1, if predicted) per sample.

        The output of guided samples is combined from two rows of the same call.
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
        out, variance_frac = self._split(self.runtime.forward(x[source], t[source], y))
        # A copy: the runtime's output may be an inference tensor, which must not be written to.
        conditional, unconditional = out[: len(chains)].clone(), out[len(chains) :]
        conditional[guided] = unconditional + scale[guided] * (conditional[guided] - unconditional)
        return conditional, None if variance_frac is None else variance_frac[: len(chains)]

    def _split(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = self.shape[0]
        if out.shape[1] == channels:
            return out, None
        return out[:, :channels], (out[:, channels:] + 1) / 2

    def _class_gradient(self, x: Tensor, chains: Sequence[Chain], t: Tensor, guided: Sequence[int]) -> Tensor:
        assert self.classifier is not None  # `start` has checked this
        labels = torch.tensor([chains[i].label for i in guided], device=self.runtime.device)
        return self.classifier.gradient(x[guided], t[guided], labels)

    def _put_known(self, x: Tensor, chains: Sequence[Chain], steps: Sequence[int], columns: Columns) -> None:
        """Set known pixels, in place, to the forward process's at the end of the step."""
        known = {i: chain.known for i, chain in enumerate(chains) if chain.known is not None}
        if not known:
            return
        at, device = list(known), self.runtime.device
        image = torch.from_numpy(np.stack([each.image for each in known.values()])).to(device)
        mask = torch.from_numpy(np.stack([np.broadcast_to(each.mask, self.shape) for each in known.values()]))
        z = self._noise([chains[i] for i in at], [steps[i] for i in at], NoiseStream.KNOWN_PIXELS)
        x[at] = torch.where(mask.to(device), columns["k_0"][at] * image + columns["k_n"][at] * z, x[at])

    def _columns(self, table: Table) -> Columns:
        """Rows [B] of ROW → their columns on the device."""
        values = table.view(np.float64).reshape(len(table), len(COLUMNS)).astype(np.float32)
        columns = torch.from_numpy(values).to(self.runtime.device)[..., None, None, None].unbind(1)
        return dict(zip(COLUMNS, columns, strict=True))

    def _noise(
        self, chains: Sequence[Chain], steps: Sequence[int], stream: NoiseStream = NoiseStream.STEP
    ) -> Tensor:
        drawn = noise.normals([chain.seed for chain in chains], steps, self.shape, stream)
        return torch.from_numpy(drawn).to(self.runtime.device)


def trajectory(denoiser: Denoiser, chains: Sequence[Chain]) -> Iterator[Sequence[Latent]]:
    """Run chains with plans of one length side by side, yielding the latents after every step."""
    latents: Sequence[Latent] = [denoiser.start(chain) for chain in chains]
    for step in range(len(chains[0].plan)):
        latents = denoiser.step(chains, latents, [step] * len(chains))
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
