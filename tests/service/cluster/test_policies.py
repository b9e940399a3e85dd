from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cluster.policies import ReplicaLoad, by_requests, by_work, choose, desired_replicas


def load(name, evaluations=0.0, ongoing=0, slots_free=1, rows_per_s=100.0):
    return ReplicaLoad(name, evaluations, rows_per_s, ongoing, slots_free)


def test_seconds_are_work_over_the_rate():
    assert load("a", 50.0).seconds == 0.5
    assert load("a", 50.0, rows_per_s=0.0).seconds == float("inf")


def test_fewer_requests_go_before_less_work():
    one_long, three_short = load("long", 1000.0, 1), load("short", 60.0, 3)
    assert choose([one_long, three_short], Random(0)) == ["long", "short"]
    assert choose([one_long, three_short], Random(0), key=by_work) == ["short", "long"]


def test_less_work_decides_among_equals():
    assert choose([load("a", 100.0, 1), load("b", 20.0, 1)], Random(0)) == ["b", "a"]


def test_a_full_replica_comes_last():
    full, busy = load("full", slots_free=0), load("busy", 900.0, 9)
    for key in (by_requests, by_work):
        assert choose([full, busy], Random(0), key=key) == ["busy", "full"]


def test_the_rate_counts():
    slow, fast = load("slow", 100.0, 1, rows_per_s=10.0), load("fast", 200.0, 1, rows_per_s=1000.0)
    assert choose([slow, fast], Random(0))[0] == "fast"


def test_two_are_drawn_evenly_and_no_others_are_looked_at():
    loads, random = [load(str(i)) for i in range(10)], Random(0)
    drawn = [choose(loads, random) for _ in range(5000)]
    assert all(len(set(pair)) == 2 for pair in drawn)
    counts = [sum(str(i) in pair for pair in drawn) for i in range(10)]
    assert min(counts) > 900  # 1000 each; a standard deviation is 28
    assert max(counts) < 1100
    first = [sum(pair[0] == str(i) for pair in drawn) for i in range(10)]
    assert min(first) > 400  # idle replicas are used alike


def test_fewer_replicas_than_choices():
    assert choose([], Random(0)) == []
    assert choose([load("a")], Random(0)) == ["a"]
    with pytest.raises(ValueError, match="among"):
        choose([load("a")], Random(0), among=0)


def test_replicas_follow_the_work():
    loads = [load(str(i), 400.0) for i in range(5)]  # 4 s each
    assert desired_replicas(loads, 4.0, 5, 1, 100) == 5
    assert desired_replicas(loads, 1.0, 5, 1, 100) == 20
    assert desired_replicas(loads, 1.0, 20, 1, 100) == 20  # 15 of which still start: not ordered again
    assert desired_replicas(loads, 40.0, 5, 1, 100) == 1


def test_a_small_difference_changes_nothing():
    loads = [load(str(i), 420.0) for i in range(10)]
    assert desired_replicas(loads, 4.0, 10, 1, 100) == 10  # 10.5 wanted
    assert desired_replicas(loads, 3.0, 10, 1, 100) == 14


def test_nothing_is_known_of_a_fleet_that_starts():
    assert desired_replicas([], 1.0, 3, 1, 10) == 3
    assert desired_replicas([load("a", rows_per_s=0.0)], 1.0, 3, 1, 10) == 3
    assert desired_replicas([], 1.0, 0, 2, 10) == 2


@pytest.mark.parametrize(("target", "lower", "upper"), [(0.0, 1, 2), (1.0, 3, 2), (1.0, -1, 2)])
def test_bounds_that_make_no_sense_are_refused(target, lower, upper):
    with pytest.raises(ValueError, match="target_s"):
        desired_replicas([load("a")], target, 1, lower, upper)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0.1, 100),
    st.integers(0, 200),
    st.integers(0, 50),
    st.integers(50, 100),
)
def test_more_work_never_wants_fewer_replicas(work, target, current, lower, upper):
    loads = [load(str(i), each) for i, each in enumerate(work)]
    found = desired_replicas(loads, target, current, lower, upper)
    assert lower <= found <= upper
    more = [*loads[:-1], load("last", work[-1] * 2)]
    assert desired_replicas(more, target, current, lower, upper) >= found
