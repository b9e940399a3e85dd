import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.stats import binomtest
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from model.evaluation.fidelity import frechet_distance, precision_recall, wilson_interval


def gaussian(n, mean, covariance, seed=0):
    """n points whose sample mean and covariance are exactly the given ones."""
    points = np.random.default_rng(seed).standard_normal((n, len(mean)))
    points -= points.mean(0)
    white = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_a_set_from_itself_is_zero():
    points = np.random.default_rng(0).standard_normal((100, 5))
    assert frechet_distance(points, points) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_gaussians_with_diagonal_covariances():
    # ‖μ_a − μ_b‖² + Σ (σ_a − σ_b)²: the covariances commute, so the root is taken entry by entry.
    a = gaussian(200, np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0]))
    b = gaussian(300, np.array([1.0, 1.0, 0.0]), np.diag([4.0, 4.0, 1.0]), seed=1)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute():
    # For 2×2 matrices tr √M = √(tr M + 2 √det M).
    cov_a, cov_b = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    product = cov_a @ cov_b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    zero = np.zeros(2)
    found = frechet_distance(gaussian(50, zero, cov_a), gaussian(80, zero, cov_b, seed=1))
    assert found == pytest.approx(np.trace(cov_a) + np.trace(cov_b) - 2 * root, rel=1e-9)


def test_frechet_distance_survives_singular_covariances():
    flat = np.random.default_rng(0).standard_normal((10, 64))  # fewer points than dimensions
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(flat, np.zeros((10, 64))) > 0


class Flattened(nn.Module):
    """Stands where others put Inception: an image's features are its pixels. [N, C, 1, D] → [N, C·D]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


SHAPES = [(200, 200, 1), (64, 64, 8), (300, 180, 8), (90, 400, 32), (20, 30, 48)]
"""(images, other images, features); in the last the covariances are singular."""


def sets(n, m, features, seed=0):
    """Two sets of features with other means and covariances."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((2, features, features)) / np.sqrt(features)
    shift = rng.standard_normal(features)
    return rng.standard_normal((n, features)) @ mixing[0], rng.standard_normal((m, features)) @ mixing[
        1
    ] + shift


@pytest.mark.parametrize(("n", "m", "features"), SHAPES)
def test_frechet_distance_is_that_of_torchmetrics(n, m, features):
    real, fake = sets(n, m, features)
    metric = FrechetInceptionDistance(Flattened(features)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real)[:, None, None], real=True)
    metric.update(torch.from_numpy(fake)[:, None, None], real=False)
    found = frechet_distance(real, fake)
    # The root of a singular product of covariances keeps half the digits, and theirs leaves it as it is.
    rel = 1e-6 if min(n, m) > features else 1e-3
    assert found == pytest.approx(metric.compute().item(), rel=rel)


def test_frechet_distance_falls_with_the_size_of_the_sets():
    rng = np.random.default_rng(0)
    few, many = (frechet_distance(*rng.standard_normal((2, n, 16))) for n in (50, 2000))
    assert many < few / 10


def test_precision_and_recall_of_identical_sets_are_one():
    points = np.random.default_rng(0).standard_normal((700, 4))  # more than one chunk
    assert precision_recall(points, points) == (1, 1)


def test_precision_and_recall_of_disjoint_sets_are_zero():
    points = np.random.default_rng(0).standard_normal((100, 4))
    assert precision_recall(points, points + 100) == (0, 0)


def test_dropping_a_mode_costs_recall_and_not_precision():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((400, 2))
    real[200:] += 50  # two modes of equal weight
    fake = rng.standard_normal((400, 2))  # only the first
    precision, recall = precision_recall(real, fake)
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.03)


def test_inventing_a_mode_costs_precision_and_not_recall():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((400, 2))
    fake = rng.standard_normal((400, 2))
    fake[200:] += 50
    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(0.5, abs=0.03)
    assert recall > 0.9


def test_the_radius_reaches_to_the_kth_other_point():
    real = np.array([[0.0], [1.0], [3.0], [6.0]])  # radii for k = 2: 3, 2, 3, 5
    fake = np.array([[-2.9], [-3.1], [10.9], [11.1]])
    precision, _ = precision_recall(real, fake, k=2)
    assert precision == 0.5


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "features"), [(30, 1), (100, 4), (650, 16)])
def test_precision_and_recall_are_those_of_prdc(n, features, k):
    """It counts a point within the radius, and we one on it, as eq. 2 says; random points are never on it."""
    rng = np.random.default_rng(n)
    real, fake = rng.standard_normal((n, features)), 0.7 * rng.standard_normal((n, features)) + 0.9
    theirs = compute_prdc(real, fake, k)
    assert precision_recall(real, fake, k) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < theirs["precision"] * theirs["recall"] < 1


def test_precision_and_recall_refuse_sets_of_different_sizes():
    with pytest.raises(ValueError, match="one size"):
        precision_recall(np.zeros((10, 2)), np.zeros((11, 2)))


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 10), (3, 7), (81, 263), (999, 1000), (50, 50)])
def test_wilson_interval_is_that_of_scipy(hits, trials):
    z95 = 1.959963984540054
    theirs = binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits, trials, z95) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_interval_as_published():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert low == pytest.approx(0.2553, abs=1e-4)
    assert high == pytest.approx(0.3662, abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1
