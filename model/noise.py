"""The noise of a sample: a function of its seed, step and stream, and of nothing else.

The bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a cipher
that turns a counter into random words: the key is the seed, and step and stream are in the counter. A word
becomes a normal number by two look-ups in a table and one addition that is exact in float32. So no compiler,
no fused multiply-add and no processor's logarithm can change a bit, and a device that adds and multiplies
integers gives the same noise (model/device_noise.py). The table itself is made from integers and from
additions, multiplications, divisions and square roots, which IEEE 754 fixes to the last bit.

The sum of two N(0, ½) is N(0, 1), and 65,536 quantiles of N(0, ½) give 2³² sums. Their exact distribution:
variance 1 to 1e-7, kurtosis 3 to 1e-4, and P(|z| > x) right to 1 % up to x = 5. The largest |z| is 6.36.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from math import isqrt, prod

import numpy as np
from numpy.typing import ArrayLike, NDArray


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

# Salmon et al. 2011, table 2: what a round multiplies with, and what it adds to the key.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32 = 0xFFFFFFFF

_ENTRIES = 2**16
UNIT = 2.0**-21
"""All entries are multiples of it. A sum is below 8 = 2²⁴ units, so float32 holds it exactly."""

# Blocks of four numbers that are made at once: enough that the calls cost little, and few enough for a cache.
_CHUNK = 2**14

# The table's last value: gives P(|z| > x) to 1 % for all x up to 5; 3.14 or 3.22 would not.
_LAST = 3.18

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
    if len(seeds) != len(steps):
        raise ValueError(f"{len(seeds)} seeds, {len(steps)} steps")
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed is from 0 to {MAX_SEED}, got {seed}")
    both_halves = np.array(seeds, np.uint64)
    keys = np.stack((both_halves & LOW_32, both_halves >> 32))[..., None]
    counted = np.array(steps, np.int64)[:, None] + 1
    count = prod(shape)
    blocks = -(-count // 4)
    drawn = np.empty((len(seeds), blocks, 4), np.float32)
    samples = max(1, _CHUNK // max(1, blocks))
    for i in range(0, len(seeds), samples):
        rows = slice(i, i + samples)
        for j in range(0, blocks, _CHUNK):
            columns = slice(j, min(j + _CHUNK, blocks))
            counter = np.arange(columns.start, columns.stop), counted[rows], int(stream), 0
            # Which half of a word comes first depends on the machine; their sum does not.
            halves = normal_table().take(philox(counter, keys[:, rows]).view(np.uint16))
            np.add(halves[..., 0::2], halves[..., 1::2], out=drawn[rows, columns])
    return drawn.reshape(len(seeds), blocks * 4)[:, :count].reshape(len(seeds), *shape)


def philox(counter: Sequence[ArrayLike], key: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10: four random words of 32 bits for each counter and key, [..., 4] uint32.

    counter: four words, each a number or an array. key: its two words, [2, ...], of the result's rank. All
    are below 2³² and broadcast to [...].
    The noise of a step is `philox((block, step + 1, stream, 0), (low half of the seed, high half))`, and
    word w of block b is the number at flat index 4·b + w.
    """
    keys = np.array(key, np.uint64)
    shape = np.broadcast(*counter, *keys).shape
    # Words 0 and 2 in one array and 1 and 3 in another: half the calls, which are what few numbers cost.
    even, odd, product = np.empty((3, 2, *shape), np.uint64)
    even[0], odd[0], even[1], odd[1] = counter
    multipliers = np.array(MULTIPLIERS, np.uint64).reshape(2, *[1] * len(shape))
    key_steps = np.array(KEY_STEPS, np.uint64).reshape(multipliers.shape)
    for _ in range(ROUNDS):
        np.multiply(even, multipliers, out=product)
        crossed = product[::-1]
        np.right_shift(crossed, 32, out=even)
        even ^= odd
        even ^= keys
        # Factors must be below 2³². Odd words and keys are only xored: what they have above it goes here.
        even &= LOW_32
        odd, product = crossed, odd
        keys += key_steps
    words = np.empty((*shape, 4), np.uint32)
    for i, word in enumerate((even[0], odd[0], even[1], odd[1])):
        words[..., i] = word  # the low 32 bits
    return words


@cache
def normal_table() -> NDArray[np.float32]:
    """What half a word stands for: 65,536 values like N(0, ½), ascending and antisymmetric.

    They are the quantiles at the middles of equal probabilities, but for the last two on each side. With
    the middles throughout the tails would be too thin, P(|z| > 5) by 17 %. So the last value is one that
    was found by trying, and the one before it makes the variance exact.
    """
    middles = (np.arange(_ENTRIES // 2, _ENTRIES) + 0.5) / _ENTRIES
    units = np.rint(inverse_normal_cdf(middles) * (0.7071067811865476 / UNIT)).astype(np.int64)
    units[-1] = round(_LAST / UNIT)
    # Σ T² = ½ · 65,536, half of it on this side. The sum is one of integers, in any order.
    units[-2] = isqrt(round(_ENTRIES / 4 / UNIT**2) - int((units**2).sum() - units[-2] ** 2))
    upper = (units * UNIT).astype(np.float32)
    table = np.concatenate((-upper[::-1], upper))
    table.flags.writeable = False  # every caller has the same one
    return table


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
