"""Samplers as tables: every sampler is one update with different coefficients.

At row k of its plan a sample at x does

    out = unet(x, t, y)
    x0  = clip(a_x·x + a_o·out)
    x   ← c_x·x + c_0·x0 + c_p·x0_prev + c_n·z        z ~ N(0, I), x0_prev = the previous row's x0

so a sampler is the code that fills in [rows, (t, a_x, a_o, c_x, c_0, c_p, c_n)], once per request, in
float64. Samples on different samplers and step counts share a batch, because a row is all the
network call and the update need to know. Where a paper's update is written with ε, ε is re-derived from
the clipped x₀ (as improved-diffusion does), which is why only x and x₀ appear. Coefficients come from
ᾱ at the chosen timesteps, never from re-spaced betas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from model.diffusion import x0_coefficients
from model.schedule import Array, NoiseSchedule, Spacing, VarianceType

T, A_X, A_O, C_X, C_0, C_P, C_N = range(7)


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler's whole course for one sample.

    table: [rows, 7] float64, columns T … C_N as above; clip: bound on |x₀|, infinity for none.
    """

    table: Array
    clip: float

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """The timestep of each row."""
        return tuple(int(t) for t in self.table[:, T])


@dataclass(frozen=True)
class _Steps:
    """What builders share: per row, ᾱ here and at the next row's timestep (1 after the last). Each [rows]."""

    here: Array
    next: Array


def _ancestral(at: _Steps, variance: VarianceType) -> tuple[Array, Array, Array, Array]:
    """DDPM over any subsequence: the posterior mean with the guess for x₀ (Ho et al. 2020, eq. 7)."""
    alpha = at.here / at.next
    beta = 1 - alpha
    small = (1 - at.next) / (1 - at.here) * beta
    noise = np.sqrt(beta if variance == "fixed_large" else small)
    noise[-1] = 0.0  # the last row gives x₀ itself
    c_x = np.sqrt(alpha) * (1 - at.next) / (1 - at.here)
    c_0 = np.sqrt(at.next) * beta / (1 - at.here)
    return c_x, c_0, np.zeros_like(c_x), noise


def _ddim(at: _Steps, eta: float) -> tuple[Array, Array, Array, Array]:
    """DDIM (Song et al. 2021, eq. 12 and 16): η = 0 is deterministic, η = 1 is DDPM, fixed small."""
    sigma = eta * np.sqrt((1 - at.next) / (1 - at.here) * (1 - at.here / at.next))
    # 1 − ᾱ' − σ² can fall below zero by a rounding error at η = 1 on the last row.
    direction = np.sqrt(np.maximum(1 - at.next - sigma**2, 0))
    c_x = direction / np.sqrt(1 - at.here)
    c_0 = np.sqrt(at.next) - c_x * np.sqrt(at.here)
    return c_x, c_0, np.zeros_like(c_x), sigma


def _dpmpp_2m(at: _Steps, *, sde: bool) -> tuple[Array, Array, Array, Array]:
    """DPM-Solver++(2M) or SDE-DPM-Solver++(2M), the midpoint forms (Lu et al. 2022, alg. 2 and eq. 18).

    The first and last rows are of first order.
    """
    with np.errstate(divide="ignore"):
        lam, lam_next = (0.5 * np.log(ac / (1 - ac)) for ac in (at.here, at.next))
    h = lam_next - lam  # infinite on the last row, which is the x₀ guess
    decay = np.exp(-h) if sde else np.ones_like(h)
    c_x = np.sqrt((1 - at.next) / (1 - at.here)) * decay
    phi = -np.sqrt(at.next) * np.expm1(-2 * h if sde else -h)
    half_inverse_r = np.zeros_like(h)  # 1 / 2r with r = h_{i−1} / h_i
    half_inverse_r[1:-1] = h[1:-1] / (2 * h[:-2])
    noise = np.sqrt((1 - at.next) * -np.expm1(-2 * h)) if sde else np.zeros_like(h)
    return c_x, phi * (1 + half_inverse_r), -phi * half_inverse_r, noise


Builder = Callable[[_Steps, float, VarianceType], tuple[Array, Array, Array, Array]]

SAMPLERS: dict[str, Builder] = {
    "ddpm": lambda at, _eta, variance: _ancestral(at, variance),
    "ddim": lambda at, eta, _variance: _ddim(at, eta),
    "dpmpp_2m": lambda at, _eta, _variance: _dpmpp_2m(at, sde=False),
    "sde_dpmpp_2m": lambda at, _eta, _variance: _dpmpp_2m(at, sde=True),
}


def build_plan(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    variance: VarianceType | None = None,
    spacing: Spacing | None = None,
    timesteps: Sequence[int] | None = None,
) -> Plan:
    """Build the table for a sampler (a key of SAMPLERS) over `steps` of the schedule's timesteps.

    eta: DDIM's η in [0, 1]. variance and spacing default to the schedule's. timesteps: an explicit falling
    sequence instead of `steps` spaced ones. Raises KeyError for an unknown sampler, ScheduleError for an
    impossible number of steps, ValueError for an η outside [0, 1] or timesteps not falling in [0, T).
    """
    builder = SAMPLERS[sampler]
    chosen = (
        schedule.spaced_timesteps(steps, spacing) if timesteps is None else np.asarray(timesteps, np.int64)
    )
    if not len(chosen) or (np.diff(chosen) >= 0).any() or chosen[-1] < 0 or chosen[0] >= schedule.timesteps:
        raise ValueError(f"timesteps must fall strictly within [0, {schedule.timesteps})")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    here = schedule.alphas_cumprod[chosen]
    at = _Steps(here, np.append(here[1:], 1.0))
    a_x, a_o = x0_coefficients(schedule)
    columns = (chosen.astype(np.float64), a_x[chosen], a_o[chosen])
    updates = builder(at, eta, variance or schedule.variance_type)
    return Plan(np.stack([*columns, *updates], axis=1), schedule.clip)
