"""What an image costs under the model, from the terms of the variational bound, in bits per dimension.

−log₂ p(x₀) ≤ L_T + Σ_t L_t (Ho et al. 2020, eq. 5), of which `diffusion.vlb_terms` gives single terms from a
network call each, and L_T is known in closed form. Every term is an unbiased estimate of its expectation from
one draw of noise. All T of them give the sum as it is for that noise; a subset gives an unbiased estimate of
it, with a standard error: t = 0, which is the largest, and from each of some strata of the other timesteps
two draws or more.

The same terms say what each bit buys (§4.3 and Fig. 5). Whoever holds x_t has paid L_T and the terms of the
higher timesteps for it, the rate, and can guess x₀ with an error, the distortion. Those are rates of a code
in this sense: to send one sample of q to a receiver who holds p takes KL(q ‖ p) bits in expectation and a
logarithmic overhead, by minimal random coding (Harsha et al. 2007; Havasi et al. 2019) or relative entropy
coding (Flamich et al. 2020). Nothing is encoded here: the figures are those of the bound, for one draw of
noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.noise import NoiseStream
from model.schedule import NoiseSchedule

Floats = NDArray[np.float64]
Timesteps = NDArray[np.int64]

DEFAULT_TERMS = 100
FEWEST_TERMS = 3
"""Of a subset: t = 0, and two draws that differ by how much is not known."""
LEVELS = 127.5
"""Grey levels in a distance of 1 between pixels in [-1, 1]."""


def strata(total: int, terms: int) -> Timesteps:
    """Where the strata of a subset of `terms` of `total` timesteps begin: [H + 1], rising from 1 to `total`.

    Evenly in log t, since the terms fall about like a power of t (Nichol & Dhariwal 2021, Fig. 2), and so
    that the strata vary alike; each has two timesteps at least. Raises ValueError unless FEWEST_TERMS ≤ terms
    < total.
    """
    if not FEWEST_TERMS <= terms < total:
        raise ValueError(f"a subset of {total} timesteps has from {FEWEST_TERMS} to {total - 1}, not {terms}")
    count = (terms - 1) // 2
    place = np.arange(count + 1)
    edges = np.rint(np.geomspace(1, total, count + 1)).astype(np.int64)
    edges = np.maximum.accumulate(edges - 2 * place) + 2 * place
    return np.minimum(edges, total - 2 * (count - place))


def choose_timesteps(total: int, terms: int, seed: int) -> Timesteps:
    """The timesteps to ask about, highest first: all of them, or a subset drawn by `seed`.

    0 is always among them. Of each stratum there are two, of the last one three where `terms` is even. The
    same arguments give the same timesteps on every machine. Returns [min(terms, total)] int64; raises as
    `strata`.
    """
    if terms >= total:
        return np.arange(total)[::-1]
    edges = strata(total, terms)
    rank = np.random.Philox(key=seed, counter=[0, 0, 0, NoiseStream.TIMESTEPS]).random_raw(total)
    chosen = [np.zeros(1, np.int64)]
    for place, (start, end) in enumerate(pairwise(edges)):
        draws = 3 if terms % 2 == 0 and place == len(edges) - 2 else 2
        chosen.append(start + np.argsort(rank[start:end], kind="stable")[:draws])
    return np.sort(np.concatenate(chosen))[::-1]


def stretches(timesteps: ArrayLike, count: int) -> list[list[int]]:
    """Timesteps cut into `count` stretches of one length, or one less, so that they can be asked at once."""
    return [part.tolist() for part in np.array_split(np.asarray(timesteps, np.int64), count)]


def prior_bits(schedule: NoiseSchedule, x0: ArrayLike) -> float:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension. x0: one image, in [-1, 1]."""
    last = float(schedule.alphas_cumprod[-1])
    square = float(np.square(np.asarray(x0, np.float64)).mean())
    return 0.5 * (-math.log1p(-last) - last + last * square) / math.log(2)


def continuous_rate(
    schedule: NoiseSchedule, prior: float, timesteps: Sequence[int], mse: Sequence[float]
) -> float:
    """What L_T and the bound's terms above t = 0 would come to in ever finer steps, in bits per dimension.

    L_T + ½ ∫ E‖x₀ − x̂₀‖² dSNR between the same noise levels (Kingma et al. 2021, eq. 18), by the trapezoidal
    rule in log SNR over the errors mse at some timesteps, both [n]. A chain of T steps pays more, as every
    step is priced by the error at its noisier end; by how much, most of it near t = 0, this tells.
    """
    order = np.argsort(timesteps)
    snr = schedule.snr[np.asarray(timesteps)[order]]
    height = 0.5 * snr * np.asarray(mse, np.float64)[order]
    return prior + float(np.trapezoid(height, -np.log(snr))) / math.log(2)


def rmse(mse: ArrayLike) -> Floats:
    """Mean squared errors of x₀ in [-1, 1] as root mean square errors in levels of 255."""
    return LEVELS * np.sqrt(np.asarray(mse, np.float64))


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of one image, in bits per dimension.

    prior: L_T. terms: L_t for every timestep, [T]; where it was not asked for, the mean of its stratum.
    standard_error: of the choice of timesteps, the noise being what it is; 0 when all were asked for.
    """

    prior: float
    terms: Floats
    standard_error: float

    @property
    def bits_per_dim(self) -> float:
        """The whole bound."""
        return self.prior + float(self.terms.sum())

    @cached_property
    def rates(self) -> Floats:
        """What x_t costs, for every timestep t: [T], falling with t; the whole bound less L_0 at t = 0."""
        higher = np.cumsum(self.terms[::-1])[::-1] - self.terms
        return self.prior + higher


def estimate(total: int, prior: float, timesteps: Sequence[int], bits: Sequence[float]) -> Bound:
    """The bound from the terms of all `total` timesteps, or of those that `choose_timesteps` gave.

    timesteps, bits: [n], in any order. The variance is that of a stratified sample without replacement,
    Σ N (N − n) s² / n (Cochran 1977, eq. 5.13), s² being the sample variance in a stratum. Raises ValueError
    when they are not such timesteps.
    """
    terms, asked = np.zeros(total), np.zeros(total, bool)
    terms[np.asarray(timesteps)] = bits
    asked[np.asarray(timesteps)] = True
    count = int(asked.sum())
    if count != len(timesteps) or not asked[0]:
        raise ValueError("the timesteps must be different ones, 0 among them")
    if count == total:
        return Bound(prior, terms, 0.0)
    variance = 0.0
    edges = strata(total, count)
    for start, end in pairwise(edges):
        drawn = terms[start:end][asked[start:end]]
        if len(drawn) < 2:
            raise ValueError(f"fewer than two timesteps from {start} to {end - 1}")
        size, n = end - start, len(drawn)
        terms[start:end][~asked[start:end]] = drawn.mean()
        variance += float(size * (size - n) * drawn.var(ddof=1) / n)
    return Bound(prior, terms, math.sqrt(variance))
