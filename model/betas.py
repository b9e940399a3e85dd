"""Curves of β over the timesteps, in float64, as diffusers' `beta_schedule` names them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MAX_BETA = 0.999
NEARLY_NO_SIGNAL = 2.0**-24
"""What stands for an ᾱ_T or SNR of 0 where its logarithm is needed, as in diffusers."""


class ScheduleError(ValueError):
    """A noise schedule or its configuration is not one this code can follow; the message says why."""


def linear_betas(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """β rising linearly from `start` to `end` (Ho et al. 2020, §4). Returns [T] float64."""
    return np.linspace(start, end, timesteps, dtype=np.float64)


def scaled_linear_betas(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """√β rising linearly (Rombach et al. 2022, appendix). Returns [T] float64."""
    return np.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=np.float64) ** 2


def sigmoid_betas(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """β rising from `start` to `end` along a sigmoid from −6 to 6 (Xu et al. 2022, GeoDiff). Returns [T]."""
    x = np.linspace(-6, 6, timesteps, dtype=np.float64)
    return np.asarray((end - start) / (1 + np.exp(-x)) + start)


def cosine_betas(timesteps: int) -> Array:
    """β from ᾱ(t) = cos²((t/T + 0.008) / 1.008 · π/2) (Nichol & Dhariwal 2021, eq. 17). Returns [T]."""
    return _betas_of(lambda t: np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2, timesteps)


def exponential_betas(timesteps: int) -> Array:
    """β from ᾱ(t) = e^(−12 t/T), as diffusers has it. Returns [T]."""
    return _betas_of(lambda t: np.exp(-12 * t), timesteps)


def laplace_betas(timesteps: int) -> Array:
    """β from a Laplace distribution of the log SNR (Hang et al. 2024, table 1). Returns [T].

    As diffusers has it, which takes √(SNR / (1 + SNR)) for ᾱ where the paper has no root: that is what
    networks were trained with.
    """

    def alpha_bar(t: Array) -> Array:
        log_snr = -0.5 * np.copysign(1, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
        return np.asarray(np.sqrt(1 / (1 + np.exp(-log_snr))))

    return _betas_of(alpha_bar, timesteps)


def _betas_of(alpha_bar: Callable[[Array], Array], timesteps: int) -> Array:
    """β with ᾱ as a function of t/T, at most MAX_BETA. Returns [T]."""
    values = alpha_bar(np.linspace(0, 1, timesteps + 1, dtype=np.float64))
    return np.asarray(np.minimum(1 - values[1:] / values[:-1], MAX_BETA), dtype=np.float64)


def zero_terminal_snr(betas: Array) -> Array:
    """β with √ᾱ shifted and scaled to end at 0, ᾱ_1 being kept (Lin et al. 2024, algorithm 1). [T] → [T]."""
    root = np.sqrt(np.cumprod(1 - betas))
    if len(root) < 2:
        raise ScheduleError("rescale_betas_zero_snr=true needs at least 2 timesteps")
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = np.concatenate(([1.0], root**2))
    return np.asarray(1 - alpha_bar[1:] / alpha_bar[:-1])


BETAS: dict[str, Callable[[int, float, float], Array]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "sigmoid": sigmoid_betas,
    "squaredcos_cap_v2": lambda timesteps, _start, _end: cosine_betas(timesteps),
    "laplace": lambda timesteps, _start, _end: laplace_betas(timesteps),
    "exp": lambda timesteps, _start, _end: exponential_betas(timesteps),
}
"""By the name in a scheduler config: (T, beta_start, beta_end) → [T]."""
