"""Gaussian data, of which everything is known: the best network, the bound's terms, the flow's density."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from model.runtimes import DtypeName, ThreadQueue
from model.schedule import NoiseSchedule

Floats = NDArray[np.float64]


class GaussianRuntime:
    """The best ε for pixels that are independent, of mean 0 and `variance`: a multiple of x_t."""

    variance: ClassVar[float] = 0.09
    name = "gaussian"
    dtype: DtypeName = "float32"
    batch_sizes: tuple[int, ...] = ()
    recorder = None

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.device = torch.device("cpu")
        self.queue = ThreadQueue()
        self.schedule = schedule
        ac = torch.from_numpy(schedule.alphas_cumprod)
        self.factors = (1 - ac).sqrt() / (ac * self.variance + 1 - ac)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return (self.factors[t].view(-1, 1, 1, 1) * x).to(x.dtype)

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        pass

    def predict_x0(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x₀ | x_t]."""
        ac = torch.from_numpy(self.schedule.alphas_cumprod)[t].view(-1, 1, 1, 1)
        return ac.sqrt() * self.variance * x / (ac * self.variance + 1 - ac)


def prior_divergence(schedule: NoiseSchedule, x0: ArrayLike) -> float:
    """L_T of one image in bits per dimension, by the divergence that torch knows."""
    ac, x0 = float(schedule.alphas_cumprod[-1]), torch.as_tensor(np.asarray(x0)).double()
    last = Normal(ac**0.5 * x0, torch.tensor((1 - ac) ** 0.5).double())
    nats = kl_divergence(last, Normal(torch.zeros(()).double(), 1.0))
    return float(nats.mean()) / math.log(2)


def expected_terms(schedule: NoiseSchedule, x0: Floats) -> Floats:
    """E_q L_t of an image under that network, fixed small variance, in bits per dimension: [T], from t = 1.

    The x₀ prediction is off by s²/(ᾱ v + s²) x₀ − √ᾱ v s/(ᾱ v + s²) ε with s² = 1 − ᾱ, and a term is its
    square by ½ (SNR(t − 1) − SNR(t)) (Kingma et al. 2021, eq. 13 and 14, for the posterior's variance).
    """
    ac, v = schedule.alphas_cumprod, GaussianRuntime.variance
    s2 = 1 - ac
    square = (s2 / (ac * v + s2)) ** 2 * np.square(x0).mean() + ac * s2 * (v / (ac * v + s2)) ** 2
    terms = np.zeros_like(ac)
    terms[1:] = 0.5 * (schedule.snr[:-1] - schedule.snr[1:]) * square[1:]
    return np.asarray(terms / math.log(2))


def flow_log_density(schedule: NoiseSchedule, z: Floats) -> Floats:
    """Log density in nats of images z [B, …] at the noise level of timestep 0, by the flow from N(0, I).

    The flow scales z by √((v + s_T²) / (v + s_0²)) from there to x_T, so the density is a Gaussian.
    """
    v, s2 = GaussianRuntime.variance, 1 / schedule.snr
    variance = (v + s2[0]) / (schedule.alphas_cumprod[-1] * (v + s2[-1]))
    nats = -0.5 * (np.square(z) / variance + math.log(2 * math.pi * variance))
    return np.asarray(nats.reshape(len(z), -1).sum(1))
