"""Deadlines: what is accepted is met, whatever comes later; what cannot be is refused."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec
from service.engine.messages import Failed, Queued
from service.engine.scheduler import Scheduler
from service.errors import DeadlineError
from tests.service.engine.test_scheduler import add, scheduler, step
from tests.service.fakes import counting_job, counting_stage

CURVE = StepTimes([(1, 0.008), (2, 0.007), (4, 0.013), (8, 0.023)])
Asked = tuple[float, int, int, int, float | None, str]
REQUESTS: st.SearchStrategy[Asked] = st.tuples(
    st.sampled_from([0.0, 0.05, 0.5, 2.0]),  # seconds after the one before
    st.integers(1, 12),  # images
    st.integers(1, 40),  # steps
    st.integers(1, 2),  # rows of an image
    st.none() | st.floats(0.5, 6.0),  # how often the time that it takes alone may pass
    st.sampled_from("ab"),  # whose it is
)


def request(under: Scheduler, name: str, asked: Asked, now: float) -> JobSpec:
    _, images, steps, rows, patience, owner = asked
    alone = steps * max(1, images * rows / under.max_batch_size) * under.times.at(under.max_batch_size)
    deadline = None if patience is None else now + patience * alone
    return JobSpec(name, "ddim", (counting_stage(images, steps, rows),), deadline, owner=owner)


def run(under: Scheduler, requests: list[Asked]) -> tuple[dict[str, float], dict[str, float]]:
    """Serve requests in virtual time. Returns the deadlines that were accepted, and the ends of all jobs."""
    now, names = 0.0, count()
    promised: dict[str, float] = {}
    ended: dict[str, float] = {}
    coming = list(requests)[::-1]
    arrival = coming[-1][0]
    while coming or len(under):
        while coming and arrival <= now:
            spec = request(under, str(next(names)), coming.pop(), now)
            (event,) = under.add(spec, now)
            if isinstance(event, Queued) and spec.deadline is not None:
                promised[spec.id] = spec.deadline
            if coming:
                arrival += coming[-1][0]
        batch = under.schedule(now)
        if not batch.samples:
            now = max(now, arrival)
            continue
        now += under.times.at(batch.size)
        for job in under.commit(batch.samples):
            if under.stage_done(job):
                under.finish(job)
                ended[job.id] = now
    return promised, ended


@settings(max_examples=60, deadline=None)
@given(
    st.lists(REQUESTS, min_size=1, max_size=14),
    st.sampled_from(["remaining", "fifo", "sharing"]),
    st.integers(1, 8),
)
@example([(0.0, 8, 40, 1, None, "a"), (0.0, 1, 10, 1, 1.5, "a")], "fifo", 8)  # behind work without a deadline
@example([(0.0, 8, 20, 1, 1.5, "a"), (0.0, 8, 20, 1, 1.5, "b")], "remaining", 8)  # not both
def test_an_accepted_deadline_is_met_whatever_comes_later(
    requests: list[Asked], policy: str, rows: int
) -> None:
    promised, ended = run(Scheduler(rows, CURVE, policy), requests)  # type: ignore[arg-type]
    assert {name: ended[name] for name, due in promised.items() if ended[name] > due} == {}


def test_two_that_cannot_both_be_met_are_not_both_accepted() -> None:
    under = scheduler(max_batch_size=1)
    add(under, counting_job("a", steps=10, deadline=13.0))
    (event,) = under.add(counting_job("b", steps=10, deadline=15.0), 0.0)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    assert "beside earlier ones" in str(event.error)
    (event,) = under.add(counting_job("c", steps=5, deadline=7.0), 0.0)
    assert isinstance(event, Failed)
    assert "without making another request late" in str(event.error)
    add(under, counting_job("d", steps=10, deadline=25.0))


def test_a_deadline_goes_first_only_when_it_has_to() -> None:
    under = scheduler(max_batch_size=1)
    add(under, counting_job("due", steps=10, deadline=30.0))
    add(under, counting_job("short", steps=5))
    now, order = 0.0, []
    while len(under):
        (sample,) = under.schedule(now).samples
        order.append(sample.job.id)
        step(under, now)
        now += 1.0
    # Each has its first step, then the one with less to do ends; nothing is due for long.
    assert order[:6].count("short") == 5

    under = scheduler(max_batch_size=1)
    add(under, counting_job("due", steps=10, deadline=12.0))
    add(under, counting_job("short", steps=5))
    assert [step(under, float(now)) for now in range(10)][-1] == ["due"]


def test_steps_with_others_give_way_to_quicker_ones_without() -> None:
    under = Scheduler(8, CURVE)
    add(under, counting_job("others", n=8, steps=50))
    add(under, counting_job("due", steps=40, deadline=40 * 0.008 * 1.3))
    now, widths = 0.0, []
    while "due" in under._jobs:
        batch = under.schedule(now)
        widths.append(batch.size)
        step(under, now)
        now += CURVE.at(batch.size)
    assert now <= 40 * 0.008 * 1.3
    assert 1 in widths


def test_an_engine_that_replaces_another_refuses_only_what_is_certain_to_be_late() -> None:
    under = scheduler(max_batch_size=1)
    add(under, counting_job("a", steps=10, deadline=13.0))
    spec = counting_job("b", steps=10, deadline=15.0)
    (event,) = under.add(spec, 0.0, again=True)
    assert isinstance(event, Queued)
    (event,) = under.add(counting_job("c", steps=10, deadline=9.0), 0.0, again=True)
    assert isinstance(event, Failed)


@pytest.mark.parametrize("owner", ["a", "b"])
def test_no_more_is_promised_to_a_client_than_its_share(owner: str) -> None:
    under = scheduler(max_batch_size=4)
    stages = (counting_stage(4, 20, 1),)
    add(under, JobSpec("first", "ddim", stages, owner="b"))
    add(under, JobSpec("small", "ddim", (counting_stage(1, 1, 1),), 100.0, owner="c"))
    spec = JobSpec("second", "ddim", stages, 30.0, owner=owner)
    (event,) = under.add(spec, 0.0)
    assert isinstance(event, Failed)
    assert "share" in str(event.error)


def test_a_job_that_will_be_late_whatever_goes_first_keeps_no_other_waiting() -> None:
    under = scheduler(max_batch_size=1)
    add(under, counting_job("late", steps=10, deadline=12.0))
    add(under, counting_job("other", steps=3))
    assert step(under, 11.0) == []  # the machine stood still
    assert [name for now in range(3) for name in step(under, 11.0)] == ["other"]
