"""Likelihood by the probability flow: the ODE that carries the data to noise, and how it stretches space.

The other way to a likelihood than the bound (Song et al. 2021, §4.3 and appendix D.2). In z = x_t / √ᾱ_t and
s = √(1 − ᾱ_t) / √ᾱ_t, the noise level, the ODE is

    dz/ds = (z − x̂₀(z)) / s                            x̂₀: the network's guess, clipped as in sampling
    log p(z) = log p_T(z_T) + ∫ ∇·(z − x̂₀) d log s      eq. 39, p_T = N(0, I) in x_T

from the noise of timestep 0 up to that of T − 1. The divergence comes from one random vector of ±1 per image
(Hutchinson's estimator, eq. 40), which stays the same along the way.

Steps lie on the model's own timesteps, evenly in log s, so that the network is asked about nothing that it
was not trained on; hence Heun's method, which looks at both ends of a step and at nothing between. In s the
path is nearly straight (Karras et al. 2022, §3), and the divergence is smooth in log s, where the trapezoidal
rule sums it up over the points that have been reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model import noise
from model.checkpoint import Checkpoint
from model.diffusion import predict_x0
from model.noise import NoiseStream
from model.schedule import NoiseSchedule

Guess = Callable[[Tensor, Tensor], Tensor]
"""(x [B, …], t [B]) → the clipped guess at x₀, through which gradients flow."""

BIN = 2 / 255
"""Between two grey levels of pixels in [-1, 1]."""


def guess_of(model: Checkpoint) -> Guess:
    """The guess of a checkpoint's network without a class, run by PyTorch."""
    schedule, unet = model.schedule, model.unet

    def guess(x: Tensor, t: Tensor) -> Tensor:
        y = None
        if unet.config.num_class_embeds is not None:
            assert model.null_class is not None  # whoever asks has made sure
            y = torch.full_like(t, model.null_class)
        out = unet(x.float(), t, y)[:, : x.shape[1]]
        return predict_x0(schedule, x, t, out).clamp(-schedule.clip, schedule.clip)

    return guess


def log_density(guess: Guess, schedule: NoiseSchedule, z: Tensor, seeds: Sequence[int], steps: int) -> Tensor:
    """Log p(z) in nats, z being images at the noise level of timestep 0.

    z: [B, …] in the units of x₀. seeds: [B], of Hutchinson's vectors. steps: of Heun's method, two network
    calls each; fewer where the timesteps are too few. Returns [B] float64.
    """
    nodes = np.unique(schedule.spaced_timesteps(min(steps + 1, schedule.timesteps), "logsnr"))
    levels = schedule.snr[nodes] ** -0.5
    signs = noise.normals(seeds, [0] * len(seeds), z.shape[1:], NoiseStream.PROBABILITY_FLOW)
    v = torch.from_numpy(np.where(signs < 0, -1.0, 1.0))
    z = z.double()
    change = torch.zeros(len(z), dtype=torch.float64)
    slope, divergence = _slope_and_divergence(guess, schedule, z, int(nodes[0]), v)
    for t, here, there in zip(nodes[1:].tolist(), levels[:-1], levels[1:], strict=True):
        with torch.no_grad():
            ahead = z + (there - here) * slope
            z = z + (there - here) / 2 * (slope + _slope(guess, schedule, ahead, t))
        before = divergence
        slope, divergence = _slope_and_divergence(guess, schedule, z, t, v)
        change += math.log(there / here) / 2 * (before + divergence)
    last = float(schedule.alphas_cumprod[-1])
    x_t = math.sqrt(last) * z
    normal = -0.5 * (x_t.square() + math.log(2 * math.pi) - math.log(last)).flatten(1).sum(1)
    return normal + change


def _slope(guess: Guess, schedule: NoiseSchedule, z: Tensor, t: int) -> Tensor:
    """dz/ds at a timestep: the network's ε."""
    ac = float(schedule.alphas_cumprod[t])
    x0 = guess(math.sqrt(ac) * z, torch.full((len(z),), t))
    return (z - x0) * math.sqrt(ac / (1 - ac))


def _slope_and_divergence(
    guess: Guess, schedule: NoiseSchedule, z: Tensor, t: int, v: Tensor
) -> tuple[Tensor, Tensor]:
    """dz/ds, and v·∂(s dz/ds)/∂z·v, whose mean over v is the divergence in log s: [B, …] and [B]."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        slope = _slope(guess, schedule, z, t)
        level = float(schedule.snr[t]) ** -0.5
        (pulled,) = torch.autograd.grad((level * slope * v).sum(), z)
    return slope.detach(), (pulled * v).flatten(1).sum(1)


def uniform_bits(
    guess: Guess, schedule: NoiseSchedule, x0: Tensor, seeds: Sequence[int], steps: int
) -> Tensor:
    """Bits per dimension of 8-bit images by uniform dequantisation (Theis et al. 2016, eq. 1). [B] float64.

    x0: [B, C, H, W] on the 256 levels of [-1, 1]. Noise as wide as a level makes them continuous; by Jensen's
    inequality the level's probability is at least what the density says on average.
    """
    drawn = torch.from_numpy(
        noise.normals(seeds, [1] * len(seeds), x0.shape[1:], NoiseStream.PROBABILITY_FLOW)
    )
    z = x0.double() + BIN * (torch.special.ndtr(drawn.double()) - 0.5)
    nats = log_density(guess, schedule, z, seeds, steps)
    return -nats / (x0[0].numel() * math.log(2)) - math.log2(BIN)


def noised_bits(
    guess: Guess, schedule: NoiseSchedule, x0: Tensor, seeds: Sequence[int], steps: int
) -> Tensor:
    """KL(q(z | x₀) ‖ p) in bits per dimension, q being the forward process at timestep 0. [B] float64.

    What x at timestep 0 costs: the very thing that L_T and the bound's terms above t = 0 add up to. From one
    draw of the noise. x0: [B, C, H, W] in [-1, 1].
    """
    level = float(schedule.snr[0]) ** -0.5
    eps = torch.from_numpy(
        noise.normals(seeds, [2] * len(seeds), x0.shape[1:], NoiseStream.PROBABILITY_FLOW)
    ).double()
    own = -0.5 * (eps.square() + math.log(2 * math.pi) + 2 * math.log(level)).flatten(1).sum(1)
    nats = own - log_density(guess, schedule, x0.double() + level * eps, seeds, steps)
    return nats / (x0[0].numel() * math.log(2))
