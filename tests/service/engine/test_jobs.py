"""Which changes of state are legal, and what work is left."""

from __future__ import annotations

from itertools import product

import pytest

from service.engine.jobs import IllegalTransitionError, Job, JobSpec, State
from tests.service.fakes import counting_job, counting_stage

LEGAL = {
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.FAILED),
    (State.WAITING, State.CANCELLED),
    (State.RUNNING, State.FINISHED),
    (State.RUNNING, State.FAILED),
    (State.RUNNING, State.CANCELLED),
}


@pytest.mark.parametrize(("before", "after"), sorted(LEGAL, key=str), ids=str)
def test_a_legal_change_happens(before: State, after: State) -> None:
    job = Job(counting_job("a"))
    job.state = before
    job.move_to(after)
    assert job.state is after


@pytest.mark.parametrize(("before", "after"), sorted(set(product(State, State)) - LEGAL, key=str), ids=str)
def test_an_illegal_change_raises_and_changes_nothing(before: State, after: State) -> None:
    job = Job(counting_job("a", n=3, steps=7, evaluations=2))
    job.state = before
    with pytest.raises(IllegalTransitionError, match="job a"):
        job.move_to(after)
    assert (job.state, job.started, job.remaining, len(job.samples)) == (before, None, 42, 3)


def test_the_ends_are_ends() -> None:
    for end in (State.FINISHED, State.FAILED, State.CANCELLED):
        job = Job(counting_job("a"))
        assert not job.over
        job.move_to(State.RUNNING)
        assert not job.over
        job.move_to(end)
        assert job.over


def test_remaining_work_counts_evaluations() -> None:
    job = Job(counting_job("a", n=2, steps=10, evaluations=2))
    assert job.remaining == job.spec.evaluations == 40
    sample = job.samples[1]
    sample.step = 4
    assert (sample.index, sample.steps, sample.remaining, sample.evaluations) == (1, 10, 12, 2)


# ── Stages ─────────────────────────────────────────────────────────────────────────────────────


def two_stages() -> JobSpec:
    """Two samples in three steps, then five in ten."""
    return JobSpec("a", "ddim", (counting_stage(2, 3), counting_stage(5, 10)))


def test_a_job_counts_all_its_stages_from_the_start() -> None:
    spec = two_stages()
    assert (spec.evaluations, spec.slots) == (56, 5)
    assert (Job(spec).remaining, counting_job("b", n=3).slots) == (56, 3)


def test_the_next_stage_has_samples_of_its_own() -> None:
    job = Job(two_stages())
    job.started = 12.5
    job.move_to(State.RUNNING)
    assert (len(job.samples), job.last_stage) == (2, False)
    job.next_stage()
    assert (len(job.samples), job.last_stage) == (5, True)
    assert all((sample.job, sample.step) == (job, 0) for sample in job.samples)
    assert (job.state, job.started) == (State.RUNNING, 12.5)
