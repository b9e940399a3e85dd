from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.noise import (
    MAX_SEED,
    START,
    UNIT,
    NoiseStream,
    inverse_normal_cdf,
    normal,
    normal_table,
    normals,
    philox,
)

# The bytes that every machine and every version must give: a change here breaks every user's seeds.
GOLDEN = {
    (0, START, (1, 32, 32)): "7a9852ddeba10597247c0179a38bad777d5cbd0b9554046392f98e8aedbbc8c7",
    (0, 0, (1, 32, 32)): "9924bba681b6ce47a5633b256e5d1b1b49aeb537830db9026d5633c645021335",
    (42, 7, (3, 64, 64)): "e123656bcc3c41f972263579e99cb4f898c5da0c9aa5a4d6feffe54f0e230dd2",
    (MAX_SEED, 999, (1001,)): "4f5c2a044c075c5f5dabfee4f121aeb70dc5cb1794b992a6ae8bf50c95aa3cf4",
    (2**63, START, (3, 256, 256)): "30ddd4d790a65480aabbe8046ddcf4e65d8fa25312624b33f460e260c86770bc",
}
GOLDEN_TABLE = "e8f8e39ad61d52c9f0051d13735ca1d6a2104e93478ad0b26c8e752632da1130"


def digest(values: NDArray[np.float32]) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize(("seed", "step", "shape"), GOLDEN)
def test_the_bytes_of_a_seed_and_step(seed: int, step: int, shape: tuple[int, ...]) -> None:
    assert digest(normal(seed, step, shape)) == GOLDEN[seed, step, shape]


def test_the_bytes_of_the_table() -> None:
    assert digest(normal_table()) == GOLDEN_TABLE


# ----------------------------------------------------------------------------------------------------
# The words.

# Counter, key → words: kat_vectors of Random123 1.14, the lines "philox4x32 10".
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert philox(counter, key).tolist() == list(words)


def test_philox_of_many_is_philox_of_each() -> None:
    counters, keys, words = (np.array(column, np.uint64) for column in zip(*KNOWN_ANSWERS, strict=True))
    np.testing.assert_array_equal(philox(list(counters.T), keys.T), words)
    crossed = philox(list(counters.T[:, None]), keys.T[:, :, None])
    assert crossed.shape == (3, 3, 4)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(crossed[i, j], philox(counters[j].tolist(), keys[i].tolist()))


def test_a_number_is_two_entries_for_the_halves_of_its_word() -> None:
    seed, step, stream = 0x0123456789ABCDEF, 6, NoiseStream.KNOWN_PIXELS
    drawn = normal(seed, step, (11,), stream)
    table = normal_table()
    for i, z in enumerate(drawn):
        word = int(philox((i // 4, step + 1, stream, 0), (0x89ABCDEF, 0x01234567))[i % 4])
        assert z == table[word & 0xFFFF] + table[word >> 16]


# ----------------------------------------------------------------------------------------------------
# The distribution, exactly: all 2³² sums of two entries are equally likely.


def moments_of_a_sum(table: NDArray[np.float32]) -> tuple[float, float]:
    """Variance and kurtosis of the sum of two independent entries, whose mean is 0."""
    squares = table.astype(np.float64) ** 2
    second, fourth = squares.mean(), (squares**2).mean()
    return 2 * second, (2 * fourth + 6 * second**2) / (2 * second) ** 2


def tail_of_a_sum(table: NDArray[np.float32], x: float) -> float:
    """P(|a + b| > x), by counting pairs."""
    entries = table.astype(np.float64)
    above = len(table) - np.searchsorted(entries, x - entries, side="right")
    return 2 * int(above.sum()) / len(table) ** 2


def assert_normal_moments(table: NDArray[np.float32]) -> None:
    variance, kurtosis = moments_of_a_sum(table)
    assert variance == pytest.approx(1, abs=1e-7)
    assert kurtosis == pytest.approx(3, abs=1e-4)


def test_the_table_is_ascending_and_antisymmetric() -> None:
    table = normal_table()
    assert table.shape == (2**16,)
    assert table.dtype == np.float32
    assert (np.diff(table) > 0).all()
    np.testing.assert_array_equal(table, -table[::-1])  # all odd moments of a sum are 0


def test_variance_and_kurtosis() -> None:
    assert_normal_moments(normal_table())


def test_moments_notice_a_wrong_table() -> None:
    middles = (np.arange(2**16) + 0.5) / 2**16
    without_outermost_entries = (inverse_normal_cdf(middles) * math.sqrt(0.5)).astype(np.float32)
    slightly_wide = normal_table() * np.float32(1.000001)
    for wrong in (without_outermost_entries, slightly_wide):
        with pytest.raises(AssertionError):
            assert_normal_moments(wrong)


@pytest.mark.parametrize(
    ("x", "within"),
    [
        (0.5, 1e-4),
        (1, 1e-4),
        (2, 1e-4),
        (3, 1e-3),
        (3.5, 2e-3),
        (4, 5e-3),
        (4.5, 0.01),
        (5, 0.01),
        (5.5, 0.07),
    ],
)
def test_the_tails(x: float, within: float) -> None:
    normal_tail = math.erfc(x / math.sqrt(2))
    assert tail_of_a_sum(normal_table(), x) == pytest.approx(normal_tail, rel=within)


def test_tails_notice_a_table_without_its_outermost_entries() -> None:
    table = normal_table().copy()
    table[[0, -1]] = table[[1, -2]]
    assert tail_of_a_sum(table, 5) < 0.9 * math.erfc(5 / math.sqrt(2))


def test_every_sum_is_exact_in_float32() -> None:
    """Multiples of a unit below 2²⁴ units: float32 holds all of them, so no way of adding can round."""
    units = normal_table().astype(np.float64) / UNIT
    assert (units == np.rint(units)).all()
    assert 2 * np.abs(units).max() <= 2**24
    assert math.log2(UNIT) == round(math.log2(UNIT))


def test_a_sample_has_this_distribution() -> None:
    z = np.sort(normal(2, 5, (1_000_000,)).astype(np.float64))
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(z))  # E z²ᵖ = (2p − 1)!!
        assert (z**power).mean() == pytest.approx(expected, abs=4 * spread), power
    some = z[::10]
    cdf = np.array([NormalDist().cdf(v) for v in some])
    distance = np.abs(cdf - (10 * np.arange(len(some)) + 0.5) / len(z)).max()
    assert distance < 1.95 / math.sqrt(len(z))  # Kolmogorov's bound for one in a thousand


# ----------------------------------------------------------------------------------------------------
# Independence.


def assert_uncorrelated(rows: Sequence[NDArray[np.float32]]) -> None:
    """No two rows are, nor their squares, within five standard errors."""
    z = np.stack(rows).astype(np.float64)
    for values in (z, z**2):
        correlations = np.atleast_2d(np.corrcoef(values))
        off = correlations[~np.eye(len(z), dtype=bool)]
        assert np.abs(off).max() < 5 / math.sqrt(z.shape[1])


def test_seeds_steps_and_streams_are_independent() -> None:
    seeds = (0, 1, 2, 2**32, 2**32 + 1, 2**63, MAX_SEED - 1, MAX_SEED)
    assert_uncorrelated(
        [
            normal(seed, step, (16384,), stream)
            for seed in seeds
            for step in (START, 0, 1, 999)
            for stream in NoiseStream
        ]
    )


def test_pixels_are_independent() -> None:
    """Pixel i of many samples against pixel j, and neighbours at many distances within one large sample."""
    pixels = normals(range(20_000), [3] * 20_000, (4, 2, 8))
    assert_uncorrelated(list(pixels.reshape(20_000, 64).T))
    large = normal(9, 0, (1 << 20,))
    distances = (0, 1, 2, 3, 4, 5, 7, 8, 16, 28, 32, 64, 256, 784, 1024, 3072, 4096, 16384, 65536)
    for distance in distances[1:]:
        assert_uncorrelated([large[distance:], large[:-distance]])


def test_correlation_is_noticed() -> None:
    z = normals([0, 1], [0, 0], (16384,))
    with pytest.raises(AssertionError):
        assert_uncorrelated([z[0], 0.05 * z[0] + z[1]])
    with pytest.raises(AssertionError):
        assert_uncorrelated([z[0], z[0] * np.sign(z[1])])  # in the squares alone


def test_no_two_streams_share_bits() -> None:
    drawn = [normal(7, 0, (64,), stream) for stream in NoiseStream]
    assert len({values.tobytes() for values in drawn}) == len(NoiseStream)
    assert drawn[0].tobytes() == normal(7, 0, (64,)).tobytes()


def test_streams_have_the_numbers_they_always_had() -> None:
    """They are part of every result: a change would give other images for the same seeds, in silence."""
    numbers = {"STEP": 0, "KNOWN_PIXELS": 1, "TIMESTEPS": 2, "PROBABILITY_FLOW": 3}
    assert {name: int(stream) for name, stream in NoiseStream.__members__.items()} == numbers


# ----------------------------------------------------------------------------------------------------
# A number depends on its seed, step, stream and place, and on nothing else.


@pytest.mark.parametrize("shape", [(3, 33, 31), (1, 3, 3), (7,), (1, 256, 257)])
def test_many_at_once_are_the_same_bytes(shape: tuple[int, ...]) -> None:
    seeds, steps = [5, 0, MAX_SEED, 5, 2**63 + 77], [START, 3, 999, 0, 12]
    together = normals(seeds, steps, shape, NoiseStream.KNOWN_PIXELS)
    assert together.shape == (5, *shape)
    assert together.dtype == np.float32
    for seed, step, drawn in zip(seeds, steps, together, strict=True):
        assert drawn.tobytes() == normal(seed, step, shape, NoiseStream.KNOWN_PIXELS).tobytes()


def test_more_samples_than_are_made_at_once() -> None:
    seeds = [MAX_SEED - i for i in range(700)]
    together = normals(seeds, range(700), (1, 10, 10))  # 25 blocks each, and 16,384 blocks at once
    for i in (0, 654, 655, 656, 699):
        assert together[i].tobytes() == normal(seeds[i], i, (1, 10, 10)).tobytes()


def test_size_and_shape_decide_only_how_much_is_taken() -> None:
    large = normal(11, 3, (300_000,))
    for count in (1, 2, 3, 4, 5, 16, 65_535, 65_536, 65_537, 131_073):  # 65,536 are made at once
        np.testing.assert_array_equal(normal(11, 3, (count,)), large[:count])
    np.testing.assert_array_equal(normal(11, 3, (4, 4)).ravel(), large[:16])
    others = normal(12, 3, (16,)), normal(11, 4, (16,)), normal(11, START, (16,))
    assert not any(np.array_equal(other, large[:16]) for other in others)


def test_no_samples_and_no_pixels() -> None:
    assert normals([], [], (3, 4, 4)).shape == (0, 3, 4, 4)
    assert normals([1, 2], [0, 0], (0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        normal(seed, 0, (1,))


def test_a_seed_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="2 seeds, 1 steps"):
        normals([1, 2], [0], (4,))


# ----------------------------------------------------------------------------------------------------
# The quantiles.


@given(p=st.floats(2**-53, 1 - 2**-53))
def test_inverse_cdf_against_the_standard_library(p: float) -> None:
    expected = NormalDist().inv_cdf(p)
    # The standard library rounds ½ ± a little towards the tails differently: absolute near 0.
    assert inverse_normal_cdf(np.array([p]))[0] == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_inverse_cdf_where_its_pieces_meet() -> None:
    p = np.array([0.075, 0.075 + 1e-16, 0.925, math.exp(-25), math.exp(-25) * (1 + 1e-12), 2**-53, 0.5])
    expected = [NormalDist().inv_cdf(v) for v in p.tolist()]
    np.testing.assert_allclose(inverse_normal_cdf(p), expected, rtol=1e-14, atol=1e-15)
