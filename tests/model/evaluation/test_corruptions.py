from __future__ import annotations

import numpy as np
import pytest

from model.evaluation.corruptions import CORRUPTIONS, NOISE

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 12)).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_every_image_and_nothing_else(name: str) -> None:
    before = IMAGES.copy()
    made = CORRUPTIONS[name](IMAGES)
    assert made.dtype == np.uint8
    assert made.shape == IMAGES.shape
    assert (made != IMAGES).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(IMAGES, before)
    np.testing.assert_array_equal(CORRUPTIONS[name](IMAGES), made)


@pytest.mark.parametrize("name", ["inversion", "upside down"])
def test_twice_is_not_at_all(name: str) -> None:
    corrupt = CORRUPTIONS[name]
    np.testing.assert_array_equal(corrupt(corrupt(IMAGES)), IMAGES)


def test_noise_has_its_spread() -> None:
    grey = np.full((4, 1, 64, 64), 128, np.uint8)
    off = CORRUPTIONS["noise"](grey).astype(float) - 128
    assert off.std() == pytest.approx(NOISE, rel=0.03)
    assert off.mean() == pytest.approx(0, abs=1)
    assert CORRUPTIONS["noise"](np.full((1, 1, 64, 64), 255, np.uint8)).min() > 100  # clipped, not wrapped


def test_a_blur_keeps_the_mean_and_takes_the_detail() -> None:
    made = CORRUPTIONS["blur"](IMAGES)
    assert made.mean() == pytest.approx(IMAGES.mean(), rel=0.03)
    assert made.std() < 0.6 * IMAGES.std()
    dots = np.zeros((2, 1, 9, 9), np.uint8)
    dots[0, 0, 4, 4] = 255
    assert CORRUPTIONS["blur"](dots)[1].max() == 0  # images do not run into one another


def test_upside_down_is_the_rows_the_other_way() -> None:
    np.testing.assert_array_equal(CORRUPTIONS["upside down"](IMAGES)[:, :, 0], IMAGES[:, :, -1])
