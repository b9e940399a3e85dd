import numpy as np
import pytest

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


def test_precision_and_recall_refuse_sets_of_different_sizes():
    with pytest.raises(ValueError, match="one size"):
        precision_recall(np.zeros((10, 2)), np.zeros((11, 2)))


def test_wilson_interval_as_published():
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert low == pytest.approx(0.2553, abs=1e-4)
    assert high == pytest.approx(0.3662, abs=1e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1
