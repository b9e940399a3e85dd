from __future__ import annotations

import math

import numpy as np
import pytest

from model import noise
from model.chain import InitialLatent
from model.interpolation import angle_between, linear, mixed, spherical

SHAPE = (1, 8, 8)
SHARES = [0.0, 0.1, 0.25, 0.5, 0.8, 1.0]


@pytest.mark.parametrize("angle", [math.pi / 2, 1.0, 2.5, 0.01, 0.0, math.pi])
def test_every_path_begins_and_ends_exactly(angle: float) -> None:
    assert linear(0.0) == spherical(0.0, angle) == (1.0, 0.0)
    assert linear(1.0) == spherical(1.0, angle) == (0.0, 1.0)


@pytest.mark.parametrize("share", SHARES)
def test_independent_noise_keeps_its_variance_on_the_circle_alone(share: float) -> None:
    u, v = spherical(share)
    assert (u, v) == pytest.approx((math.cos(share * math.pi / 2), math.sin(share * math.pi / 2)))
    assert u**2 + v**2 == pytest.approx(1.0)
    assert sum(weight**2 for weight in linear(0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.8])
@pytest.mark.parametrize("share", SHARES)
def test_points_on_the_circle_are_evenly_spaced(angle: float, share: float) -> None:
    a, b = np.array([1.0, 0.0]), np.array([math.cos(angle), math.sin(angle)])
    u, v = spherical(share, angle)
    expected = [math.cos(share * angle), math.sin(share * angle)]
    np.testing.assert_allclose(u * a + v * b, expected, atol=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-9, math.pi])
def test_collinear_vectors_are_mixed_on_the_straight_line(angle: float) -> None:
    assert spherical(0.3, angle) == linear(0.3)


def test_the_angle_between_latents() -> None:
    a = noise.normal(1, 0, SHAPE)
    b = a.copy()
    b[0, :4] *= -1
    across = a.copy()
    across[0, 4:], across[0, :4] = 0, 0
    across[0, 0, 0], across[0, 0, 1] = -a[0, 0, 1], a[0, 0, 0]
    assert angle_between(a, a) == pytest.approx(0, abs=1e-7)
    assert angle_between(a, -3 * a) == pytest.approx(math.pi)
    assert angle_between(a, across) == pytest.approx(math.pi / 2)
    assert math.cos(angle_between(a, b)) == pytest.approx(float((a * b).sum() / (a * a).sum()), abs=1e-6)


def test_a_mix_of_mixes() -> None:
    image, other = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    ends = [InitialLatent(((0.5, image),), ((0.8, 1),)), InitialLatent(((0.5, other),), ((0.8, 2),))]
    both = mixed((0.25, 0.75), ends)
    assert [(weight, id(values)) for weight, values in both.images] == [
        (0.125, id(image)),
        (0.375, id(other)),
    ]
    assert [seed for _, seed in both.noises] == [1, 2]
    assert [weight for weight, _ in both.noises] == pytest.approx([0.2, 0.6])


def test_terms_of_weight_zero_are_left_out() -> None:
    ends = [InitialLatent(noises=((1.0, 1),)), InitialLatent(noises=((1.0, 2),))]
    assert mixed((1.0, 0.0), ends).noises == ((1.0, 1),)
    assert mixed((0.0, 1.0), ends).noises == ((1.0, 2),)
