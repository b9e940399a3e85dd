"""Likelihood by the probability flow: the ODE that carries data to noise, and its change of volume.

Besides the variational bound, the second estimate of a likelihood (Song et al. 2021, §4.3 and appendix D.2).
In z = x_t / √ᾱ_t and s = √(1 − ᾱ_t) / √ᾱ_t, the noise level, the ODE is

    dz/ds = (z − x̂₀(z)) / s                            x̂₀: the x₀ prediction, clipped as in sampling
    log p(z) = log p_T(z_T) + ∫ ∇·(z − x̂₀) d log s      eq. 39, p_T = N(0, I) in x_T

from the noise of timestep 0 up to that of T − 1. The divergence is estimated with one random vector of ±1 per
image (Hutchinson's estimator, eq. 40), the same at every step.

Steps lie on the model's own timesteps, evenly in log s, because the network was trained on no others. Hence
Heun's method, which evaluates a step at its two ends only. In s the path is nearly straight (Karras et al.
2022, §3), and the divergence is smooth in log s, where the trapezoidal rule integrates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model import noise
from model.checkpoint import Checkpoint
from model.diffusion import bounded_x0, network_timesteps, predict_x0
from model.noise import NoiseStream
from model.schedule import NoiseSchedule

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(x [B, …], t [B]) → the clipped x₀ prediction, differentiable in x."""


def x0_predictor(model: Checkpoint) -> Predictor:
    """The x₀ prediction of a checkpoint's network without a class, run by PyTorch."""
    schedule, unet = model.schedule, model.unet

    def predict(x: Tensor, t: Tensor) -> Tensor:
        y = None
        if unet.config.conditional:
            assert model.null_class is not None  # the caller has checked
            y = torch.full_like(t, model.null_class)
        out = unet(x.float(), network_timesteps(schedule, t), y)[:, : x.shape[1]]
        return bounded_x0(schedule, predict_x0(schedule, x, t, out))

    return predict


def log_density(
    predict: Predictor, schedule: NoiseSchedule, z: Tensor, seeds: Sequence[int], steps: int
) -> Tensor:
    """Log p(z) in nats, z being images at the noise level of timestep 0.

    z: [B, …] in the units of x₀. seeds: [B], of Hutchinson's vectors. steps: of Heun's method, two network
    calls each; fewer where the timesteps are too few. Returns [B] float64.
    """
    nodes = np.unique(schedule.spaced_timesteps(min(steps + 1, schedule.timesteps), "logsnr"))
    nodes = nodes[schedule.snr[nodes] > 0]  # z would be infinite at a last timestep of pure noise
    levels = schedule.snr[nodes] ** -0.5
    signs = noise.normals(seeds, [0] * len(seeds), z.shape[1:], NoiseStream.PROBABILITY_FLOW)
    v = torch.from_numpy(np.where(signs < 0, -1.0, 1.0))
    z = z.double()
    change = torch.zeros(len(z), dtype=torch.float64)
    slope, divergence = _slope_and_divergence(predict, schedule, z, int(nodes[0]), v)
    for t, here, there in zip(nodes[1:].tolist(), levels[:-1], levels[1:], strict=True):
        with torch.no_grad():
            ahead = z + (there - here) * slope
            z = z + (there - here) / 2 * (slope + _slope(predict, schedule, ahead, t))
        before = divergence
        slope, divergence = _slope_and_divergence(predict, schedule, z, t, v)
        change += math.log(there / here) / 2 * (before + divergence)
    last = float(schedule.alphas_cumprod[nodes[-1]])
    x_t = math.sqrt(last) * z
    normal = -0.5 * (x_t.square() + math.log(2 * math.pi) - math.log(last)).flatten(1).sum(1)
    return normal + change


def _slope(predict: Predictor, schedule: NoiseSchedule, z: Tensor, t: int) -> Tensor:
    """dz/ds at a timestep: the network's ε."""
    ac = float(schedule.alphas_cumprod[t])
    x0 = predict(math.sqrt(ac) * z, torch.full((len(z),), t))
    return (z - x0) * math.sqrt(ac / (1 - ac))


def _slope_and_divergence(
    predict: Predictor, schedule: NoiseSchedule, z: Tensor, t: int, v: Tensor
) -> tuple[Tensor, Tensor]:
    """dz/ds, and v·∂(s dz/ds)/∂z·v, whose mean over v is the divergence in log s: [B, …] and [B]."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        slope = _slope(predict, schedule, z, t)
        level = float(schedule.snr[t]) ** -0.5
        (pulled,) = torch.autograd.grad((level * slope * v).sum(), z)
    return slope.detach(), (pulled * v).flatten(1).sum(1)


def uniform_bits(
    predict: Predictor, schedule: NoiseSchedule, x0: Tensor, seeds: Sequence[int], steps: int
) -> Tensor:
    """Bits per dimension of 8-bit images by uniform dequantisation (Theis et al. 2016, eq. 1). [B] float64.

    x0: [B, C, H, W] on the 256 levels of the data range. Noise as wide as a level makes them continuous; by
    Jensen's inequality the level's log probability is at least the mean log density.
    """
    drawn = torch.from_numpy(
        noise.normals(seeds, [1] * len(seeds), x0.shape[1:], NoiseStream.PROBABILITY_FLOW)
    )
    low, high = schedule.data_range
    width = (high - low) / 255
    z = x0.double() + width * (torch.special.ndtr(drawn.double()) - 0.5)
    nats = log_density(predict, schedule, z, seeds, steps)
    return -nats / (x0[0].numel() * math.log(2)) - math.log2(width)


def noised_bits(
    predict: Predictor, schedule: NoiseSchedule, x0: Tensor, seeds: Sequence[int], steps: int
) -> Tensor:
    """KL(q(z | x₀) ‖ p) in bits per dimension, q being the forward process at timestep 0. [B] float64.

    This is the rate of x at timestep 0, which L_T and the bound's terms above t = 0 bound. From one draw of
    the noise. x0: [B, C, H, W] in the data range.
    """
    level = float(schedule.snr[0]) ** -0.5
    eps = torch.from_numpy(
        noise.normals(seeds, [2] * len(seeds), x0.shape[1:], NoiseStream.PROBABILITY_FLOW)
    ).double()
    own = -0.5 * (eps.square() + math.log(2 * math.pi) + 2 * math.log(level)).flatten(1).sum(1)
    nats = own - log_density(predict, schedule, x0.double() + level * eps, seeds, steps)
    return nats / (x0[0].numel() * math.log(2))
