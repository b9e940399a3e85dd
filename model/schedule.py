"""Noise schedules: β, ᾱ and what follows from them, in float64, read from a diffusers scheduler config.

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) with ᾱ_t = ∏_{s≤t} (1 − β_s)   (Ho et al. 2020, eq. 4).
Timesteps count from 0, so β_0 is the paper's β_1, and ᾱ before timestep 0 is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PredictionType = Literal["epsilon", "v_prediction", "sample", "posterior_mean"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr"]

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "posterior_mean")
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned_range")
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace", "quadratic", "logsnr")
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")  # others clip, space or add noise differently


class ScheduleError(ValueError):
    """A scheduler configuration asks for something this code does not do; the message says what."""


def linear_betas(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """β rising linearly from `start` to `end` (Ho et al. 2020, §4). Returns [T] float64."""
    return np.linspace(start, end, timesteps, dtype=np.float64)


def scaled_linear_betas(timesteps: int, start: float = 1e-4, end: float = 0.02) -> Array:
    """√β rising linearly (Rombach et al. 2022, appendix). Returns [T] float64."""
    return np.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=np.float64) ** 2


def cosine_betas(timesteps: int, max_beta: float = 0.999) -> Array:
    """β from ᾱ(t) = cos²((t/T + 0.008) / 1.008 · π/2) (Nichol & Dhariwal 2021, eq. 17). Returns [T]."""
    t = np.linspace(0, 1, timesteps + 1, dtype=np.float64)
    alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.asarray(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process, and what the checkpoint says about reversing it.

    betas: [T] float64 in (0, 1). `prediction_type` is what the network's output means. `clip` bounds
    the x₀ prediction to [−clip, clip]; infinity leaves it alone. `variance_type` and `timestep_spacing`
    are the checkpoint's defaults for sampling.
    """

    betas: Array
    prediction_type: PredictionType = "epsilon"
    clip: float = 1.0
    variance_type: VarianceType = "fixed_small"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ScheduleError("betas must be one row of numbers between 0 and 1")
        if self.steps_offset < 0 or not self.clip > 0:
            raise ScheduleError(f"steps_offset={self.steps_offset} and clip={self.clip} must not be negative")
        for name, allowed in (
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", VARIANCE_TYPES),
            ("timestep_spacing", SPACINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ScheduleError(f"{name}={getattr(self, name)!r} is not supported (known: {allowed})")

    @property
    def timesteps(self) -> int:
        """T, the length of the forward process."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Array:
        """ᾱ_t: [T] float64, falling from nearly 1 towards 0."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def snr(self) -> Array:
        """Signal-to-noise ratio ᾱ_t / (1 − ᾱ_t): [T] float64 (Kingma et al. 2021, eq. 2)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @cached_property
    def alphas_cumprod_prev(self) -> Array:
        """ᾱ_{t−1}: [T] float64, beginning with 1."""
        return np.concatenate(([1.0], self.alphas_cumprod[:-1]))

    @cached_property
    def posterior_weights(self) -> tuple[Array, Array]:
        """(c_0, c_x), each [T]: the posterior mean μ̃_t is c_0 x_0 + c_x x_t (Ho et al. 2020, eq. 7)."""
        ac, prev = self.alphas_cumprod, self.alphas_cumprod_prev
        return prev**0.5 * self.betas / (1 - ac), (1 - self.betas) ** 0.5 * (1 - prev) / (1 - ac)

    @cached_property
    def x0_coefficients(self) -> tuple[Array, Array]:
        """(a_x, a_o), each [T], with x₀ = a_x·x + a_o·out for what the network predicts.

        Ho et al. 2020, eq. 15 for ε and eq. 7 for the posterior mean; Salimans & Ho 2022 for v.
        """
        ac = self.alphas_cumprod
        match self.prediction_type:
            case "epsilon":
                return 1 / ac**0.5, -(((1 - ac) / ac) ** 0.5)
            case "v_prediction":
                return ac**0.5, -((1 - ac) ** 0.5)
            case "sample":
                return 0 * ac, 1 + 0 * ac
            case "posterior_mean":
                c_0, c_x = self.posterior_weights
                return -c_x / c_0, 1 / c_0

    def posterior_variance(self, kind: VarianceType) -> Array:
        """Variance of p(x_{t−1} | x_t): β̃_t (fixed small) or β_t (fixed large), Ho et al. 2020, §3.2. [T].

        Of a learned one, β̃_t: the least it can be.
        """
        if kind == "fixed_large":
            return self.betas
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    def spaced_timesteps(self, steps: int, spacing: Spacing | None = None) -> NDArray[np.int64]:
        """Choose `steps` of the T timesteps, highest first (Lin et al. 2024, table 2).

        *leading* starts below T, *trailing* starts at T − 1, *linspace* includes both ends; so do
        *quadratic*, evenly in √t (Song et al. 2021, appendix D.2, which ends at 0.8 T), and *logsnr*, evenly
        in log (ᾱ / (1 − ᾱ)) (Lu et al. 2022, §5). These two are dense near 0 and move apart what coincides.
        Raises ScheduleError unless 1 ≤ steps ≤ T. Returns [steps] int64, strictly falling.
        """
        total = self.timesteps
        spacing = spacing or self.timestep_spacing
        if not 1 <= steps <= total:
            raise ScheduleError(f"the number of steps must be from 1 to {total}, got {steps}")
        match spacing:
            case "leading":
                chosen = np.arange(steps, dtype=np.int64) * (total // steps)
                # The offset goes no further than the highest step allows, so that none coincide.
                chosen = (chosen + min(self.steps_offset, total - 1 - int(chosen[-1])))[::-1]
            case "trailing":
                # As diffusers computes it, ties included; arange can run one over by a rounding error.
                chosen = np.round(np.arange(total, 0, -total / steps)[:steps]).astype(np.int64) - 1
            case "linspace":
                chosen = np.round(np.linspace(0, total - 1, steps)).astype(np.int64)[::-1]
            case "quadratic":
                chosen = _apart(np.linspace(0, math.sqrt(total - 1), steps) ** 2, total)
            case "logsnr":
                snr = np.log(self.snr)
                even = np.linspace(snr[0], snr[-1], steps)
                chosen = _apart(np.interp(-even, -snr, np.arange(total)), total)
            case _:
                raise ScheduleError(f"timestep_spacing={spacing!r} is not supported (known: {SPACINGS})")
        return np.ascontiguousarray(chosen)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers `scheduler_config.json`. Raises ScheduleError on what is not supported."""
        if (kind := config.get("_class_name", SCHEDULERS[0])) not in SCHEDULERS:
            raise ScheduleError(f"{kind} is not supported (known: {', '.join(SCHEDULERS)})")
        if config.get("thresholding"):
            raise ScheduleError("thresholding=true is not supported")
        if config.get("rescale_betas_zero_snr"):
            raise ScheduleError("rescale_betas_zero_snr=true is not supported")
        if not config.get("set_alpha_to_one", True):
            raise ScheduleError("set_alpha_to_one=false is not supported")
        clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", True) else math.inf
        predicts_epsilon = config.get("predict_epsilon", True)  # the old form of prediction_type
        return cls(
            betas=_betas_from(config),
            prediction_type=config.get("prediction_type", "epsilon" if predicts_epsilon else "sample"),
            clip=clip,
            variance_type=config.get("variance_type", "fixed_small"),
            timestep_spacing=config.get("timestep_spacing", "leading"),
            steps_offset=int(config.get("steps_offset", 0)),
        )


def _apart(wanted: Array, total: int) -> NDArray[np.int64]:
    """The nearest whole timesteps to `wanted` (rising), moved up or down until no two coincide; falling."""
    chosen = np.round(wanted).astype(np.int64)
    steps = np.arange(len(chosen))
    chosen = np.maximum.accumulate(chosen - steps) + steps  # each at least one above the one before
    chosen = np.minimum(chosen, total - len(chosen) + steps)  # and low enough for those that follow
    return chosen[::-1]


def _betas_from(config: Mapping[str, Any]) -> Array:
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    timesteps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    match config.get("beta_schedule", "linear"):
        case "linear":
            return linear_betas(timesteps, start, end)
        case "scaled_linear":
            return scaled_linear_betas(timesteps, start, end)
        case "squaredcos_cap_v2":
            return cosine_betas(timesteps)
        case other:
            raise ScheduleError(f"beta_schedule={other!r} is not supported")
