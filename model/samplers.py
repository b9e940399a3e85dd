"""Samplers as tables: every sampler is one update with different coefficients.

At step k of its plan a sample at x does

    out = unet(x, t, y)                              where w ≠ 1: out_∅ + w (out_y − out_∅), 2 evaluations,
                                                     times r std(out_y) / std(out) + 1 − r
    x0u = a_x·x + a_o·out + a_g·∇ log p(y | x)
    x0  = clip(x0u)                                  to [−clip, clip], or to a quantile of |x0u|: see below
    x   ← c_x·x + c_0·x0 + c_u·x0u + c_p·x0_prev + c_n·e^(c_v·v)·z
                                                     z ~ N(0, I), x0_prev = the previous step's x0
    x   ← k_0·image + k_n·z′                         where the image's pixels are known

so a sampler is the code that fills in the columns of this table, once per request, in float64. Samples on
different samplers and step counts share a batch, because a row of the table is all that the network call and
the update need to know. Where a paper's update is written with ε, that is (x − √ᾱ·x0u) / √(1 − ᾱ), the
network's own, or the same of the clipped x0, which is why only x and x₀ appear. Coefficients come from ᾱ at
the chosen timesteps, never from re-spaced betas.

Dynamic thresholding (Saharia et al. 2022, §2.3), where q > 0: with s the q-quantile of a sample's |x0u|, at
least 1 and at most `clip`, x0 = clip(x0u) / s to [−s, s].

Chains that do not start from noise are tables too: an edit starts midway, inversion goes up, RePaint's jumps
fold the forward process into a row, and a measurement consists of rows that do not build on one another.

Some solvers do not fit and are left out. The state of a chain is x and one earlier x0, so a solver may look
back by one prediction: second-order multistep methods, and two-stage ones like Heun's (Karras et al. 2022,
algorithm 1), whose first stage is a row and whose second finds the old x again in x and x0_prev. Methods that
combine three predictions (DPM-Solver++(3M), PLMS of fourth order, UniPC of third) would need another latent
for every sample in flight, and high orders are less stable under strong guidance (Lu et al. 2022,
DPM-Solver++, §3). Solvers that choose their steps by an error estimate (DPM-Solver-12, RK45) have no table:
their work is not known in advance, so there could be no ETA, and no deadline could be refused on admission.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from model.betas import NEARLY_NO_SIGNAL
from model.schedule import Array, NoiseSchedule, ScheduleError, Spacing, VarianceType

COLUMNS = tuple("t a_x a_o a_g w r clip q c_x c_0 c_u c_p c_n c_v k_0 k_n".split())  # noqa: SIM905
ROW = np.dtype([(name, np.float64) for name in COLUMNS])
"""A row of a plan: one step of one sample."""
COEFFICIENTS = COLUMNS[1:]
"""The columns that the update computes with, as float32."""
Table = NDArray[np.void]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Plan:
    """All steps of one sample.

    table: [steps] of ROW, so `table["c_x"]` is a column. start: √ᾱ of the sample's first latent, 0 for pure
    noise.
    """

    table: Table
    start: float = 0.0

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def _derived(self) -> _Derived:
        return _derived(self.table.tobytes())

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timestep of each step."""
        return self._derived.timesteps

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Network evaluations that each step costs: 2 where it is guided by a null class, else 1."""
        return self._derived.evaluations

    @property
    def remaining(self) -> tuple[int, ...]:
        """Network evaluations from each step to the end, and 0 after the last: [steps + 1]."""
        return self._derived.remaining

    @cached_property
    def coefficients(self) -> tuple[bytes, ...]:
        """Those of each step as len(COEFFICIENTS) float32: rows of many plans are put together in no time."""
        return _coefficients(self.table.tobytes())

    def unclipped(self) -> Plan:
        """The same without a bound on x₀, so that x0u and x0 are one."""
        table = self.table.copy()
        table["clip"], table["q"] = math.inf, 0.0
        table["c_0"] += table["c_u"]
        table["c_u"] = 0.0
        return replace(self, table=table)


@dataclass(frozen=True)
class _Derived:
    """What a plan's properties say, by step."""

    timesteps: tuple[int, ...]
    evaluations: tuple[int, ...]
    remaining: tuple[int, ...]


@lru_cache(maxsize=256)
def _derived(content: bytes) -> _Derived:
    """The same for equal tables: each request that comes as bytes has a copy of its own."""
    table = np.frombuffer(content, ROW)
    evaluations = tuple(2 if w != 1 else 1 for w in table["w"].tolist())
    return _Derived(
        tuple(int(t) for t in table["t"].tolist()),
        evaluations,
        (*np.cumsum(evaluations[::-1])[::-1].tolist(), 0),
    )


@lru_cache(maxsize=256)
def _coefficients(content: bytes) -> tuple[bytes, ...]:
    values = np.frombuffer(content, np.float64).reshape(-1, len(COLUMNS))
    return tuple(row.tobytes() for row in values[:, 1:].astype(np.float32))


@dataclass(frozen=True)
class Guidance:
    """Guidance towards a class.

    scale: classifier-free, out_∅ + scale (out_y − out_∅) (Ho & Salimans 2022, counted so that 1 is none).
    sigmas: the interval of noise levels σ = √((1 − ᾱ) / ᾱ) in which it is applied (Kynkäänniemi et al. 2024);
    outside, a step costs one evaluation. classifier_scale: weight of the gradient of a noise-aware classifier
    (Dhariwal & Nichol 2021, algorithm 2), in the same interval; 0 is none. rescale: how far the guided output
    gets the deviation of the one with the class, from 0 to 1 (φ of Lin et al. 2024, §3.4).
    """

    scale: float = 1.0
    sigmas: tuple[float, float] = (0.0, math.inf)
    classifier_scale: float = 0.0
    rescale: float = 0.0


@dataclass(frozen=True)
class _Steps:
    """Input of the builders. here, next: ᾱ at each step and after it, each [steps].

    The last of `next` is 1, or the schedule's final ᾱ where a sampler ends there.
    """

    here: Array
    next: Array


@dataclass(frozen=True)
class _Update:
    """Output of the builders: the columns c_x … c_v, each [steps] or the same for all."""

    c_x: Array
    c_0: Array
    c_n: Array
    c_u: Array | float = 0.0
    c_p: Array | float = 0.0
    c_v: Array | float = 0.0


def _ancestral(at: _Steps, variance: VarianceType) -> _Update:
    """DDPM over any subsequence: the posterior mean with the prediction of x₀ (Ho et al. 2020, eq. 7).

    A learned variance lies between the small and the large one, on a logarithmic scale (Nichol & Dhariwal
    2021, eq. 15); the network's output says where. One that is learned without a range is the logarithm
    itself: with v = (output + 1) / 2, σ = e^(output / 2) = e^(v − ½).
    """
    alpha = at.here / at.next
    beta = 1 - alpha
    small = (1 - at.next) / (1 - at.here) * beta
    noise = np.sqrt(beta if variance == "fixed_large" else small)
    noise[-1] = 0.0  # the last step gives x₀ itself
    c_x = np.sqrt(alpha) * (1 - at.next) / (1 - at.here)
    c_0 = np.sqrt(at.next) * beta / (1 - at.here)
    c_v = np.zeros_like(c_x)
    if variance == "learned_range":
        c_v[:-1] = 0.5 * np.log(beta[:-1] / small[:-1])
    elif variance == "learned":
        noise[:-1], c_v[:-1] = math.exp(-0.5), 1.0
    return _Update(c_x, c_0, noise, c_v=c_v)


def _ddim(at: _Steps, eta: float, clipped_eps: Mask) -> _Update:
    """DDIM (Song et al. 2021, eq. 12 and 16): η = 0 is deterministic, η = 1 is DDPM, fixed small.

    √ᾱ' x₀ + √(1 − ᾱ' − σ²) ε + σ z. clipped_eps: the steps [steps] whose ε is that of the clipped x₀ instead
    of the network's.
    """
    sigma = np.zeros_like(at.here)
    if eta:  # without it a step may also go up
        sigma = eta * np.sqrt((1 - at.next) / (1 - at.here) * (1 - at.here / at.next))
    # 1 − ᾱ' − σ² can fall below zero by a rounding error at η = 1 on the last step.
    direction = np.sqrt(np.maximum(1 - at.next - sigma**2, 0))
    c_x = direction / np.sqrt(1 - at.here)
    of_eps = -c_x * np.sqrt(at.here)  # ε's term is c_x·x + of_eps·x₀
    of_clipped = np.where(clipped_eps, of_eps, 0.0)
    return _Update(c_x, np.sqrt(at.next) + of_clipped, sigma, c_u=of_eps - of_clipped)


def _dpmpp_2m(at: _Steps, *, sde: bool) -> _Update:
    """DPM-Solver++(2M) or SDE-DPM-Solver++(2M), the midpoint forms (Lu et al. 2022, alg. 2 and eq. 18).

    The first step is of first order, and so is the last one that ends in x₀ or has fewer than 14 before it,
    as in diffusers.
    """
    # Diffusers, too, has a first step from nearly 0 rather than from ᾱ = 0, whose λ is infinite: where the
    # second step looks back to then makes a difference.
    here = np.where(at.here > 0, at.here, np.minimum(NEARLY_NO_SIGNAL, at.next / 2))
    with np.errstate(divide="ignore"):
        lam, lam_next = (0.5 * np.log(ac / (1 - ac)) for ac in (here, at.next))
    h = lam_next - lam  # infinite on a last step whose result is x₀
    decay = np.exp(-h) if sde else np.ones_like(h)
    c_x = np.sqrt((1 - at.next) / (1 - at.here)) * decay
    phi = -np.sqrt(at.next) * np.expm1(-2 * h if sde else -h)
    half_inverse_r = np.zeros_like(h)  # 1 / 2r with r = h_{i−1} / h_i
    second = len(h) if math.isfinite(h[-1]) and len(h) >= 15 else len(h) - 1
    half_inverse_r[1:second] = h[1:second] / (2 * h[: second - 1])
    noise = np.sqrt((1 - at.next) * -np.expm1(-2 * h)) if sde else np.zeros_like(h)
    return _Update(c_x, phi * (1 + half_inverse_r), noise, c_p=-phi * half_inverse_r)


@dataclass(frozen=True)
class _Options:
    """What only some builders look at."""

    eta: float
    variance: VarianceType
    clipped_eps: Mask


Builder = Callable[[_Steps, _Options], _Update]

SAMPLERS: dict[str, Builder] = {
    "ddpm": lambda at, options: _ancestral(at, options.variance),
    "ddim": lambda at, options: _ddim(at, options.eta, options.clipped_eps),
    "dpmpp_2m": lambda at, _: _dpmpp_2m(at, sde=False),
    "sde_dpmpp_2m": lambda at, _: _dpmpp_2m(at, sde=True),
}
SINGLE_STEP = ("ddpm", "ddim")
"""Samplers whose steps do not look back at x0_prev: only these can be followed by a jump."""


def build_plan(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    variance: VarianceType | None = None,
    spacing: Spacing | None = None,
    timesteps: Sequence[int] | None = None,
    guidance: Guidance = Guidance(),
    strength: float = 1.0,
) -> Plan:
    """Build the table for a sampler (a key of SAMPLERS) over `steps` of the schedule's timesteps.

    eta: DDIM's η in [0, 1]. use_clipped_model_output: DDIM's ε is re-derived from the clipped x₀ in every
    step. It always is in guided ones: guidance drives x₀ far out of range, and where only x₀ is brought back,
    its excess stays in ε, hence in x. variance and spacing default to the schedule's. timesteps: an explicit
    falling sequence instead of `steps` spaced ones. strength: the fraction of the steps that is run, the last
    ones, from an image with noise (SDEdit, Meng et al. 2022); at least one is.
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
    # An ancestral chain ends in x₀ itself, as diffusers' does, whatever the schedule says of the others.
    final = 1.0 if sampler == "ddpm" else schedule.final_alpha_cumprod
    clipped = _guided(here, guidance) | use_clipped_model_output | (not schedule.bounded)
    options = _Options(eta, variance or schedule.variance_type, clipped)
    # Each step ends where the next one begins. diffusers' DDIM ends T // steps lower: with *linspace*, and
    # with *trailing* where that does not divide T, at another timestep (its issue 11347).
    update = builder(_Steps(here, np.append(here[1:], final)), options)
    table = _table(schedule, chosen, guidance, update, np.append(here[1:], 1.0))  # known pixels end exact
    return Plan(table, 0.0 if strength == 1 else math.sqrt(here[0]))


def build_inversion(schedule: NoiseSchedule, steps: int, *, spacing: Spacing | None = None) -> Plan:
    """DDIM run upwards: from an image to the x_T from which η = 0 would generate it (Song et al. 2021, §4.3).

    The image stands for x at the lowest timestep. Nothing is clipped: clipping cannot be undone. Raises
    ScheduleError for an impossible number of steps, 1 included, and for a distilled network.
    """
    if schedule.distilled:
        raise ScheduleError("the network is distilled into steps down: nothing inverts them")
    chosen = schedule.spaced_timesteps(steps, spacing)[::-1]
    rising = np.unique(np.concatenate(([0], chosen)))
    ac = schedule.alphas_cumprod[rising]
    update = _ddim(_Steps(ac[:-1], ac[1:]), 0.0, np.full(len(ac) - 1, True))
    return Plan(_table(schedule, rising[:-1], Guidance(), update, ac[1:]), 1.0).unclipped()


def build_repaint(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    spacing: Spacing | None = None,
    guidance: Guidance = Guidance(),
) -> Plan:
    """RePaint (Lugmayr et al. 2022, algorithm 1 and appendix): down, with jumps back up.

    After every `jump_length` steps the chain goes back up by as many, until that segment has been done
    `jump_n_sample` times, so that new and known pixels come to agree. Going up is the forward process, folded
    into the step before it: x ← √r x + √(1 − r) z with r the ratio of the two ᾱ. The noise of such a step is
    a sum of two, for which a learned variance counts as the small one.
    Raises ValueError for a sampler that looks back (not in SINGLE_STEP) or a jump below 1.
    """
    if sampler not in SINGLE_STEP:
        raise ValueError(f"jumps need a sampler of {', '.join(SINGLE_STEP)}, not {sampler}")
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError("jump_length and jump_n_sample must be at least 1")
    down = build_plan(
        schedule,
        sampler,
        steps,
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        spacing=spacing,
        guidance=guidance,
    )
    levels = np.append(1.0, schedule.alphas_cumprod[list(down.timesteps)][::-1])  # ᾱ; 0 is the image
    left = dict.fromkeys(range(0, len(down) - jump_length, jump_length), jump_n_sample - 1)
    table, level = [], len(down)
    while level:
        row = down.table[len(down) - level].copy()
        level -= 1
        if left.get(level, 0) > 0:
            left[level] -= 1
            ratio = levels[level + jump_length] / levels[level]
            for name in ("c_x", "c_0", "c_u", "c_p"):
                row[name] *= math.sqrt(ratio)
            row["c_n"], row["c_v"] = math.sqrt(ratio * row["c_n"] ** 2 + 1 - ratio), 0.0
            level += jump_length
            row["k_0"], row["k_n"] = math.sqrt(levels[level]), math.sqrt(1 - levels[level])
        table.append(row)
    return Plan(np.array(table, ROW))


def repaint_steps(steps: int, jump_length: int, jump_n_sample: int) -> int:
    """How long the plan of `build_repaint` would be, without building it."""
    jumps = len(range(0, steps - jump_length, jump_length)) * (jump_n_sample - 1)
    return steps + jumps * jump_length


def build_measurement(schedule: NoiseSchedule, timesteps: Sequence[int]) -> Plan:
    """Steps that each evaluate the network on the same image at another timestep.

    All pixels are known, so after each step x is the forward process's at the next step's timestep, with
    fresh noise. What counts is the x₀ prediction of each step (model/likelihood.py). Raises ValueError for
    timesteps outside [0, T), ScheduleError for a distilled network, whose x₀ prediction is no mean of x₀.
    """
    if schedule.distilled:
        raise ScheduleError("the network is distilled: its predictions bound no likelihood")
    chosen = np.asarray(timesteps, np.int64)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= schedule.timesteps:
        raise ValueError(f"timesteps must lie in [0, {schedule.timesteps})")
    ac = schedule.alphas_cumprod[chosen]
    nothing = _Update(*np.zeros((3, len(chosen))))
    table = _table(schedule, chosen, Guidance(), nothing, np.append(ac[1:], 1.0))
    return Plan(table, math.sqrt(ac[0]))


def _guided(ac: Array, guidance: Guidance) -> Mask:
    """The steps, of this ᾱ, in which either kind of guidance applies."""
    low, high = guidance.sigmas
    with np.errstate(divide="ignore"):  # σ is infinite where there is no signal at all
        sigma = np.sqrt((1 - ac) / ac)
    return (low <= sigma) & (sigma <= high) & (guidance.scale != 1 or guidance.classifier_scale != 0)


def _table(
    schedule: NoiseSchedule, chosen: NDArray[np.int64], guidance: Guidance, update: _Update, after: Array
) -> Table:
    """The rows at these timesteps. after: ᾱ at the end of each step."""
    a_x, a_o = schedule.x0_coefficients
    ac = schedule.alphas_cumprod[chosen]
    guided = _guided(ac, guidance)
    table = np.empty(len(chosen), ROW)
    table["t"] = chosen
    table["a_x"], table["a_o"] = a_x[chosen], a_o[chosen]
    # x₀ = (x + (1 − ᾱ) ∇ log p(x)) / √ᾱ (Tweedie), so a term of the score moves it by (1 − ᾱ) / √ᾱ. Where
    # ᾱ is 0, x says nothing of the class.
    moved = np.divide(1 - ac, np.sqrt(ac), out=np.zeros_like(ac), where=ac > 0)
    table["a_g"] = np.where(guided, guidance.classifier_scale * moved, 0.0)
    table["w"] = np.where(guided, guidance.scale, 1.0)
    table["r"] = np.where(table["w"] != 1, guidance.rescale, 0.0)
    table["clip"], table["q"] = schedule.clip, schedule.dynamic_thresholding_ratio
    for field in fields(update):
        table[field.name] = getattr(update, field.name)
    table["k_0"], table["k_n"] = np.sqrt(after), np.sqrt(1 - after)
    return table
