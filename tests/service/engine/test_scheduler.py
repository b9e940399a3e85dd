"""The scheduler under a clock of the tests' own: counts, ends, bounds, policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.estimates import StepTimes, shortest
from service.engine.jobs import Job, JobSpec, State
from service.engine.messages import Cancelled, Failed, Located, Queued
from service.engine.scheduler import Batch, Policy, Scheduler
from service.errors import DeadlineError
from tests.service.fakes import counting_job, counting_stage

STEP_S = 1.0


def scheduler(max_batch_size: int = 4, policy: Policy = "remaining", fifo_interval: int = 8) -> Scheduler:
    """Every step takes a second, whatever its size."""
    return Scheduler(max_batch_size, StepTimes([(1, STEP_S), (4096, STEP_S)]), policy, fifo_interval)


def add(under: Scheduler, spec: JobSpec, now: float = 0.0) -> Job:
    """The job in flight."""
    (event,) = under.add(spec, now)
    assert isinstance(event, Queued)
    return under._jobs[spec.id]


def launch(under: Scheduler, now: float = 0.0) -> Batch:
    """Choose a step and count it, before its results are there."""
    batch = under.schedule(now)
    under.in_flight = batch.size
    under.commit(batch.samples)
    return batch


def read(under: Scheduler, batch: Batch, behind: Sequence[Batch] = ()) -> list[str]:
    """What follows from a step's results: stages follow one another. Returns the ids of finished jobs.

    behind: later steps that have been launched; a stage whose samples are in those has not ended.
    """
    finished = []
    unread = {sample.job for later in behind for sample in later.samples}
    for job in dict.fromkeys(sample.job for sample in batch.samples):
        if job.over or job in unread or not under.stage_done(job):
            continue
        if job.last_stage:
            under.finish(job)
            finished.append(job.id)
        else:
            under.next_stage(job)
    if not behind:
        under.in_flight = 0
    return finished


def step(under: Scheduler, now: float = 0.0) -> list[str]:
    return read(under, launch(under, now))


@dataclass
class Ahead:
    """Steps as the engine makes them: each is launched before the one before it is read."""

    under: Scheduler
    flight: Batch | None = None

    def step(self) -> list[str]:
        before, self.flight = self.flight, launch(self.under)
        return read(self.under, before, [self.flight]) if before is not None else []


def chosen(batch: Batch) -> Counter[str]:
    return Counter(sample.job.id for sample in batch.samples)


def steps_until(under: Scheduler, job: Job, limit: int = 100_000) -> int:
    for count in range(1, limit):
        step(under)
        if job.over:
            return count
    raise AssertionError(f"{job.id} is not over after {limit} steps")


# ── Who waits for whom ─────────────────────────────────────────────────────────────────────────


def press(under: Scheduler, count: int) -> None:
    """Top up with one-step jobs: enough that they alone could fill every step."""
    for i in range(under.max_batch_size - under.waiting):
        under.add(counting_job(f"new{count}.{i}", steps=1), 0)


def steps_under_pressure(fifo_interval: int, limit: int, ahead: bool = False) -> int | None:
    """Steps that a 20-image job takes while there are always enough one-step jobs to fill the step."""
    under = scheduler(max_batch_size=8, fifo_interval=fifo_interval)
    big = add(under, counting_job("big", n=20, steps=30))
    make = Ahead(under).step if ahead else lambda: step(under)
    make()
    for count in range(1, limit):
        press(under, count)
        make()
        if big.over:
            return count + 1
    return None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("interval", [2, 4, 8])
def test_a_big_job_finishes_under_an_endless_stream_of_small_ones(interval: int, ahead: bool) -> None:
    alone = 20 * 30 / 8
    taken = steps_under_pressure(interval, interval * 80 + interval, ahead)
    assert taken is not None
    assert taken <= interval * (alone + 1) + ahead  # its results are read a step later


def test_without_the_fifo_step_it_would_starve() -> None:
    assert steps_under_pressure(fifo_interval=10**9, limit=1000) is None


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 2)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_starvation_is_bounded_by_the_work_that_came_before(sizes: list[tuple[int, int, int]]) -> None:
    under = scheduler(max_batch_size=8, fifo_interval=4)
    jobs = [add(under, counting_job(f"old{i}", *shape)) for i, shape in enumerate(sizes)]
    # One odd row of a step may stay empty, and the chains of one job cannot be shorter than their steps.
    bound = 4 * sum(max(steps, n * steps * rows / 7) + steps for n, steps, rows in sizes)
    count = 0
    while not all(job.over for job in jobs):
        press(under, count)
        step(under)
        count += 1
        assert count <= bound


def test_a_request_for_64_hardly_delays_a_request_for_one() -> None:
    under = scheduler(max_batch_size=8, fifo_interval=8)
    under.add(counting_job("sixty-four", n=64, steps=50), 0)
    for _ in range(10):
        step(under)
    one = add(under, counting_job("one", steps=50))
    # All but every eighth step.
    assert steps_until(under, one) <= 50 * 8 / 7 + 1


def test_a_request_that_has_had_no_step_goes_first() -> None:
    under = scheduler(max_batch_size=2, fifo_interval=10**6)
    under.add(counting_job("short", steps=3), 0)
    step(under)
    under.add(counting_job("long", n=8, steps=50), 0)
    under.add(counting_job("longer", n=8, steps=60), 0)
    assert chosen(under.schedule(0)) == {"long": 2}
    step(under)
    assert chosen(under.schedule(0)) == {"longer": 2}
    step(under)
    assert chosen(under.schedule(0)) == {"short": 1, "long": 1}


def test_in_order_of_arrival_it_would() -> None:
    under = scheduler(max_batch_size=8, policy="fifo")
    under.add(counting_job("sixty-four", n=64, steps=50), 0)
    one = add(under, counting_job("one", steps=50))
    assert steps_until(under, one) > 400


def test_a_small_job_shares_its_step_with_others() -> None:
    under = scheduler(max_batch_size=8)
    under.add(counting_job("many", n=64), 0)
    under.add(counting_job("one"), 0)
    assert chosen(under.schedule(0)) == {"one": 1, "many": 7}


def test_the_images_of_a_job_sharpen_together() -> None:
    under = scheduler(max_batch_size=2)
    job = add(under, counting_job("a", n=3, steps=4))
    for _ in range(5):
        step(under)
        steps = [sample.step for sample in job.samples]
        assert max(steps) - min(steps) <= 1


# ── Policies ───────────────────────────────────────────────────────────────────────────────────


def order_of_ends(policy: Policy) -> list[str]:
    under = scheduler(max_batch_size=1, policy=policy, fifo_interval=10**6)
    for job in (counting_job("long", steps=9), counting_job("short", steps=2), counting_job("mid", steps=5)):
        under.add(job, 0)
    return [name for _ in range(16) for name in step(under)]


def test_the_policies_differ() -> None:
    assert order_of_ends("remaining") == ["short", "mid", "long"]
    assert order_of_ends("fifo") == ["long", "short", "mid"]
    assert order_of_ends("sharing") == ["short", "mid", "long"]


def test_sharing_alternates() -> None:
    under = scheduler(max_batch_size=1, policy="sharing")
    for name in "abc":
        under.add(counting_job(name, steps=5), 0)
    order = []
    for _ in range(6):
        batch = launch(under)
        order.append(batch.samples[0].job.id)
        read(under, batch)
    assert order == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize(("max_batch_size", "interval"), [(0, 8), (4, 1)])
def test_impossible_settings_are_refused(max_batch_size: int, interval: int) -> None:
    with pytest.raises(ValueError, match="max_batch_size"):
        scheduler(max_batch_size, fifo_interval=interval)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def test_a_guided_sample_costs_two_evaluations() -> None:
    under = scheduler(max_batch_size=8)
    under.add(counting_job("guided", n=10, evaluations=2), 0)
    batch = under.schedule(0)
    assert (len(batch.samples), batch.size) == (4, 8)


def test_an_odd_row_goes_to_a_sample_that_fits() -> None:
    under = scheduler(max_batch_size=3)
    under.add(counting_job("guided", n=2, steps=1, evaluations=2), 0)
    under.add(counting_job("plain", steps=9), 0)
    batch = under.schedule(0)
    assert chosen(batch) == {"guided": 1, "plain": 1}
    assert batch.size == 3


def test_a_guided_sample_runs_where_one_row_is_all_there_is() -> None:
    under = scheduler(max_batch_size=1)
    job = add(under, counting_job("guided", n=2, steps=3, evaluations=2))
    assert steps_until(under, job) == 6


# ── Deadlines ──────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_that_cannot_be_met_is_refused_on_admission() -> None:
    under = scheduler()
    (event,) = under.add(counting_job("late", steps=10, deadline=109.5), now=100.0)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    assert (event.started, len(under), under.backlog) == (False, 0, 0)


def test_a_deadline_that_can_just_be_met_is_not() -> None:
    under = scheduler()
    (event,) = under.add(counting_job("tight", steps=10, deadline=110.0), now=100.0)
    assert isinstance(event, Queued)


def test_a_pause_of_the_machine_refuses_nothing_for_good() -> None:
    """Refused work takes no step, so an estimate that refuses everything would never be corrected."""
    under = scheduler()
    for _ in range(3):
        under.times.observe(1, 3600.0)
    assert under.times.at(1) > 900
    (event,) = under.add(counting_job("afterwards", steps=10, deadline=300.0), now=0.0)
    assert isinstance(event, Queued)
    (event,) = under.add(counting_job("late", steps=10, deadline=9.5), now=0.0)
    assert isinstance(event, Failed)


@pytest.mark.parametrize("running", [False, True])
def test_expired_work_is_dropped_before_it_is_computed(running: bool) -> None:
    under = scheduler()
    under.add(counting_job("late", steps=5, deadline=6.0), 0)
    under.add(counting_job("neighbour", steps=20), 0)
    if running:
        step(under)
    assert under.expire(6.0) == []
    (event,) = under.expire(6.1)
    assert isinstance(event, Failed)
    assert (event.job_id, type(event.error), event.started) == ("late", DeadlineError, running)
    assert chosen(under.schedule(6.1)) == {"neighbour": 1}


def test_a_finished_job_does_not_expire() -> None:
    under = scheduler()
    job = add(under, counting_job("quick", steps=1, deadline=5.0))
    step(under)
    assert job.state is State.FINISHED
    assert under.expire(100.0) == []


# ── Cancellation ───────────────────────────────────────────────────────────────────────────────


def test_cancelled_before_a_step_counts_it_does_not() -> None:
    under = scheduler()
    gone = add(under, counting_job("gone", n=2, steps=1))
    add(under, counting_job("neighbour", steps=1))
    batch = under.schedule(0)
    assert chosen(batch) == {"gone": 2, "neighbour": 1}
    assert under.cancel("gone") == [Cancelled("gone")]
    assert [job.id for job in under.commit(batch.samples)] == ["neighbour"]
    assert read(under, batch) == ["neighbour"]
    assert gone.state is State.CANCELLED
    assert [sample.step for sample in gone.samples] == [0, 0]
    assert under.cancel("gone") == []
    assert under.cancel("never heard of") == []


def test_cancelled_before_its_last_step_is_read_it_does_not_finish() -> None:
    under = scheduler()
    gone = add(under, counting_job("gone", n=2, steps=1))
    add(under, counting_job("neighbour", steps=1))
    batch = launch(under)
    assert (under.stage_done(gone), gone.remaining, under.backlog) == (True, 0, 0)
    assert under.cancel("gone") == [Cancelled("gone")]
    assert read(under, batch) == ["neighbour"]
    assert gone.state is State.CANCELLED
    assert (len(under), under.running, under.waiting) == (0, 0, 0)


def test_cancel_all_ends_everybody_once() -> None:
    under = scheduler(max_batch_size=1)
    for name in "abc":
        under.add(counting_job(name), 0)
    batch = launch(under)
    assert under.cancel_all() == [Cancelled(name) for name in "abc"]
    assert under.cancel_all() == []
    assert (under.running, under.waiting, under.backlog) == (0, 0, 0)
    assert read(under, batch) == []
    assert launch(under).samples == ()


# ── Launched ahead ─────────────────────────────────────────────────────────────────────────────


def test_a_step_counts_when_it_is_launched() -> None:
    under = scheduler()
    job = add(under, counting_job("a", n=2, steps=3))
    flights = [launch(under) for _ in range(3)]
    assert [chosen(batch) for batch in flights] == [{"a": 2}] * 3
    assert (job.remaining, under.backlog, under.waiting, len(under)) == (0, 0, 0, 1)
    assert launch(under).samples == ()  # nothing is left to launch, though it has not ended
    assert job.state is State.RUNNING
    assert read(under, flights[0], flights[1:]) == read(under, flights[1], flights[2:]) == []
    assert read(under, flights[2]) == ["a"]


def test_the_next_stage_waits_for_the_results_and_others_do_not() -> None:
    under = scheduler(max_batch_size=4)
    job = add(under, JobSpec("a", "ddim", (counting_stage(3, 2), counting_stage(4, 1))))
    add(under, counting_job("b", steps=9))
    ahead = Ahead(under)
    seen = []
    while not job.over:
        ahead.step()
        assert ahead.flight is not None
        seen.append(chosen(ahead.flight))
    assert seen == [{"a": 3, "b": 1}, {"a": 3, "b": 1}, {"b": 1}, {"a": 4}, {"b": 1}]


def test_jobs_whose_results_are_awaited_do_not_hide_the_others() -> None:
    under = scheduler(max_batch_size=4, fifo_interval=10**6)
    under.add(counting_job("next", n=9, steps=2), 0)
    step(under)
    for name in "abcd":
        under.add(counting_job(name, steps=1), 0)
    assert chosen(launch(under)) == dict.fromkeys("abcd", 1)
    assert chosen(launch(under)) == {"next": 4}


# ── Positions and times ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("policy", "places"),
    [("remaining", {"big": 0, "small": 0, "mid": 1}), ("fifo", {"big": 0, "small": 1, "mid": 2})],
)
def test_the_place_in_the_queue(policy: Policy, places: dict[str, int]) -> None:
    under = scheduler(policy=policy)
    sizes = {"big": 40, "small": 4, "mid": 8}
    for name, n in sizes.items():
        (event,) = under.add(counting_job(name, n=n), 0)
        assert isinstance(event, Queued)
        assert event.position == places[name]


@pytest.mark.parametrize("policy", ["remaining", "fifo"])
def test_the_eta_comes_true_when_nobody_else_comes(policy: Policy) -> None:
    under = scheduler(max_batch_size=4, policy=policy, fifo_interval=10**6)
    shapes = [("a", 8, 5), ("b", 4, 3), ("c", 12, 4)]
    jobs = [add(under, counting_job(*shape)) for shape in shapes]
    promised = {job.id: under.eta(job) for job in jobs}
    ends: dict[str, float] = {}
    for count in range(1, 30):
        ends |= dict.fromkeys(step(under), count * STEP_S)
    assert promised == ends


def test_the_eta_includes_the_step_on_its_way() -> None:
    under = scheduler(max_batch_size=4)
    under.times = StepTimes([(1, 1.0), (4, 2.0)])
    job = add(under, counting_job("a", n=4, steps=3))
    assert under.eta(job) == 6.0
    flights = [launch(under)]
    assert under.eta(job) == 6.0  # 2 until that is there, and two more
    assert under.eta(Job(counting_job("other", n=4, steps=1))) >= 2.0 + 2.0
    flights.append(launch(under))
    read(under, flights[0], flights[1:])
    assert under.eta(job) == 4.0
    flights.append(launch(under))
    read(under, flights[1], flights[2:])
    assert under.eta(job) == 2.0
    assert read(under, flights[2]) == ["a"]
    alone = Job(counting_job("b", steps=1))
    assert under.eta(alone) == 1.0
    under.in_flight = 1
    assert under.eta(alone) == 2.0


def slow_ahead(under: Scheduler, job: Job) -> tuple[int, int, int]:
    """What goes before a job, found by looking at all: jobs, and the least and most evaluations."""
    arrival = {name: place for place, name in enumerate(under._jobs)}
    place = arrival.get(job.id, len(arrival))
    others = [other for other in under._jobs.values() if other is not job]
    if under.policy == "sharing":
        work = sum(other.remaining for other in others)
        return len(others), work, work
    if under.policy == "fifo":
        earlier = [other for other in others if arrival[other.id] < place]
        work = sum(other.remaining for other in earlier)
        return len(earlier), work, work

    def first_step(other: Job) -> int:
        return min(under.max_batch_size, sum(sample.chain.plan.evaluations[0] for sample in other.samples))

    before = [o for o in others if (o.remaining, arrival[o.id]) < (job.remaining, place)]
    behind = [o for o in others if o not in before and all(sample.step == 0 for sample in o.samples)]
    certain = sum(o.remaining for o in before)
    certain += sum(first_step(o) for o in behind if o.remaining > job.remaining)
    # Of jobs with as much to do, those before and behind count alike.
    ties = [o for o in [*others, job] if o.remaining == job.remaining]
    tied = sum(o in behind for o in ties)
    return len(before), certain + tied, certain + tied * max(map(first_step, ties), default=0)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=30),
    st.sampled_from(["remaining", "fifo", "sharing"]),
    st.integers(0, 20),
)
def test_what_goes_before_is_found_without_looking_at_all(
    shapes: list[tuple[int, int, int]], policy: Policy, steps: int
) -> None:
    under = scheduler(max_batch_size=3, policy=policy)
    for i, shape in enumerate(shapes):
        under.add(counting_job(str(i), *shape), 0)
        if i < steps:
            step(under)
    for job in [*under._jobs.values(), Job(counting_job("next", 2, 3))]:
        count, work = under._ahead(job)
        jobs_ahead, least, most = slow_ahead(under, job)
        assert count == jobs_ahead
        assert least <= work <= most


def test_the_eta_of_a_lone_chain_is_its_length() -> None:
    under = scheduler(max_batch_size=8)
    assert under.eta(Job(counting_job("a", n=1, steps=10))) == 10.0
    assert shortest(Job(counting_job("b", n=16, steps=10)), under.times, 8) == 20.0


def test_later_stages_count_from_the_start() -> None:
    under = scheduler(max_batch_size=8)
    stages = counting_stage(1, 10), counting_stage(2, 15)
    job = Job(JobSpec("a", "ddim", stages))
    assert shortest(job, under.times, 8) == under.eta(job) == 25.0
    (event,) = under.add(JobSpec("a", "ddim", stages, deadline=124.9), now=100.0)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    stages = counting_stage(8, 10), counting_stage(8, 15)
    (event,) = under.add(JobSpec("b", "ddim", stages, deadline=125.1), now=100.0)
    assert isinstance(event, Queued)
    assert event.eta_s == 25.0


def test_a_stage_follows_another_without_a_gap() -> None:
    under = scheduler(max_batch_size=8)
    job = add(under, JobSpec("a", "ddim", (counting_stage(2, 3), counting_stage(3, 2))))
    sizes = []
    while not job.over:
        batch = launch(under)
        sizes.append(batch.size)
        read(under, batch)
    assert sizes == [2, 2, 2, 3, 3]
    assert (len(under), under.backlog, under.waiting) == (0, 0, 0)


# ── How far a job is ───────────────────────────────────────────────────────────────────────────


def test_how_far_a_job_is_follows_every_step() -> None:
    under = scheduler(max_batch_size=1, policy="fifo")
    first, second = add(under, counting_job("first", steps=2)), add(under, counting_job("second", steps=4))
    assert under.locate("second") == Located("second", False, 1, under.eta(second), 0.0)
    step(under)
    found = under.locate("first")
    assert found == Located("first", True, 0, under.eta(first), 0.5)
    step(under)
    found = under.locate("second")
    assert found is not None
    assert (found.position, found.running, found.progress) == (0, False, 0.0)
    assert under.locate("first") is None
    step(under)
    found = under.locate("second")
    assert found is not None
    assert (found.running, found.progress) == (True, 0.25)
