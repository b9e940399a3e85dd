"""Samplers as tables: every sampler is one update with different coefficients.

At row k of its plan a sample at x does

    out = unet(x, t, y)                              two rows where w ≠ 1: out = out_∅ + w (out_y − out_∅)
    x0  = clip(a_x·x + a_o·out + a_g·∇ log p(y | x))
    x   ← c_x·x + c_0·x0 + c_p·x0_prev + c_n·e^(c_v·v)·z        z ~ N(0, I), x0_prev = the previous row's x0
    x   ← k_0·image + k_n·z′                          where the image's pixels are known

so a sampler is the code that fills in [rows, (t, a_x, a_o, a_g, w, c_x, c_0, c_p, c_n, c_v, k_0, k_n)], once
per request, in float64. Samples on different samplers and step counts share a batch, because a row is all the
network call and the update need to know. Where a paper's update is written with ε, ε is re-derived from
the clipped x₀ (as improved-diffusion does), which is why only x and x₀ appear. Coefficients come from
ᾱ at the chosen timesteps, never from re-spaced betas.

What is not a generated image from noise is a table too: an edit starts midway, inversion goes up, RePaint's
jumps fold the forward process into a row, and an image is scored by rows that forget what they made.

What does not fit is left out. The state of a chain is x and one earlier x0, so a solver may look back one
guess: second-order multistep methods, and two-stage ones like Heun's (Karras et al. 2022, algorithm 1), whose
first stage is a row and whose second finds the old x again in x and x0_prev. Methods that combine three
guesses (DPM-Solver++(3M), PLMS of fourth order, UniPC of third) would need another latent for every sample in
the house, and high orders are the less stable the stronger the guidance (Lu et al. 2022, DPM-Solver++, §3).
Solvers that choose their steps by an estimate of the error (DPM-Solver-12, RK45) have no table: their work is
not known before it is done, and with it go the ETA and the deadlines refused at the door.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.diffusion import x0_coefficients
from model.schedule import Array, NoiseSchedule, Spacing, VarianceType

T, A_X, A_O, A_G, W, C_X, C_0, C_P, C_N, C_V, K_0, K_N = range(12)
COLUMNS = 12


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler's whole course for one sample.

    table: [rows, COLUMNS] float64, columns T … K_N as above; clip: bound on |x₀|, infinity for none; start:
    √ᾱ where it begins, 0 for noise; probe: its guesses are to be measured, not to become an image.
    """

    table: Array
    clip: float
    start: float = 0.0
    probe: bool = False

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """The timestep of each row."""
        return tuple(int(t) for t in self.table[:, T])

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Rows of the network call that each row costs."""
        return tuple(2 if w != 1 else 1 for w in self.table[:, W])

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Rows of network calls still to be done before each row, and 0 after the last."""
        return (*np.cumsum(self.rows[::-1])[::-1].tolist(), 0)


@dataclass(frozen=True)
class Guidance:
    """How a chain is drawn towards its class.

    scale: classifier-free, out_∅ + scale (out_y − out_∅) (Ho & Salimans 2022, counted so that 1 is none).
    sigmas: the interval of noise levels σ = √((1 − ᾱ) / ᾱ) in which it is applied (Kynkäänniemi et al. 2024);
    outside, a step costs one row. classifier_scale: of the gradient of a noise-aware classifier (Dhariwal &
    Nichol 2021, algorithm 2), in the same interval; 0 is none.
    """

    scale: float = 1.0
    sigmas: tuple[float, float] = (0.0, math.inf)
    classifier_scale: float = 0.0


@dataclass(frozen=True)
class _Steps:
    """What builders share: per row, ᾱ here and at the next row's timestep (1 after the last). Each [rows]."""

    here: Array
    next: Array


@dataclass(frozen=True)
class _Update:
    """What builders give: the columns C_X … C_V, each [rows]."""

    c_x: Array
    c_0: Array
    c_p: Array
    c_n: Array
    c_v: Array


def _ancestral(at: _Steps, variance: VarianceType) -> _Update:
    """DDPM over any subsequence: the posterior mean with the guess for x₀ (Ho et al. 2020, eq. 7).

    A learned variance lies between the small and the large one, on a logarithmic scale (Nichol & Dhariwal
    2021, eq. 15): the network says where.
    """
    alpha = at.here / at.next
    beta = 1 - alpha
    small = (1 - at.next) / (1 - at.here) * beta
    noise = np.sqrt(beta if variance == "fixed_large" else small)
    noise[-1] = 0.0  # the last row gives x₀ itself
    c_x = np.sqrt(alpha) * (1 - at.next) / (1 - at.here)
    c_0 = np.sqrt(at.next) * beta / (1 - at.here)
    c_v = np.zeros_like(c_x)
    if variance == "learned_range":
        c_v[:-1] = 0.5 * np.log(beta[:-1] / small[:-1])
    return _Update(c_x, c_0, np.zeros_like(c_x), noise, c_v)


def _ddim(at: _Steps, eta: float) -> _Update:
    """DDIM (Song et al. 2021, eq. 12 and 16): η = 0 is deterministic, η = 1 is DDPM, fixed small."""
    sigma = np.zeros_like(at.here)
    if eta:  # without it a row may also go up
        sigma = eta * np.sqrt((1 - at.next) / (1 - at.here) * (1 - at.here / at.next))
    # 1 − ᾱ' − σ² can fall below zero by a rounding error at η = 1 on the last row.
    direction = np.sqrt(np.maximum(1 - at.next - sigma**2, 0))
    c_x = direction / np.sqrt(1 - at.here)
    c_0 = np.sqrt(at.next) - c_x * np.sqrt(at.here)
    return _Update(c_x, c_0, np.zeros_like(c_x), sigma, np.zeros_like(c_x))


def _dpmpp_2m(at: _Steps, *, sde: bool) -> _Update:
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
    return _Update(c_x, phi * (1 + half_inverse_r), -phi * half_inverse_r, noise, np.zeros_like(h))


Builder = Callable[[_Steps, float, VarianceType], _Update]

SAMPLERS: dict[str, Builder] = {
    "ddpm": lambda at, _eta, variance: _ancestral(at, variance),
    "ddim": lambda at, eta, _variance: _ddim(at, eta),
    "dpmpp_2m": lambda at, _eta, _variance: _dpmpp_2m(at, sde=False),
    "sde_dpmpp_2m": lambda at, _eta, _variance: _dpmpp_2m(at, sde=True),
}
ONE_STEP = ("ddpm", "ddim")
"""Samplers whose rows look at nothing but x: only they can be followed by a jump."""


def build_plan(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    variance: VarianceType | None = None,
    spacing: Spacing | None = None,
    timesteps: Sequence[int] | None = None,
    guidance: Guidance = Guidance(),
    strength: float = 1.0,
) -> Plan:
    """Build the table for a sampler (a key of SAMPLERS) over `steps` of the schedule's timesteps.

    eta: DDIM's η in [0, 1]. variance and spacing default to the schedule's. timesteps: an explicit falling
    sequence instead of `steps` spaced ones. strength: the share of the steps that is done, the last ones,
    from an image with noise (SDEdit, Meng et al. 2022); at least one is.
    Raises KeyError for an unknown sampler, ScheduleError for an impossible number of steps, ValueError for an
    η outside [0, 1], a strength outside (0, 1] or timesteps not falling in [0, T).
    """
    builder = SAMPLERS[sampler]
    chosen = (
        schedule.spaced_timesteps(steps, spacing) if timesteps is None else np.asarray(timesteps, np.int64)
    )
    if not len(chosen) or (np.diff(chosen) >= 0).any() or chosen[-1] < 0 or chosen[0] >= schedule.timesteps:
        raise ValueError(f"timesteps must fall strictly within [0, {schedule.timesteps})")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    chosen = chosen[len(chosen) - max(1, round(len(chosen) * strength)) :]
    here = schedule.alphas_cumprod[chosen]
    at = _Steps(here, np.append(here[1:], 1.0))
    update = builder(at, eta, variance or schedule.variance_type)
    table = _table(schedule, chosen, guidance, update, at.next)
    return Plan(table, schedule.clip, 0.0 if strength == 1 else math.sqrt(here[0]))


def build_inversion(schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None) -> Plan:
    """DDIM run upwards: from an image to the x_T that η = 0 would make it of (Song et al. 2021, §4.3).

    The image stands for x at the lowest timestep. Nothing is clipped: that could not be undone. Raises
    ScheduleError for an impossible number of steps, 1 included.
    """
    chosen = schedule.spaced_timesteps(steps, spacing)[::-1]
    rising = np.unique(np.concatenate(([0], chosen)))
    ac = schedule.alphas_cumprod[rising]
    update = _ddim(_Steps(ac[:-1], ac[1:]), 0.0)
    return Plan(_table(schedule, rising[:-1], Guidance(), update, ac[1:]), math.inf, 1.0)


def build_repaint(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float = 0.0,
    spacing: Spacing | None = None,
    guidance: Guidance = Guidance(),
) -> Plan:
    """RePaint's course (Lugmayr et al. 2022, algorithm 1 and appendix): down, with jumps back up.

    After every `jump_length` steps it goes back up by as many, until that stretch has been done
    `jump_n_sample` times, so that what is made and what is known come to agree. Going up is the forward
    process, folded into the row before it: x ← √r x + √(1 − r) z with r the ratio of the two ᾱ. A learned
    variance is the small one in such a row, whose noise is a sum of two.
    Raises ValueError for a sampler that looks back (it is not in ONE_STEP) or a jump below 1.
    """
    if sampler not in ONE_STEP:
        raise ValueError(f"jumps need a sampler of {', '.join(ONE_STEP)}, not {sampler}")
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError("jump_length and jump_n_sample must be at least 1")
    down = build_plan(schedule, sampler, steps, eta=eta, spacing=spacing, guidance=guidance)
    levels = np.append(1.0, schedule.alphas_cumprod[list(down.timesteps)][::-1])  # ᾱ; 0 is the image
    left = dict.fromkeys(range(0, len(down) - jump_length, jump_length), jump_n_sample - 1)
    table, level = [], len(down)
    while level:
        row = down.table[len(down) - level].copy()
        level -= 1
        if left.get(level, 0) > 0:
            left[level] -= 1
            ratio = levels[level + jump_length] / levels[level]
            row[[C_X, C_0, C_P]] *= math.sqrt(ratio)
            row[C_N], row[C_V] = math.sqrt(ratio * row[C_N] ** 2 + 1 - ratio), 0.0
            level += jump_length
            row[[K_0, K_N]] = math.sqrt(levels[level]), math.sqrt(1 - levels[level])
        table.append(row)
    return Plan(np.stack(table), schedule.clip)


def repaint_rows(steps: int, jump_length: int, jump_n_sample: int) -> int:
    """How many rows `build_repaint` makes of so many steps, without making them."""
    jumps = len(range(0, steps - jump_length, jump_length)) * (jump_n_sample - 1)
    return steps + jumps * jump_length


def build_probe(schedule: NoiseSchedule, timesteps: Sequence[int]) -> Plan:
    """Rows that each ask the network about an image at another timestep and then forget the answer.

    With every pixel known, x is after each row the forward process's at the next row's timestep, with fresh
    noise; the guesses x₀ are what is looked at (model/likelihood.py). Raises ValueError for timesteps outside
    [0, T).
    """
    chosen = np.asarray(timesteps, np.int64)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= schedule.timesteps:
        raise ValueError(f"timesteps must lie in [0, {schedule.timesteps})")
    ac = schedule.alphas_cumprod[chosen]
    nothing = _Update(*np.zeros((5, len(chosen))))
    table = _table(schedule, chosen, Guidance(), nothing, np.append(ac[1:], 1.0))
    return Plan(table, schedule.clip, math.sqrt(ac[0]), probe=True)


def _table(
    schedule: NoiseSchedule, chosen: NDArray[np.int64], guidance: Guidance, update: _Update, after: Array
) -> Array:
    """The rows at these timesteps. after: ᾱ at the end of each row."""
    a_x, a_o = x0_coefficients(schedule)
    ac = schedule.alphas_cumprod[chosen]
    low, high = guidance.sigmas
    sigma = np.sqrt((1 - ac) / ac)
    inside = (low <= sigma) & (sigma <= high)
    # x₀ = (x + (1 − ᾱ) ∇ log p(x)) / √ᾱ (Tweedie), so a term of the score moves it by (1 − ᾱ) / √ᾱ.
    a_g = np.where(inside, guidance.classifier_scale * (1 - ac) / np.sqrt(ac), 0.0)
    w = np.where(inside, guidance.scale, 1.0)
    columns = (
        chosen.astype(np.float64),
        a_x[chosen],
        a_o[chosen],
        a_g,
        w,
        update.c_x,
        update.c_0,
        update.c_p,
        update.c_n,
        update.c_v,
        np.sqrt(after),
        np.sqrt(1 - after),
    )
    return np.stack(columns, axis=1)
