from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from model.diffusion import (
    OBJECTIVES,
    Objective,
    discretised_gaussian_log_likelihood,
    guided_output,
    l_simple,
    learned_log_variance,
    objective,
    predict_x0,
    q_posterior,
    q_sample,
    stratified_timesteps,
    training_target,
    vlb_terms,
)
from model.schedule import PREDICTION_TYPES, Array, NoiseSchedule, PredictionType, VarianceType, linear_betas

SCHEDULE = NoiseSchedule(linear_betas(1000))
AC = SCHEDULE.alphas_cumprod
RNG = torch.Generator()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    RNG.manual_seed(0)


def levels(*shape: int) -> torch.Tensor:
    """Random pixels on the 256 levels of [−1, 1], both ends among them."""
    pixels = torch.randint(0, 256, shape, generator=RNG)
    pixels.view(-1)[:2] = torch.tensor([0, 255])
    return pixels.double() / 127.5 - 1


def test_q_sample_has_the_moments_of_the_paper() -> None:
    t = torch.tensor([0, 300, 999])
    x0 = torch.full((3, 1, 400, 400), 0.7)
    x = q_sample(SCHEDULE, x0, t, torch.randn(x0.shape, generator=RNG))
    assert x.dtype == torch.float32
    for row, ac in zip(x, AC[t], strict=True):
        assert float(row.mean()) == pytest.approx(0.7 * ac**0.5, abs=4 * ((1 - ac) / 160_000) ** 0.5 + 1e-6)
        assert float(row.std()) == pytest.approx((1 - ac) ** 0.5, rel=0.01)


def test_q_sample_is_the_chain_of_single_steps() -> None:
    # q(x_t | x_0) must be what t + 1 single steps q(x_s | x_{s−1}) compose to.
    mean, variance = 1.0, 0.0
    for beta in SCHEDULE.betas[:500]:
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
    one, t = torch.ones(1, 1, 1, 1).double(), torch.tensor([499])
    assert float(q_sample(SCHEDULE, one, t, 0 * one)) == pytest.approx(mean, rel=1e-9)
    assert float(q_sample(SCHEDULE, 0 * one, t, one)) ** 2 == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_posterior_by_brute_force(t: int) -> None:
    # Bayes on a fine grid: q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0).
    x0, x = 0.4, -0.3 if t > 100 else 0.41
    grid = np.linspace(-6, 6, 2_000_001)
    alpha, prev = 1 - SCHEDULE.betas[t], AC[t - 1]
    log = -((x - alpha**0.5 * grid) ** 2) / (2 * (1 - alpha)) - (grid - prev**0.5 * x0) ** 2 / (
        2 * (1 - prev)
    )
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    expected_mean = (weights * grid).sum()
    expected_variance = (weights * (grid - expected_mean) ** 2).sum()

    one = torch.ones(1, 1, 1, 1).double()
    mean, variance = q_posterior(SCHEDULE, x0 * one, x * one, torch.tensor([t]))
    assert variance.shape == (1, 1, 1, 1)
    assert float(mean) == pytest.approx(expected_mean, abs=1e-6)
    assert float(variance) == pytest.approx(expected_variance, rel=1e-4)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_target_and_guess_are_inverse(kind: PredictionType) -> None:
    schedule = NoiseSchedule(linear_betas(1000), prediction_type=kind)
    t = torch.tensor([0, 1, 400, 999])
    x0 = torch.rand(4, 1, 5, 5, generator=RNG).double() * 2 - 1
    eps = torch.randn(x0.shape, generator=RNG).double()
    x = q_sample(schedule, x0, t, eps)
    out = training_target(schedule, x0, t, eps)
    torch.testing.assert_close(predict_x0(schedule, x, t, out), x0, atol=1e-9, rtol=0)
    assert (predict_x0(schedule, x, t, out + 0.1) - x0).abs().max() > 1e-4


def test_l_simple_is_the_mean_square_per_row() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2, dtype=torch.bfloat16)
    b[1, 0, 0, 0] = 4
    assert l_simple(a, b).tolist() == [0, 4]
    assert l_simple(a, b).dtype == torch.float32


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_vlb_terms_by_another_way(variance: VarianceType) -> None:
    t = torch.tensor([0, 1, 2, 77, 999])
    x0 = levels(5, 1, 4, 4)
    eps = torch.randn(x0.shape, generator=RNG).double()
    x = q_sample(SCHEDULE, x0, t, eps)
    out = eps + 0.2 * torch.randn(x0.shape, generator=RNG).double()
    terms = vlb_terms(SCHEDULE, x0, predict_x0(SCHEDULE, x, t, out).clamp(-1, 1), t, variance)

    small = SCHEDULE.posterior_variance("fixed_small")
    for i, s in enumerate(t.tolist()):
        row = slice(i, i + 1)
        guess = ((x[row] - (1 - AC[s]) ** 0.5 * out[row]) / AC[s] ** 0.5).clamp(-1, 1)
        mean, _ = q_posterior(SCHEDULE, guess, x[row], t[row])
        # Ho et al.'s code gives the decoder β̃_1 (ours counts from 0) whichever the variance.
        spread = float(small[1] if s == 0 else SCHEDULE.posterior_variance(variance)[s]) ** 0.5
        if s == 0:
            dist = [NormalDist(float(m), spread) for m in mean.flatten()]
            nats = [
                -math.log(max(bin_mass(d, float(p)), 1e-12))
                for d, p in zip(dist, x0[row].flatten(), strict=True)
            ]
            expected = sum(nats) / len(nats)
        else:
            true_mean, _ = q_posterior(SCHEDULE, x0[row], x[row], t[row])
            true = Normal(true_mean, float(small[s]) ** 0.5)
            expected = float(kl_divergence(true, Normal(mean, spread)).mean())
        assert float(terms[i]) == pytest.approx(expected / math.log(2), rel=1e-6), s


def bin_mass(dist: NormalDist, pixel: float) -> float:
    """The mass of a level's bin; the outermost levels take their whole tail."""
    lower = 0.0 if pixel < -0.999 else dist.cdf(pixel - 1 / 255)
    upper = 1.0 if pixel > 0.999 else dist.cdf(pixel + 1 / 255)
    return upper - lower


def test_a_perfect_guess_costs_nothing_after_the_first_step() -> None:
    t = torch.tensor([1, 500])
    x0 = levels(2, 1, 4, 4)
    terms = vlb_terms(SCHEDULE, x0, x0, t, "fixed_small")
    assert terms.dtype == torch.float64
    assert terms.abs().max() < 1e-9


def test_discretised_levels_sum_to_one() -> None:
    x = torch.arange(256).double() / 127.5 - 1
    for mean, std in ((0.0, 0.5), (-0.98, 0.01), (1.3, 0.2), (0.1234, 0.003)):
        log_p = discretised_gaussian_log_likelihood(
            x, torch.tensor(mean).double(), torch.tensor(std).double()
        )
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


# ── What training makes small ──────────────────────────────────────────────────────────────────


def test_timesteps_are_uniform_and_spread() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = torch.stack([stratified_timesteps(8, 1000, rng) for _ in range(4000)])
    assert int(drawn.min()) == 0
    assert int(drawn.max()) == 999
    # One in each eighth, whichever row it falls to.
    assert (drawn.sort(dim=1).values // 125 == torch.arange(8)).all()
    for row in drawn.T:
        counts = torch.bincount(row // 100, minlength=10)
        assert (counts - 400).abs().max() < 5 * 400**0.5


def noisy(schedule: NoiseSchedule, t: torch.Tensor, off: float = 0.2) -> tuple[torch.Tensor, ...]:
    """(x0, x, t, eps, out) of a network that is off by some noise."""
    x0 = levels(len(t), 1, 4, 4)
    eps = torch.randn(x0.shape, generator=RNG).double()
    out = training_target(schedule, x0, t, eps) + off * torch.randn(x0.shape, generator=RNG).double()
    return x0, q_sample(schedule, x0, t, eps), t, eps, out


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_simple_objective_is_l_simple(kind: PredictionType) -> None:
    schedule = NoiseSchedule(linear_betas(1000), prediction_type=kind)
    x0, x, t, eps, out = noisy(schedule, torch.tensor([0, 400, 999]))
    expected = l_simple(training_target(schedule, x0, t, eps), out)
    torch.testing.assert_close(objective(schedule, "simple", x0, x, t, eps, out), expected)


@pytest.mark.parametrize(
    ("kind", "loss", "weight"),
    [
        ("epsilon", "min_snr", lambda snr: np.minimum(snr, 5) / snr),
        ("v_prediction", "min_snr", lambda snr: np.minimum(snr, 5) / (snr + 1)),
        ("sample", "min_snr", lambda snr: np.minimum(snr, 5)),
        ("epsilon", "debiased", lambda snr: snr**-0.5),
        ("v_prediction", "debiased", lambda snr: snr**0.5 / (snr + 1)),
        ("sample", "debiased", lambda snr: snr**0.5),
    ],
)
def test_the_weights_over_the_signal_to_noise_ratio_are_those_of_the_papers(
    kind: PredictionType, loss: Objective, weight: Callable[[Array], Array]
) -> None:
    schedule = NoiseSchedule(linear_betas(1000), prediction_type=kind)
    t = torch.tensor([0, 100, 400, 999])
    x0, x, t, eps, out = noisy(schedule, t)
    snr = AC[t] / (1 - AC[t])
    expected = torch.from_numpy(weight(snr)) * l_simple(training_target(schedule, x0, t, eps), out)
    torch.testing.assert_close(objective(schedule, loss, x0, x, t, eps, out), expected.float())


def test_the_bounds_weight_of_the_squared_error_is_that_of_the_paper() -> None:
    t = torch.tensor([1, 10, 400, 999])
    x0, x, t, eps, out = noisy(SCHEDULE, t, off=1e-3)  # small, so that nothing would be clipped
    found = objective(SCHEDULE, "vlb", x0, x, t, eps, out)
    beta, variance = SCHEDULE.betas[t], SCHEDULE.posterior_variance("fixed_small")[t]
    weight = beta**2 / (2 * variance * (1 - beta) * (1 - AC[t]))  # Ho et al. 2020, eq. 12
    expected = torch.from_numpy(weight) * l_simple(eps, out) / math.log(2)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-9)


def test_a_wild_guess_has_a_gradient_under_the_bound() -> None:
    x0, x, t, eps, out = noisy(SCHEDULE, torch.tensor([0, 1, 999]), off=3.0)
    out.requires_grad_()
    objective(SCHEDULE, "vlb", x0, x, t, eps, out).sum().backward()
    assert out.grad is not None
    assert out.grad.isfinite().all()
    assert (out.grad[1:] != 0).all()


LEARNED = NoiseSchedule(linear_betas(1000), variance_type="learned_range")


def test_a_learned_variance_reaches_from_the_small_to_the_large_one() -> None:
    t = torch.tensor([0, 1, 500, 999])
    ends = [learned_log_variance(LEARNED, t, torch.full((4, 1, 2, 2), v)).exp() for v in (-1.0, 1.0)]
    small = LEARNED.posterior_variance("fixed_small")
    for found, expected in zip(ends, (np.append(small[1], small[t[1:]]), LEARNED.betas[t]), strict=True):
        torch.testing.assert_close(found[:, 0, 0, 0], torch.from_numpy(expected), rtol=1e-9, atol=0)
    middle = learned_log_variance(LEARNED, t, torch.zeros(4, 1, 2, 2)).exp()
    torch.testing.assert_close(middle, (ends[0] * ends[1]).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_at_its_ends_it_costs_what_the_fixed_ones_cost(v: float, variance: VarianceType) -> None:
    t = torch.tensor([1, 77, 999])
    x0, x, t, _, out = noisy(LEARNED, t)
    guess = predict_x0(LEARNED, x, t, out).clamp(-1, 1)
    log_variance = learned_log_variance(LEARNED, t, torch.full_like(x0, v))
    found = vlb_terms(LEARNED, x0, guess, t, "learned_range", log_variance)
    torch.testing.assert_close(found, vlb_terms(LEARNED, x0, guess, t, variance), rtol=1e-9, atol=1e-12)
    other = vlb_terms(LEARNED, x0, guess, t, "learned_range", log_variance + 0.1)
    assert not torch.allclose(found, other)


def test_l_hybrid_moves_the_mean_by_l_simple_alone_and_the_variance_by_the_bound() -> None:
    x0, x, t, eps, mean = noisy(LEARNED, torch.tensor([0, 1, 500, 999]))
    out = torch.cat((mean, torch.linspace(-0.9, 0.9, 16).view(4, 4).double().expand_as(mean)), dim=1)
    out.requires_grad_()
    hybrid = objective(LEARNED, "simple", x0, x, t, eps, out)
    simple = objective(SCHEDULE, "simple", x0, x, t, eps, out[:, :1])
    guess = predict_x0(LEARNED, x, t, mean).clamp(-1, 1)
    log_variance = learned_log_variance(LEARNED, t, out[:, 1:])
    bound = vlb_terms(LEARNED, x0, guess, t, "learned_range", log_variance)
    torch.testing.assert_close(hybrid, (simple + 0.001 * 1000 * bound).float(), rtol=1e-4, atol=1e-6)

    (of_hybrid,) = torch.autograd.grad(hybrid.sum(), out, retain_graph=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), out)
    (of_bound,) = torch.autograd.grad(bound.sum(), out)
    torch.testing.assert_close(of_hybrid[:, :1], of_simple[:, :1])
    torch.testing.assert_close(of_hybrid[:, 1:], of_bound[:, 1:], rtol=1e-4, atol=1e-9)
    assert (of_bound[:, 1:] != 0).all()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_objectives_of_a_half_precision_output_are_finite_float32(kind: Objective) -> None:
    x0, x, t, eps, mean = (v.float() if v.is_floating_point() else v for v in noisy(LEARNED, torch.arange(4)))
    out = torch.cat((mean, torch.zeros_like(mean)), dim=1).bfloat16().requires_grad_()
    loss = objective(LEARNED, kind, x0, x, t, eps, out)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert out.grad is not None
    assert out.grad.isfinite().all()


def test_rescaled_guidance_has_the_deviation_of_the_output_with_the_class() -> None:
    """φ of it, and 1 − φ of plain guidance (Lin et al. 2024, §3.4)."""
    torch.manual_seed(0)
    given, unconditional = torch.randn(3, 2, 5, 4), 2 * torch.randn(3, 2, 5, 4)
    scale = torch.tensor([1.0, 2.0, 7.5])[:, None, None, None]
    plain = guided_output(given, unconditional, scale, None)
    assert torch.equal(plain, guided_output(given, unconditional, scale, torch.zeros(3, 1, 1, 1)))
    for share in (0.7, 1.0):
        rescaled = guided_output(given, unconditional, scale, torch.full((3, 1, 1, 1), share)).numpy()
        for row, (cfg, positive) in enumerate(zip(plain.numpy(), given.numpy(), strict=True)):
            wanted = share * cfg * (positive.std(ddof=1) / cfg.std(ddof=1)) + (1 - share) * cfg
            np.testing.assert_allclose(rescaled[row], wanted, rtol=1e-5)
    assert plain[2].std() > 3 * given[2].std()
    np.testing.assert_allclose(rescaled.std((1, 2, 3)), given.numpy().std((1, 2, 3)), rtol=1e-5)


def test_rescaled_guidance_of_an_output_without_deviation_is_finite() -> None:
    flat = torch.zeros(1, 1, 2, 2)
    one = torch.ones(1, 1, 1, 1)
    assert torch.equal(guided_output(flat, flat, 2 * one, one), flat)
