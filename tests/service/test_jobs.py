"""Which changes of state are legal, and that the others change nothing."""

from __future__ import annotations

from itertools import product

import pytest

from service.jobs import IllegalTransitionError, State
from tests.service.fakes import counting_job

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
