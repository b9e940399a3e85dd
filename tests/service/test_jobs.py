"""Which changes of state are legal, and that the others change nothing."""

from __future__ import annotations

from itertools import product

import pytest
from service.jobs import IllegalTransitionError, Job, Sequel, State

from tests.service.fakes import Counting, Steps, counting_job

LEGAL = {
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.FAILED),
    (State.WAITING, State.CANCELLED),
    (State.RUNNING, State.FINISHED),
    (State.RUNNING, State.FAILED),
    (State.RUNNING, State.CANCELLED),
}


@pytest.mark.parametrize(("before", "after"), LEGAL, ids=str)
def test_a_legal_change_happens(before: State, after: State) -> None:
    job = counting_job("a")
    job.state = before
    job.move_to(after)
    assert job.state is after


@pytest.mark.parametrize(("before", "after"), sorted(set(product(State, State)) - LEGAL, key=str), ids=str)
def test_an_illegal_change_raises_and_changes_nothing(before: State, after: State) -> None:
    job = counting_job("a", n=3, steps=7, rows=2)
    job.state = before
    with pytest.raises(IllegalTransitionError, match="job a"):
        job.move_to(after)
    assert (job.state, job.started, job.remaining, len(job.samples)) == (before, None, 42, 3)


def test_the_ends_are_ends() -> None:
    job = counting_job("a")
    ends = {State.FINISHED, State.FAILED, State.CANCELLED}
    for state in State:
        job.state = state
        assert job.over == (state in ends)


def test_remaining_work_counts_rows() -> None:
    job = counting_job("a", n=2, steps=10, rows=2)
    assert job.remaining == 40
    sample = job.samples[1]
    sample.row = 4
    assert (sample.index, sample.steps, sample.remaining) == (1, 10, 12)


def in_two_parts() -> tuple[Job, Job]:
    """A job of two images in three steps, and its sequel of five in ten."""
    last = counting_job("a", n=5, steps=10)
    first = counting_job("a", n=2, steps=3)
    plan = Steps(10)
    first.sequel = Sequel(last, lambda pictures: [Counting(plan, sum(pictures)) for _ in range(5)])
    return first, last


def test_a_sequel_counts_from_the_start() -> None:
    first, last = in_two_parts()
    assert (first.remaining, first.later, first.room) == (6, 50, 5)
    assert (last.remaining, last.later, last.room) == (50, 0, 5)
    assert counting_job("b", n=3).room == 3


def test_a_sequel_runs_as_if_it_had_all_the_time() -> None:
    first, last = in_two_parts()
    first.started = 12.5
    assert first.go_on([3, 4]) is last
    assert (last.state, last.started) == (State.RUNNING, 12.5)
    assert [sample.chain.seed for sample in last.samples] == [7] * 5
