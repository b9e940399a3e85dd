"""What is kept of a job while it runs."""

from __future__ import annotations

import time

import numpy as np
import pytest

from service.engine.messages import Picture, Preview, Queued
from service.http.progress import Run
from tests.service.tasks.test_sampling import prepare


def preview(step: int, *indices: int, eta_s: float = 1.0) -> Preview:
    pixels = np.full((8, 8, 1), step, np.uint8)
    pictures = tuple(Picture(index, 7 + index, "x0", pixels) for index in indices)
    return Preview("job", step, 10, 100 - step, eta_s, pictures)


def run(images: int) -> Run:
    return Run("txt2img", "", prepare({"n": images}))


def test_the_fraction_counts_every_image() -> None:
    there = run(2)
    assert there.fraction == 0
    there.hear(preview(4, 0))
    assert there.fraction == pytest.approx(4 / 20)
    there.hear(preview(6, 0, 1))
    assert there.fraction == pytest.approx(12 / 20)


def test_the_latest_picture_of_each_image_is_kept() -> None:
    there = run(2)
    there.hear(preview(4, 0, 1))
    there.hear(preview(6, 1))
    assert {index: int(each.pixels[0, 0, 0]) for index, each in there.pictures.items()} == {0: 4, 1: 6}


def test_the_time_left_passes_and_never_falls_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    there = run(1)
    assert there.eta_s == 0
    there.hear(Queued("job", 0, 5.0))
    clock[0] += 2
    assert there.eta_s == pytest.approx(3.0)
    there.hear(preview(1, 0, eta_s=1.0))
    assert there.eta_s == pytest.approx(1.0)
    clock[0] += 2
    assert there.eta_s == 0
