"""Step times, prefix sums, and how long a job takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.estimates import StepTimes
from service.engine.order import PrefixSums


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(-9, 9)), max_size=30), st.integers(0, 6000))
def test_prefix_sums_are_sums(added: list[tuple[int, int]], key: int) -> None:
    sums = PrefixSums()
    for place, value in added:
        sums.add(place, value)
    assert sums.total == sum(value for _, value in added)
    for at in (key, *(place for place, _ in added)):
        assert sums.at(at) == sum(value for place, value in added if place == at)
        assert sums.below(at) == sum(value for place, value in added if place < at)


# ── Step times ─────────────────────────────────────────────────────────────────────────────────


def test_step_times_lie_on_straight_lines_between_the_points() -> None:
    times = StepTimes([(2, 1.0), (4, 2.0), (8, 3.0)])
    assert [times.at(size) for size in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 6.0]


def test_step_times_follow_what_is_measured() -> None:
    times = StepTimes([(1, 1.0), (3, 3.0)])
    times.observe(1, 2.0)
    assert times.at(1) == pytest.approx(1.1)
    times.observe(2, 2.05)  # a size not seen before begins on its line
    assert times.at(2) == pytest.approx(2.05)
    assert times.at(3) == 3.0
    for _ in range(100):
        times.observe(3, 5.0)
    assert times.at(3) == pytest.approx(5.0, rel=1e-3)


def test_the_knee_is_the_smallest_size_near_the_best_rate() -> None:
    assert StepTimes([(1, 1.0), (2, 1.0), (4, 1.0), (8, 2.0), (16, 4.0)]).knee() == 4
    assert StepTimes([(1, 1.0), (2, 1.94), (4, 3.85)]).knee() == 1
    assert StepTimes([(1, 1.0), (2, 1.5), (4, 2.9)]).knee() == 2


def test_the_quickest_steps_are_remembered_through_a_pause() -> None:
    times = StepTimes([(1, 1.0), (4, 4.0)])
    times.observe(2, 100.0)
    assert times.at(2) == pytest.approx(11.8)
    assert times.quickest.at(2) == pytest.approx(2.0)
    for _ in range(200):
        times.observe(2, 1.0)
    assert times.quickest.at(2) == pytest.approx(1.0)
    times.observe(4, 100.0)
    assert times.quickest.at(4) == 4.0
