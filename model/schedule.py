"""Noise schedules: β, ᾱ and what follows from them, in float64.

q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) with ᾱ_t = ∏_{s≤t} (1 − β_s)   (Ho et al. 2020, eq. 4).
Timesteps count from 0, so β_0 is the paper's β_1, and ᾱ before timestep 0 is 1. What a diffusers scheduler
config says is read in model/scheduler_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.betas import NEARLY_NO_SIGNAL, Array, ScheduleError, cosine_betas, linear_betas
from model.scheduler_config import read

__all__ = ["Array", "NoiseSchedule", "ScheduleError", "cosine_betas", "linear_betas"]

PredictionType = Literal["epsilon", "v_prediction", "sample", "posterior_mean"]
VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr"]
DataRange = tuple[float, float]
"""What pixel values 0 and 255 are to the network."""

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "posterior_mean")
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_small", "fixed_large", "learned", "learned_range")
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace", "quadratic", "logsnr")
DATA_RANGE: DataRange = (-1.0, 1.0)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The forward process, and what the checkpoint says about reversing it.

    betas: [T] float64 in (0, 1); the last may be 1, and nothing is left of x_0 then (ᾱ_T = 0).
    `prediction_type` is what the network's output means. `clip` bounds the x₀ prediction to [−clip, clip];
    infinity leaves it alone. dynamic_thresholding_ratio: where above 0, that quantile of each sample's |x₀|
    bounds it instead, at least 1 and at most `clip` (Saharia et al. 2022, §2.3). `variance_type` and
    `timestep_spacing` are the checkpoint's defaults for sampling. spare_timestep: *leading* and *linspace*
    then choose one timestep more and leave out the lowest, as diffusers' multistep solvers do.
    set_alpha_to_one: sampling ends at ᾱ = 1, else at ᾱ_0. data_range: what pixel values 0 and 255 are to the
    network. timestep_scale: what a timestep is multiplied by before the network sees it. distilled_guidance:
    of a student that takes each of the T timesteps in one evaluation, the guidance scale folded into it.
    guidance_scale, guidance_rescale: what it is sampled with where it is guided; None where it does not say.
    """

    betas: Array
    prediction_type: PredictionType = "epsilon"
    clip: float = 1.0
    variance_type: VarianceType = "fixed_small"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    dynamic_thresholding_ratio: float = 0.0
    spare_timestep: bool = False
    set_alpha_to_one: bool = True
    data_range: DataRange = DATA_RANGE
    timestep_scale: float = 1.0
    distilled_guidance: float | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ScheduleError("betas must be one row of numbers between 0 and 1")
        if (betas[:-1] == 1).any():
            raise ScheduleError(
                "betas must be below 1 but for the last: nothing would be left of x_0 before it"
            )
        if self.steps_offset < 0 or not self.clip > 0:
            raise ScheduleError(f"steps_offset={self.steps_offset} and clip={self.clip} must not be negative")
        if not 0 <= self.dynamic_thresholding_ratio <= 1:
            ratio = self.dynamic_thresholding_ratio
            raise ScheduleError(f"dynamic_thresholding_ratio={ratio} must be from 0 to 1")
        low, high = self.data_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ScheduleError(
                f"data_range={list(self.data_range)} must be two numbers, the lower one first"
            )
        if not 0 < self.timestep_scale < math.inf:
            raise ScheduleError(f"timestep_scale={self.timestep_scale} must be a number above 0")
        folded = self.distilled_guidance
        if folded is not None and not 0 <= folded < math.inf:
            raise ScheduleError(f"distilled_guidance={folded} must be a number of at least 0")
        if not 0 <= (self.guidance_scale or 0) <= 100 or not 0 <= (self.guidance_rescale or 0) <= 1:
            raise ScheduleError("guidance_scale must be from 0 to 100, and guidance_rescale from 0 to 1")
        for name, allowed in (
            ("prediction_type", PREDICTION_TYPES),
            ("variance_type", VARIANCE_TYPES),
            ("timestep_spacing", SPACINGS),
        ):
            if getattr(self, name) not in allowed:
                raise ScheduleError(f"{name}={getattr(self, name)!r} is not supported (known: {allowed})")
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ScheduleError(
                "prediction_type='epsilon' cannot go with ᾱ_T = 0 (rescale_betas_zero_snr): at pure noise it"
                " says nothing of x₀, and diffusers divides by zero; such networks predict v"
            )

    @property
    def timesteps(self) -> int:
        """T, the length of the forward process."""
        return len(self.betas)

    @property
    def bounded(self) -> bool:
        """Whether the x₀ prediction is clipped or thresholded."""
        return self.clip < math.inf or self.dynamic_thresholding_ratio > 0

    @property
    def distilled(self) -> bool:
        """Whether the network is a student of few evaluations: no other steps, no score, no likelihood."""
        return self.distilled_guidance is not None

    @property
    def learned_variance(self) -> bool:
        """Whether the network predicts the variance, in the second half of its output."""
        return self.variance_type in ("learned", "learned_range")

    @property
    def final_alpha_cumprod(self) -> float:
        """ᾱ that sampling ends at: 1, or ᾱ_0."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    @cached_property
    def alphas_cumprod(self) -> Array:
        """ᾱ_t: [T] float64, falling from nearly 1 towards 0, which the last may be."""
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

    @property
    def decoder_variance(self) -> float:
        """Variance of p(x_0 | x_1), whose β̃ would be 0: the next timestep's, as Ho et al. 2020 have it.

        With a single timestep there is no next one; then β_0, the only other choice of §3.2.
        """
        return float(self.posterior_variance("fixed_small")[1] if self.timesteps > 1 else self.betas[0])

    def spaced_timesteps(self, steps: int, spacing: Spacing | None = None) -> NDArray[np.int64]:
        """Choose `steps` of the T timesteps, highest first (Lin et al. 2024, table 2).

        *leading* starts below T, *trailing* starts at T − 1, *linspace* includes both ends; so do
        *quadratic*, evenly in √t (Song et al. 2021, appendix D.2, which ends at 0.8 T), and *logsnr*, evenly
        in log (ᾱ / (1 − ᾱ)) (Lu et al. 2022, §5). These two are dense near 0 and move apart what coincides.
        Raises ScheduleError unless 1 ≤ steps ≤ T. Returns [steps] int64, strictly falling.
        """
        total = self.timesteps
        spacing = spacing or self.timestep_spacing
        spare = int(self.spare_timestep and steps < total)
        if not 1 <= steps <= total:
            raise ScheduleError(f"the number of steps must be from 1 to {total}, got {steps}")
        match spacing:
            case "leading":
                chosen = np.arange(spare, steps + spare, dtype=np.int64) * (total // (steps + spare))
                # The offset goes no further than the highest step allows, so that none coincide.
                chosen = (chosen + min(self.steps_offset, total - 1 - int(chosen[-1])))[::-1]
            case "trailing":
                # As diffusers computes it, ties included; arange can run one over by a rounding error.
                chosen = np.round(np.arange(total, 0, -total / steps)[:steps]).astype(np.int64) - 1
            case "linspace":
                chosen = np.round(np.linspace(0, total - 1, steps + spare)).astype(np.int64)[spare:][::-1]
            case "quadratic":
                chosen = _apart(np.linspace(0, math.sqrt(total - 1), steps) ** 2, total)
            case "logsnr":
                snr = np.where(
                    self.snr > 0, self.snr, NEARLY_NO_SIGNAL
                )  # 0 is at no distance from the others
                snr = np.minimum.accumulate(np.log(snr))
                even = np.linspace(snr[0], snr[-1], steps)
                chosen = _apart(np.interp(-even, -snr, np.arange(total)), total)
            case _:
                raise ScheduleError(f"timestep_spacing={spacing!r} is not supported (known: {SPACINGS})")
        return np.ascontiguousarray(chosen)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers `scheduler_config.json`. Raises ScheduleError on what is not supported."""
        return cls(**read(config))


def _apart(wanted: Array, total: int) -> NDArray[np.int64]:
    """The nearest whole timesteps to `wanted` (rising), moved up or down until no two coincide; falling."""
    chosen = np.round(wanted).astype(np.int64)
    steps = np.arange(len(chosen))
    chosen = np.maximum.accumulate(chosen - steps) + steps  # each at least one above the one before
    chosen = np.minimum(chosen, total - len(chosen) + steps)  # and low enough for those that follow
    return chosen[::-1]
