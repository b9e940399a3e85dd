"""How much work arrives that overtakes: rates by size, and what they do to a job."""

from __future__ import annotations

import pytest

from service.engine.arrivals import SIZES, WINDOW_S, Arrivals, evaluations

RATE = 100.0


def fed(work: int, every_s: float, seconds: float) -> Arrivals:
    arrivals = Arrivals()
    for n in range(int(seconds / every_s) + 1):
        arrivals.add(work, n * every_s)
    return arrivals


def test_without_arrivals_nothing_is_slower() -> None:
    assert Arrivals().slower(RATE, 8, 5.0) == [1.0] * SIZES


def test_only_larger_jobs_are_slowed_and_by_the_share_that_arrives() -> None:
    arrivals = fed(work=50, every_s=1.0, seconds=600.0)  # half of the device
    slower = arrivals.slower(RATE, 8, 600.0)
    assert slower[5] == 1.0  # up to 31 evaluations: nothing overtakes
    assert slower[10] == pytest.approx(2.0, rel=0.05)
    assert 1 < slower[6] < slower[7]  # half of those of about its size


def test_more_than_the_device_can_do_slows_no_further_than_the_steps_in_order_of_arrival_allow() -> None:
    assert fed(work=500, every_s=1.0, seconds=100.0).slower(RATE, 8, 100.0)[-1] == 8.0


def test_one_job_is_not_a_rate_and_does_not_overtake_itself() -> None:
    arrivals = Arrivals()
    arrivals.add(500, 0.0)
    slower = arrivals.slower(RATE, 8, 0.0)
    assert slower[9] == 1.0
    # 500 evaluations in 20 s would be a quarter of the device; a third is believed.
    assert 1 < slower[12] < 1.2


def test_arrivals_are_forgotten() -> None:
    arrivals = fed(work=50, every_s=1.0, seconds=60.0)
    assert arrivals.slower(RATE, 8, 60.0 + 10 * WINDOW_S)[10] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("jump", [-1000.0, 1000.0])
def test_a_clock_that_jumps_does_no_harm(jump: float) -> None:
    arrivals = fed(work=50, every_s=1.0, seconds=60.0)
    arrivals.add(50, 60.0 + jump)
    assert all(1 <= factor <= 8 for factor in arrivals.slower(RATE, 8, 60.0 + jump))


def test_work_ahead_and_its_own_take_longer_by_what_overtakes_them() -> None:
    slower = [1.0] * 6 + [2.0] * (SIZES - 6)  # what has 32 or more left is overtaken
    assert evaluations(100, 31, slower) == 131
    assert evaluations(100, 63, slower) == 200 + 31 + 2 * 32
