from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.noise import MAX_SEED, START, NoiseStream, inverse_normal_cdf, normal, normals

# The bytes that every machine and every version must give: a change here breaks every user's seeds.
GOLDEN = {
    (0, START, (1, 32, 32)): "6ed9ab480fa2982a29509184a777c9a0d8a96b08d736110278816b3360f5d196",
    (0, 0, (1, 32, 32)): "98079ec49841f0cae26437451eca89888605f57031cd981b1c7233750c7b771a",
    (42, 7, (3, 64, 64)): "67038d4fc295b559256718f512b27a3c02ec8ef4481242ba077ea72c2ac9f98a",
    (MAX_SEED, 999, (1000,)): "71a9f869db19967e8683cf2a81f865fb7fa5497c858c089fb68c0a30d1716a61",
    (2**63, START, (3, 256, 256)): "1c0cdbe2e77fb8bc9904069e432815c6b03ddcde73b7e260290d2fd871139fdd",
}


@pytest.mark.parametrize(("seed", "row", "shape"), GOLDEN)
def test_the_bytes_of_a_seed_and_row(seed: int, row: int, shape: tuple[int, ...]) -> None:
    digest = hashlib.sha256(normal(seed, row, shape).astype("<f4").tobytes()).hexdigest()
    assert digest == GOLDEN[seed, row, shape]


def test_shape_and_dtype() -> None:
    drawn = normal(7, START, (3, 4, 5))
    assert drawn.shape == (3, 4, 5)
    assert drawn.dtype == np.float32


def test_moments() -> None:
    z = normal(1, 0, (1_000_000,)).astype(np.float64)
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        moment = float((z**power).mean())
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(z))  # E z²ᵖ = (2p − 1)!!
        assert moment == pytest.approx(expected, abs=4 * spread), power


def test_the_whole_distribution() -> None:
    z = np.sort(normal(2, 5, (100_000,)).astype(np.float64))
    cdf = np.array([NormalDist().cdf(v) for v in z])
    distance = np.abs(cdf - (np.arange(len(z)) + 0.5) / len(z)).max()
    assert distance < 1.95 / math.sqrt(len(z))  # Kolmogorov's bound for one in a thousand


def test_seeds_and_rows_are_independent() -> None:
    streams = [normal(s, r, (4096,)) for s in (0, 1, 2**63, MAX_SEED) for r in (START, 0, 1, 999)]
    correlations = np.atleast_2d(np.corrcoef(np.stack(streams)))
    off = correlations[~np.eye(len(streams), dtype=bool)]
    assert np.abs(off).max() < 5 / math.sqrt(4096)


def test_many_at_once_are_the_same_bytes() -> None:
    seeds, rows, shape = [5, 0, MAX_SEED, 5, 77], [START, 3, 999, 0, 12], (3, 33, 31)
    together = normals(seeds, rows, shape)
    assert together.shape == (5, 3, 33, 31)
    for seed, row, drawn in zip(seeds, rows, together, strict=True):
        assert drawn.tobytes() == normal(seed, row, shape).tobytes()


def test_order_and_company_do_not_matter() -> None:
    alone = normal(11, 3, (16,))
    for seed, row in ((12, 3), (11, 4), (11, START)):
        normal(seed, row, (500,))
    np.testing.assert_array_equal(normal(11, 3, (16,)), alone)
    np.testing.assert_array_equal(normal(11, 3, (4, 4)).ravel(), alone)
    np.testing.assert_array_equal(normal(11, 3, (20,))[:16], alone)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_the_extreme_seeds(seed: int) -> None:
    z = normal(seed, START, (10_000,))
    assert np.isfinite(z).all()
    assert 0.97 < z.std() < 1.03


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        normal(seed, 0, (1,))


@given(p=st.floats(2**-53, 1 - 2**-53))
def test_inverse_cdf_against_the_standard_library(p: float) -> None:
    expected = NormalDist().inv_cdf(p)
    # The standard library rounds ½ ± a little towards the tails differently: absolute near 0.
    assert inverse_normal_cdf(np.array([p]))[0] == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_inverse_cdf_where_its_pieces_meet() -> None:
    p = np.array([0.075, 0.075 + 1e-16, 0.925, math.exp(-25), math.exp(-25) * (1 + 1e-12), 2**-53, 0.5])
    expected = [NormalDist().inv_cdf(v) for v in p.tolist()]
    np.testing.assert_allclose(inverse_normal_cdf(p), expected, rtol=1e-14, atol=1e-15)


def test_the_lowest_and_highest_bits_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extremes:
        def __init__(self, **_: object) -> None:
            pass

        def random_raw(self, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
            return np.array([0, MAX_SEED], np.uint64)

    monkeypatch.setattr(np.random, "Philox", Extremes)
    low, high = normal(0, 0, (2,)).tolist()
    assert low == -high == pytest.approx(NormalDist().inv_cdf(2**-53), rel=1e-6)


def test_streams_have_the_numbers_they_always_had() -> None:
    """They are part of every result: a change would give other images for the same seeds, in silence."""
    numbers = {"STEP": 0, "KNOWN_PIXELS": 1, "TIMESTEPS": 2, "PROBABILITY_FLOW": 3}
    assert {name: int(stream) for name, stream in NoiseStream.__members__.items()} == numbers


def test_no_two_streams_share_bits() -> None:
    drawn = [normal(7, 0, (64,), stream) for stream in NoiseStream]
    assert len({values.tobytes() for values in drawn}) == len(NoiseStream)
    assert drawn[0].tobytes() == normal(7, 0, (64,)).tobytes()
