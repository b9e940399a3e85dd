"""Owners share every step, whatever they have in flight; within one the policy decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.scheduler import Policy, Scheduler
from tests.service.engine.test_scheduler import add, launch, read, scheduler, step
from tests.service.fakes import counting_job

POLICIES: list[Policy] = ["remaining", "fifo", "sharing"]


def give(under: Scheduler, owner: str, name: str, n: int = 1, steps: int = 10, evaluations: int = 1) -> None:
    add(under, replace(counting_job(name, n, steps, evaluations), owner=owner))


def rows(under: Scheduler) -> Counter[str]:
    """What each owner has of the next step."""
    batch = launch(under)
    read(under, batch)
    counted: Counter[str] = Counter()
    for sample in batch.samples:
        counted[sample.job.spec.owner] += 1
    return counted


@pytest.mark.parametrize("policy", POLICIES)
def test_the_rows_of_a_step_are_shared_by_owner_and_not_by_job(policy: Policy) -> None:
    under = scheduler(8, policy)
    for i in range(20):
        give(under, "greedy", f"g{i}", 4, 5)
    give(under, "other", "one", 8, 50)
    assert all(rows(under) == {"greedy": 4, "other": 4} for _ in range(40))


def test_what_an_owner_cannot_use_goes_to_the_others() -> None:
    under = scheduler(8)
    give(under, "a", "a", 20)
    give(under, "b", "b", 1)
    give(under, "c", "c", 20)
    first, second = rows(under), rows(under)
    assert first["b"] == second["b"] == 1
    assert first["a"] + second["a"] == first["c"] + second["c"] == 7


def test_with_fewer_rows_than_owners_they_take_turns() -> None:
    under = scheduler(1)
    for owner in "abc":
        give(under, owner, owner, 1, 20)
    turns = [next(iter(rows(under))) for _ in range(12)]
    assert all(set(turns[i : i + 3]) == {"a", "b", "c"} for i in range(10))


def test_guided_samples_count_twice() -> None:
    under = scheduler(8)
    give(under, "guided", "g", 20, 20, evaluations=2)
    give(under, "plain", "p", 20, 20)
    assert rows(under) == {"guided": 2, "plain": 4}


def test_endless_short_jobs_of_one_do_not_starve_a_long_one_of_another() -> None:
    """With one owner the long job has only the steps in order of arrival, one in eight."""

    def steps_taken(other: str) -> int:
        under = scheduler(1, fifo_interval=8)
        give(under, other, "long", 1, 50)
        for count in range(1, 1000):
            give(under, "greedy", f"short {count}", 1, 1)
            if "long" in step(under):
                return count
        raise AssertionError("never")

    assert steps_taken("greedy") == 50 * 8
    assert steps_taken("other") <= 2 * 50 + 1


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6)


@settings(max_examples=60)
@given(
    st.lists(shapes, min_size=2, max_size=4), st.integers(1, 12), st.sampled_from(POLICIES), st.integers(2, 9)
)
def test_every_owner_has_its_part_of_every_step_or_all_it_needs(
    owners: list[list[tuple[int, int]]], size: int, policy: Policy, interval: int
) -> None:
    under = scheduler(size, policy, interval)
    for who, jobs in enumerate(owners):
        for i, (n, steps) in enumerate(jobs):
            give(under, str(who), f"{who}.{i}", n, steps)
    backlog = {str(who): sum(n * steps for n, steps in jobs) for who, jobs in enumerate(owners)}
    while len(under):
        unfinished: Counter[str] = Counter()
        for job in under._jobs.values():
            unfinished[job.spec.owner] += len(under._active[job.id])
        had = rows(under)
        assert sum(had.values()) == min(size, sum(unfinished.values()))
        for owner, count in unfinished.items():
            assert had[owner] >= min(count, size // len(unfinished))
            backlog[owner] -= had[owner]
            lane = under._lanes.get(owner)
            assert (lane.backlog if lane else 0) == backlog[owner]
    assert under._lanes == {}


def test_a_job_of_another_owner_is_hardly_ahead() -> None:
    under = scheduler(4, "fifo", 10**6)
    for i in range(10):
        give(under, "greedy", f"g{i}", 8, 10)
    give(under, "other", "one", 4, 10)
    job = under._jobs["one"]
    located = under.locate("one")
    assert located is not None
    assert located.position == 0
    assert under.eta(job) == 20.0  # half of every step
    forecast = dict(under.forecast())
    assert forecast["one"] == 20.0
    ends = next(count for count in range(1, 100) if "one" in step(under))
    assert ends == 20


@pytest.mark.parametrize("policy", ["remaining", "fifo"])
def test_the_forecast_comes_true_when_nobody_else_comes(policy: Policy) -> None:
    under = scheduler(4, policy, 10**6)
    for name, n, steps in [("a", 8, 5), ("b", 4, 3), ("c", 12, 4), ("d", 4, 30)]:
        give(under, "", name, n, steps)
    promised = dict(under.forecast())
    ends: dict[str, float] = {}
    for count in range(1, 60):
        ends |= dict.fromkeys(step(under), float(count))
    assert promised == ends
