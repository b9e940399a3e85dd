"""The variational bound of an image from all or some of its terms, in bits per dimension.

−log₂ p(x₀) ≤ L_T + Σ_t L_t (Ho et al. 2020, eq. 5), where `diffusion.vlb_terms` gives one term
per network call and L_T has a closed form. Each term is an unbiased estimate of its expectation from one draw
of noise. All T terms give the exact sum for that noise. A subset gives an unbiased estimate with a standard
error: it has t = 0, the largest term, and at least two timesteps of each stratum of the others.

The same terms give the rate-distortion curve (§4.3 and Fig. 5). Sending x_t costs L_T and the terms of the
higher timesteps, the rate; the x₀ prediction from x_t has an error, the distortion. The rate is that of a
code in this sense: to send one sample of q to a receiver that holds p takes KL(q ‖ p) bits in expectation and
a logarithmic overhead, by minimal random coding (Harsha et al. 2007; Havasi et al. 2019) or relative entropy
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
"""Of a subset: t = 0, and the two draws that a variance needs."""
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
    """The timesteps to measure, highest first: all of them, or a subset drawn by `seed`.

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


def chunks(timesteps: ArrayLike, count: int) -> list[list[int]]:
    """Timesteps cut into `count` chunks of equal length, or one less, to be measured side by side."""
    return [part.tolist() for part in np.array_split(np.asarray(timesteps, np.int64), count)]


def prior_bits(schedule: NoiseSchedule, x0: ArrayLike) -> float:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension. x0: one image, in the data range."""
    last = float(schedule.alphas_cumprod[-1])
    square = float(np.square(np.asarray(x0, np.float64)).mean())
    return 0.5 * (-math.log1p(-last) - last + last * square) / math.log(2)


def continuous_rate(
    schedule: NoiseSchedule, prior: float, timesteps: Sequence[int], mse: Sequence[float]
) -> float:
    """The limit of L_T and the bound's terms above t = 0 in ever finer steps, in bits per dimension.

    L_T + ½ ∫ E‖x₀ − x̂₀‖² dSNR between the same noise levels (Kingma et al. 2021, eq. 18), by the trapezoidal
    rule in log SNR over the errors mse (of pixels in [-1, 1]) at some timesteps, both [n]; from an SNR of 0,
    in the SNR itself. The bound of a chain of T steps is larger, because every step is priced by the error at
    its noisier end, and most so near t = 0.
    """
    order = np.argsort(timesteps)
    snr = schedule.snr[np.asarray(timesteps)[order]]
    low, high = schedule.data_range
    half_error = 0.5 * ((high - low) / 2) ** 2 * np.asarray(mse, np.float64)[order]
    seen = snr > 0
    area = np.trapezoid((snr * half_error)[seen], -np.log(snr[seen]))
    if not seen.all() and seen.any():
        area += snr[seen][-1] * (half_error[seen][-1] + half_error[-1]) / 2
    return prior + float(area) / math.log(2)


def rmse(mse: ArrayLike) -> Floats:
    """Mean squared errors of x₀ in [-1, 1] as root mean square errors in levels of 255."""
    return LEVELS * np.sqrt(np.asarray(mse, np.float64))


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of one image, in bits per dimension.

    prior: L_T. terms: L_t for every timestep, [T]; where it was not measured, the mean of its stratum.
    standard_error: of the choice of timesteps, for the given noise; 0 when all were measured.
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
        """The rate of x_t for every timestep t: [T], falling with t; the whole bound less L_0 at t = 0."""
        higher = np.cumsum(self.terms[::-1])[::-1] - self.terms
        return self.prior + higher


def estimate(total: int, prior: float, timesteps: Sequence[int], bits: Sequence[float]) -> Bound:
    """The bound from the terms of all `total` timesteps, or of those that `choose_timesteps` gave.

    timesteps, bits: [n], in any order. The variance is that of a stratified sample without replacement,
    Σ N (N − n) s² / n (Cochran 1977, eq. 5.13), s² being the sample variance in a stratum. Raises ValueError
    when they are not such timesteps.
    """
    terms, measured = np.zeros(total), np.zeros(total, bool)
    terms[np.asarray(timesteps)] = bits
    measured[np.asarray(timesteps)] = True
    count = int(measured.sum())
    if count != len(timesteps) or not measured[0]:
        raise ValueError("the timesteps must be different ones, 0 among them")
    if count == total:
        return Bound(prior, terms, 0.0)
    variance = 0.0
    edges = strata(total, count)
    for start, end in pairwise(edges):
        drawn = terms[start:end][measured[start:end]]
        if len(drawn) < 2:
            raise ValueError(f"fewer than two timesteps from {start} to {end - 1}")
        size, n = end - start, len(drawn)
        terms[start:end][~measured[start:end]] = drawn.mean()
        variance += float(size * (size - n) * drawn.var(ddof=1) / n)
    return Bound(prior, terms, math.sqrt(variance))
