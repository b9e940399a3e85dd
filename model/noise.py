"""The noise of a sample: a function of its seed, step and stream, and of nothing else.

A counter-based generator (Philox, Salmon et al. 2011) keyed by the seed, with step and stream in its counter,
gives the bits; NumPy fixes that stream. The bits become normal numbers here and not in a
library, with additions, multiplications, divisions and square roots only: IEEE 754 fixes those to the
last bit, while logarithms differ between processors and would let the same seed give other bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class NoiseStream(IntEnum):
    """What the random bits of a seed are for. Every use of a seed takes them from a stream of its own.

    Two uses with the same number would draw the same bits, and nothing would fail: the results would only be
    correlated. So all numbers stand here. They are part of every result: never change one.
    """

    STEP = 0
    """The starting noise x_T and the noise of the steps."""
    KNOWN_PIXELS = 1
    """The noise on pixels that are given."""
    TIMESTEPS = 2
    """Which timesteps estimate a bound (model/likelihood.py)."""
    PROBABILITY_FLOW = 3
    """The probability flow (model/evaluation/flow.py): step 0 for Hutchinson's vector, 1 and 2 for images."""


START = -1
"""In place of a step: the starting noise x_T."""

MAX_SEED = 2**64 - 1

# Wichura 1988, algorithm AS 241 (PPND16): coefficients from the highest power down.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.387132872796366608e0),
    (5.226495278852854561e3, 2.8729085735721942674e4, 3.930789580009271061e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.871870074920579083e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 2.27238449892691845833e-2, 2.4178072517745061177e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.7694972214606914055e0, 4.6303378461565452959e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 1.51986665636164571966e-2, 1.4810397642748007459e-1,
     6.8976733498510000455e-1, 1.6763848301838038494e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.2426609473880784386e-3, 2.6532189526576123093e-2,
     2.9656057182850489123e-1, 1.7848265399172913358e0, 5.4637849111641143699e0, 6.6579046435011037772e0),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     1.48753612908506148525e-2, 1.3692988092273580531e-1, 5.9983220655588793769e-1, 1.0),
)  # fmt: skip

Floats = NDArray[np.float64]


def normal(seed: int, step: int, shape: Sequence[int], stream: int = NoiseStream.STEP) -> NDArray[np.float32]:
    """Standard normal noise of a sample's step (START, 0, 1, …): float32 of `shape`.

    seed: 0 … MAX_SEED, else ValueError. stream: a NoiseStream. The same arguments give the same bytes on
    every machine.
    """
    drawn: NDArray[np.float32] = normals([seed], [step], shape, stream)[0]
    return drawn


def normals(
    seeds: Sequence[int], steps: Sequence[int], shape: Sequence[int], stream: int = NoiseStream.STEP
) -> NDArray[np.float32]:
    """`normal` of each seed and step, in one pass: [N, *shape] float32, with the same bits."""
    count = int(np.prod(shape))
    bits = np.empty((len(seeds), count), np.uint64)
    for i, (seed, step) in enumerate(zip(seeds, steps, strict=True)):
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed is from 0 to {MAX_SEED}, got {seed}")
        bits[i] = np.random.Philox(key=seed, counter=[0, 0, step + 1, stream]).random_raw(count)
    # The top 52 bits, at the middle of their interval: exact in float64, so strictly between 0 and 1.
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return inverse_normal_cdf(uniform.ravel()).astype(np.float32).reshape(len(seeds), *shape)


def inverse_normal_cdf(p: Floats) -> Floats:
    """Φ⁻¹(p) for p in (0, 1), to about 1e-15 (Wichura 1988). [N] float64 → [N] float64."""
    q = p - 0.5
    out = q * _ratio(_CENTRE, 0.180625 - q * q)
    outer = np.flatnonzero(np.abs(q) > 0.425)
    side = q[outer]
    r = np.sqrt(-_log(np.where(side < 0, p[outer], 1 - p[outer])))
    value = _ratio(_TAIL, r - 1.6)
    far = np.flatnonzero(r > 5)
    value[far] = _ratio(_FAR_TAIL, r[far] - 5)
    out[outer] = np.copysign(value, side)
    return out


def _ratio(polynomials: tuple[tuple[float, ...], tuple[float, ...]], x: Floats) -> Floats:
    """Quotient of two polynomials by Horner's rule."""
    top, bottom = (np.full_like(x, polynomial[0]) for polynomial in polynomials)
    for a, b in zip(polynomials[0][1:], polynomials[1][1:], strict=True):
        top *= x
        top += a
        bottom *= x
        bottom += b
    top /= bottom
    return top


def _log(x: Floats) -> Floats:
    """Natural logarithm from exact operations: ln x = e·ln 2 + 2 artanh((m − 1)/(m + 1)), x = m·2ᵉ."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    m = np.where(low, mantissa * 2, mantissa)
    e = exponent - low
    s = (m - 1) / (m + 1)
    square = s * s
    series = np.full_like(s, 1 / 21)
    for k in range(19, 0, -2):
        series *= square
        series += 1 / k
    out: Floats = e * 0.6931471805599453 + 2 * s * series
    return out
