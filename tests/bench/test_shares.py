"""A greedy client beside a modest one, in virtual time."""

from __future__ import annotations

from functools import cache
from math import inf

import numpy as np

from bench.shares import GREEDY, MODEST, MODEST_STEPS, SLOTS, Asked, Contest, contests
from bench.simulate import clients
from bench.simulation import CURVES, Case

BASE = Case(CURVES["cpu"], arrivals=100)


@cache
def found() -> tuple[tuple[str, Contest, list[Asked]], ...]:
    return tuple(contests(BASE))


def mean_wait(done: list[Asked]) -> float:
    return float(np.mean([asked.ended - asked.sent for asked in done if asked.ended < inf]))


def test_alone_nothing_is_refused() -> None:
    _, contest, done = found()[0]
    assert [asked.refusals for asked in done] == [0] * 100
    assert contest.rows == {GREEDY: 0, MODEST: 100 * MODEST_STEPS}
    assert contest.slots.taken == 0


def test_without_shares_a_greedy_client_shuts_the_other_out() -> None:
    _, contest, done = found()[1]
    assert contest.slots.taken > SLOTS - 64 * 2
    assert sum(asked.refusals > 0 for asked in done) > 50
    assert mean_wait(done) > 20 * mean_wait(found()[0][2])


def test_with_shares_it_is_served_and_nothing_stands_still() -> None:
    _, contest, done = found()[2]
    assert all(asked.ended < inf for asked in done)
    assert mean_wait(done) < mean_wait(found()[1][2]) / 5
    rows = sum(contest.rows.values())
    assert rows / contest.now > 0.9 * BASE.capacity
    assert contest.rows[MODEST] == 100 * MODEST_STEPS


def test_the_table_has_a_row_for_each() -> None:
    assert clients(BASE).count("greedy") == 2
