"""The bound from its terms: what a subset of them says of all, and a model whose bound is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.betas import zero_terminal_snr
from model.denoiser import Denoiser, to_pixels
from model.diffusion import discretised_gaussian_log_likelihood
from model.evaluation.anomaly import measure
from model.likelihood import (
    FEWEST_TERMS,
    choose_timesteps,
    chunks,
    continuous_rate,
    estimate,
    prior_bits,
    rmse,
    strata,
)
from model.schedule import NoiseSchedule, linear_betas
from tests.model.gaussian import GaussianRuntime, expected_terms, prior_divergence

SCHEDULE = NoiseSchedule(linear_betas(1000))


@st.composite
def subsets(draw: st.DrawFn) -> tuple[int, int]:
    """(T, terms) of a subset."""
    total = draw(st.integers(FEWEST_TERMS + 1, 400))
    return total, draw(st.integers(FEWEST_TERMS, total - 1))


@given(subsets())
def test_strata_tile_all_but_the_first_timestep(of: tuple[int, int]) -> None:
    total, terms = of
    edges = strata(total, terms)
    assert (edges[0], edges[-1], len(edges)) == (1, total, (terms - 1) // 2 + 1)
    assert (np.diff(edges) >= 2).all()


@given(subsets(), st.integers(0, 2**53 - 1))
def test_a_subset_has_two_of_each_stratum_and_the_first_timestep(of: tuple[int, int], seed: int) -> None:
    total, terms = of
    chosen = choose_timesteps(total, terms, seed)
    assert len(chosen) == terms
    assert (np.diff(chosen) < 0).all()
    assert chosen[-1] == 0
    draws = [int(((start <= chosen) & (chosen < end)).sum()) for start, end in pairwise(strata(total, terms))]
    assert draws == [*[2] * (len(draws) - 1), 2 + (terms + 1) % 2]


CHOSEN = [436, 282, 125, 70, 12, 7, 5, 4, 0]


def test_the_choice_is_its_seeds_alone() -> None:
    assert choose_timesteps(1000, 9, 7).tolist() == CHOSEN  # on every machine
    assert len({tuple(choose_timesteps(1000, 9, seed)) for seed in range(50)}) == 50


def test_all_timesteps_when_there_are_no_more() -> None:
    assert choose_timesteps(5, 5, 0).tolist() == choose_timesteps(5, 99, 1).tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("terms", [0, 1, 2])
def test_too_few_terms_have_no_error_and_are_refused(terms: int) -> None:
    with pytest.raises(ValueError, match="from 3 to 999"):
        choose_timesteps(1000, terms, 0)


def test_chunks_are_of_one_length_and_in_order() -> None:
    parts = chunks(choose_timesteps(1000, 100, 0), 8)
    assert sorted({len(part) for part in parts}) == [12, 13]
    assert list(chain.from_iterable(parts)) == choose_timesteps(1000, 100, 0).tolist()


# ── The estimate ───────────────────────────────────────────────────────────────────────────────

TERMS = np.random.default_rng(0).gamma(4, 1 / 4, 60) / np.arange(1, 61)
"""As they come: falling like a power of t, under noise."""


def test_all_terms_are_their_sum() -> None:
    order = np.random.default_rng(1).permutation(60)
    bound = estimate(60, 0.25, order.tolist(), TERMS[order].tolist())
    assert bound.bits_per_dim == pytest.approx(0.25 + TERMS.sum())
    assert bound.standard_error == 0
    np.testing.assert_array_equal(bound.terms, TERMS)


@pytest.mark.parametrize("terms", [3, 4, 11, 24, 59])
def test_a_subset_is_unbiased_and_tells_its_error(terms: int) -> None:
    draws = 1500
    found = []
    for seed in range(draws):
        chosen = choose_timesteps(60, terms, seed)
        found.append(estimate(60, 0.25, chosen.tolist(), TERMS[chosen].tolist()))
    sums = np.array([bound.bits_per_dim for bound in found])
    spread = sums.std()
    assert sums.mean() == pytest.approx(0.25 + TERMS.sum(), abs=4 * spread / math.sqrt(draws))
    # The variance is what is unbiased, not its root; two draws a stratum scatter it widely.
    told = np.mean([bound.standard_error**2 for bound in found])
    assert math.sqrt(told) == pytest.approx(spread, rel=0.1)


def test_without_the_strata_the_same_terms_say_something_else() -> None:
    chosen = choose_timesteps(60, 11, 0)
    bound = estimate(60, 0.0, chosen.tolist(), TERMS[chosen].tolist())
    assert abs(60 * TERMS[chosen].mean() - TERMS.sum()) > 5 * bound.standard_error


def test_more_terms_have_less_error() -> None:
    def error(terms: int) -> float:
        chosen = [choose_timesteps(60, terms, seed) for seed in range(200)]
        return float(np.mean([estimate(60, 0, t.tolist(), TERMS[t].tolist()).standard_error for t in chosen]))

    errors = [error(terms) for terms in (5, 9, 17, 33, 59)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * TERMS.sum()


@pytest.mark.parametrize(
    ("total", "wrong"),
    [(60, [3, 2, 1]), (6, [5, 5, 1, 0]), (60, [59, 58, 57, 56, 0])],
    ids=["without 0", "twice the same", "a stratum missed"],
)
def test_other_timesteps_are_refused(total: int, wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        estimate(total, 0.0, wrong, [1.0] * len(wrong))


def test_rates_add_up_from_the_top() -> None:
    bound = estimate(60, 0.25, list(range(60)), TERMS.tolist())
    assert bound.rates[59] == 0.25  # x_T is all there is: what its KL costs
    for t in (58, 30, 0):
        assert bound.rates[t] == pytest.approx(0.25 + TERMS[t + 1 :].sum())
    assert bound.rates[0] + TERMS[0] == pytest.approx(bound.bits_per_dim)
    chosen = choose_timesteps(60, 11, 0)
    part = estimate(60, 0.25, chosen.tolist(), TERMS[chosen].tolist())
    assert (np.diff(part.rates) <= 1e-12).all()
    assert part.rates[0] + TERMS[0] == pytest.approx(part.bits_per_dim)


def test_grey_levels() -> None:
    assert rmse([0, 1, 4]).tolist() == [0, 127.5, 255]


def test_the_prior_is_the_divergence_from_pure_noise() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8))
    pixels[:, 0, 0, :2] = 0, 255
    for x0 in (pixels / 127.5 - 1).astype(np.float32):
        expected = prior_divergence(SCHEDULE, x0)
        assert prior_bits(SCHEDULE, x0) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert expected > 0


# ── A model whose bound is known ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("terms", [200, 61])
def test_the_bound_of_gaussian_data_under_their_own_denoiser(terms: int) -> None:
    """Denoiser, probes, terms and estimate against a sum of expectations that is known in closed form."""
    schedule = NoiseSchedule(linear_betas(200, 5e-4, 0.1), clip=math.inf)
    denoiser = Denoiser(
        GaussianRuntime(schedule), (1, 16, 16), conditional=False, null_class=None, schedule=schedule
    )
    random = torch.Generator().manual_seed(0)
    images = to_pixels(torch.randn(6, 1, 16, 16, generator=random) * GaussianRuntime.variance**0.5)
    found = measure(denoiser, images, terms, seed=3, batch=4, tick=int)
    off = []
    for image, bound in zip(images, found.bounds, strict=True):
        x0 = image / 127.5 - 1
        expected = expected_terms(schedule, x0)
        assert bound.prior == pytest.approx(prior_bits(schedule, x0), rel=1e-6)
        assert (bound.standard_error == 0) == (terms == 200)
        # A term is a mean of squares of 256 Gaussians: its noise is at most √(2 / 256) of it.
        noise = math.sqrt(2 / 256 * np.square(expected).sum())
        for t in (0, 5, 50):
            difference = bound.rates[t] - bound.prior - expected[t + 1 :].sum()
            assert abs(difference) < 4 * math.hypot(noise, bound.standard_error)
        off.append((bound.rates[0] - bound.prior) / expected.sum() - 1)
    assert abs(np.mean(off)) < 0.03


def test_an_image_costs_the_same_bits_in_any_data_range() -> None:
    """Halving pixels and the deviation of the forward process's noise alike changes no probability."""
    image = torch.arange(256).double().view(1, 1, 16, 16) / 127.5 - 1
    guess, std = image + 0.02, torch.full((1, 1, 1, 1), 0.05).double()
    wide = discretised_gaussian_log_likelihood(image, guess, std)
    low = discretised_gaussian_log_likelihood((image + 1) / 2, (guess + 1) / 2, std / 2, (0.0, 1.0))
    torch.testing.assert_close(low, wide)
    assert wide.exp()[0, 0, 0, 1] < 0.1
    assert not torch.allclose(
        discretised_gaussian_log_likelihood((image + 1) / 2, (guess + 1) / 2, std / 2), wide, atol=0.1
    )


def test_a_rate_from_pure_noise_is_finite() -> None:
    """The SNR of ᾱ_T = 0 has no logarithm; what it adds to the integral is small and positive."""
    schedule = NoiseSchedule(zero_terminal_snr(linear_betas(1000)), prediction_type="v_prediction")
    timesteps = np.arange(1000)
    mse = 0.3 * (timesteps + 1) / 1000
    whole = continuous_rate(schedule, 0.0, timesteps.tolist(), mse.tolist())
    without = continuous_rate(schedule, 0.0, timesteps[:-1].tolist(), mse[:-1].tolist())
    assert without < whole < without + 1e-3
    halved = replace(schedule, data_range=(0.0, 1.0))
    assert continuous_rate(halved, 0.0, timesteps.tolist(), mse.tolist()) == pytest.approx(whole / 4)
    assert prior_bits(schedule, np.ones((1, 8, 8))) == 0
