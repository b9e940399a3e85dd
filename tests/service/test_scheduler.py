"""The scheduler under a clock of the tests' own: counts, ends, bounds, policies."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from service.events import Cancelled, Event, Failed, Finished, Preview, Queued, Terminal
from service.jobs import Job, Sequel, State
from service.scheduler import KeyedSums, Policy, Scheduler, StepPlan, StepTimes

from service.errors import ComputeError, DeadlineError
from tests.service.fakes import blank, counting_job

STEP_S = 1.0


def scheduler(max_rows: int = 4, policy: Policy = "remaining", turn: int = 8) -> Scheduler:
    """Every step takes a second, however wide."""
    return Scheduler(max_rows, StepTimes([(1, STEP_S), (4096, STEP_S)]), policy, turn)


def step(under: Scheduler, now: float = 0.0) -> list[Event]:
    return under.commit(under.schedule(now), now, blank)


def chosen(plan: StepPlan) -> Counter[str]:
    return Counter(sample.job.id for sample in plan.samples)


def steps_until(under: Scheduler, job: Job, limit: int = 100_000) -> int:
    for count in range(1, limit):
        step(under)
        if job.over:
            return count
    raise AssertionError(f"{job.id} is not over after {limit} steps")


# ── Whatever happens, in whatever order ────────────────────────────────────────────────────────


class Life(RuleBasedStateMachine):
    """Jobs come, are cancelled, fail and expire between and during steps."""

    @initialize(
        max_rows=st.integers(1, 9),
        policy=st.sampled_from(["remaining", "fifo", "sharing"]),
        turn=st.integers(2, 5),
    )
    def begin(self, max_rows: int, policy: Policy, turn: int) -> None:
        self.under = scheduler(max_rows, policy, turn)
        self.now = 0.0
        self.jobs: dict[str, Job] = {}
        self.ends: Counter[str] = Counter()
        self.plan: StepPlan | None = None

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Terminal):
                self.ends[event.job_id] += 1
                assert self.jobs[event.job_id].over

    @rule(
        n=st.integers(1, 12),
        steps=st.integers(1, 6),
        rows=st.integers(1, 2),
        patience=st.none() | st.floats(0, 40),
    )
    def add(self, n: int, steps: int, rows: int, patience: float | None) -> None:
        job = counting_job(
            f"job{len(self.jobs)}", n, steps, rows, None if patience is None else self.now + patience, "both"
        )
        self.jobs[job.id] = job
        events = self.under.add(job, self.now)
        assert len(events) == 1
        assert isinstance(events[0], Queued | Failed)
        self.take(events)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        was_over = job.over
        events = self.under.cancel(job.id)
        assert events == ([] if was_over else [Cancelled(job.id)])
        self.take(events)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        was_over = job.over
        events = self.under.fail(job.id, ComputeError("told to"))
        assert len(events) == (not was_over)
        self.take(events)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.under.expire(self.now))
        for job in self.jobs.values():
            assert job.over or job.deadline is None or job.deadline >= self.now

    @rule()
    def narrow(self) -> None:
        self.under.max_rows = max(1, self.under.max_rows // 2)

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        plan = self.plan = self.under.schedule(self.now)
        assert plan.rows == sum(sample.cost for sample in plan.samples)
        alone_at_one = self.under.max_rows == 1 and len(plan.samples) == 1
        assert plan.rows <= self.under.max_rows or (alone_at_one and plan.rows == 2)
        assert len(set(plan.samples)) == len(plan.samples) == self.under.running
        assert all(s.row < s.steps and s.job.state is State.RUNNING for s in plan.samples)
        assert bool(plan.samples) == bool(len(self.under))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def commit(self) -> None:
        assert self.plan is not None
        before = {sample: sample.row for sample in self.plan.samples}
        alive = {sample for sample in self.plan.samples if not sample.job.over}
        self.take(self.under.commit(self.plan, self.now, blank))
        self.plan = None
        for sample, row in before.items():
            assert sample.row == row + (sample in alive)

    @invariant()
    def counters_equal_a_recount(self) -> None:
        if not hasattr(self, "jobs"):
            return
        alive = [job for job in self.jobs.values() if not job.over]
        unfinished = [s for job in alive for s in job.samples if s.row < s.steps]
        assert len(self.under) == len(alive)
        assert self.under.backlog == sum(s.remaining for s in unfinished)
        assert self.under.running + self.under.waiting == len(unfinished)
        assert min(self.under.running, self.under.waiting) >= 0
        for job in alive:
            assert job.remaining == sum(s.remaining for s in job.samples)
        assert self.ends == Counter(job.id for job in self.jobs.values() if job.over)

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return
        if self.plan is not None:
            self.commit()
        for _ in range(self.under.backlog):
            self.take(step(self.under, self.now))
        assert len(self.under) == self.under.backlog == 0
        assert self.ends == Counter(dict.fromkeys(self.jobs, 1))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


# ── Who waits for whom ─────────────────────────────────────────────────────────────────────────


def press(under: Scheduler, count: int) -> None:
    """Top up with one-step jobs: enough that they alone could fill every step."""
    for i in range(under.max_rows - under.waiting):
        under.add(counting_job(f"new{count}.{i}", steps=1), 0)


def steps_under_pressure(turn: int, limit: int) -> int | None:
    """Steps that a 20-image job takes while there are always enough one-step jobs to fill the step."""
    under = scheduler(max_rows=8, turn=turn)
    big = counting_job("big", n=20, steps=30)
    under.add(big, 0)
    step(under)
    for count in range(1, limit):
        press(under, count)
        step(under)
        if big.over:
            return count + 1
    return None


@pytest.mark.parametrize("turn", [2, 4, 8])
def test_a_big_job_finishes_under_an_endless_stream_of_small_ones(turn: int) -> None:
    alone = 20 * 30 / 8
    taken = steps_under_pressure(turn, limit=turn * 80 + turn)
    assert taken is not None
    assert taken <= turn * (alone + 1)


def test_without_the_turn_it_would_starve() -> None:
    assert steps_under_pressure(turn=10**9, limit=1000) is None


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 2)), min_size=1, max_size=4))
@settings(max_examples=25)
def test_starvation_is_bounded_by_the_work_that_came_before(sizes: list[tuple[int, int, int]]) -> None:
    under = scheduler(max_rows=8, turn=4)
    jobs = [counting_job(f"old{i}", n, steps, rows) for i, (n, steps, rows) in enumerate(sizes)]
    for job in jobs:
        under.add(job, 0)
    # One odd row of a step may stay empty, and the chains of one job cannot be shorter than their steps.
    bound = 4 * sum(max(steps, n * steps * rows / 7) + steps for n, steps, rows in sizes)
    count = 0
    while not all(job.over for job in jobs):
        press(under, count)
        step(under)
        count += 1
        assert count <= bound


def test_a_request_for_64_hardly_delays_a_request_for_one() -> None:
    under = scheduler(max_rows=8, turn=8)
    under.add(counting_job("sixty-four", n=64, steps=50), 0)
    for _ in range(10):
        step(under)
    one = counting_job("one", steps=50)
    under.add(one, 0)
    # All but every eighth step.
    assert steps_until(under, one) <= 50 * 8 / 7 + 1


def test_a_request_that_has_had_no_step_goes_first() -> None:
    under = scheduler(max_rows=2, turn=10**6)
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
    under = scheduler(max_rows=8, policy="fifo")
    under.add(counting_job("sixty-four", n=64, steps=50), 0)
    one = counting_job("one", steps=50)
    under.add(one, 0)
    assert steps_until(under, one) > 400


def test_a_narrow_job_leaves_room_for_others_in_the_same_step() -> None:
    under = scheduler(max_rows=8)
    under.add(counting_job("many", n=64), 0)
    under.add(counting_job("one"), 0)
    assert chosen(under.schedule(0)) == {"one": 1, "many": 7}


def test_the_images_of_a_job_sharpen_together() -> None:
    under = scheduler(max_rows=2)
    job = counting_job("a", n=3, steps=4)
    under.add(job, 0)
    for _ in range(5):
        step(under)
        rows = [sample.row for sample in job.samples]
        assert max(rows) - min(rows) <= 1


# ── Policies ───────────────────────────────────────────────────────────────────────────────────


def order_of_ends(policy: Policy) -> list[str]:
    under = scheduler(max_rows=1, policy=policy, turn=10**6)
    for job in (counting_job("long", steps=9), counting_job("short", steps=2), counting_job("mid", steps=5)):
        under.add(job, 0)
    events = [event for _ in range(16) for event in step(under)]
    return [event.job_id for event in events if isinstance(event, Finished)]


def test_the_policies_differ() -> None:
    assert order_of_ends("remaining") == ["short", "mid", "long"]
    assert order_of_ends("fifo") == ["long", "short", "mid"]
    assert order_of_ends("sharing") == ["short", "mid", "long"]


def test_sharing_gives_turns() -> None:
    under = scheduler(max_rows=1, policy="sharing")
    for name in "abc":
        under.add(counting_job(name, steps=5), 0)
    turns = []
    for _ in range(6):
        plan = under.schedule(0)
        turns.append(plan.samples[0].job.id)
        under.commit(plan, 0, blank)
    assert turns == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize(("max_rows", "turn"), [(0, 8), (4, 1)])
def test_impossible_settings_are_refused(max_rows: int, turn: int) -> None:
    with pytest.raises(ValueError, match="max_rows"):
        scheduler(max_rows, turn=turn)


# ── Rows ───────────────────────────────────────────────────────────────────────────────────────


def test_a_guided_sample_costs_two_rows() -> None:
    under = scheduler(max_rows=8)
    under.add(counting_job("guided", n=10, rows=2), 0)
    plan = under.schedule(0)
    assert (len(plan.samples), plan.rows) == (4, 8)


def test_an_odd_row_goes_to_someone_who_fits() -> None:
    under = scheduler(max_rows=3)
    under.add(counting_job("guided", n=2, steps=1, rows=2), 0)
    under.add(counting_job("plain", steps=9), 0)
    plan = under.schedule(0)
    assert chosen(plan) == {"guided": 1, "plain": 1}
    assert plan.rows == 3


def test_a_guided_sample_runs_where_one_row_is_all_there_is() -> None:
    under = scheduler(max_rows=1)
    job = counting_job("guided", n=2, steps=3, rows=2)
    under.add(job, 0)
    assert steps_until(under, job) == 6


# ── Deadlines ──────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door() -> None:
    under = scheduler()
    job = counting_job("late", steps=10, deadline=109.5)
    (event,) = under.add(job, now=100.0)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    assert (job.state, len(under), under.backlog) == (State.FAILED, 0, 0)


def test_a_deadline_that_can_just_be_met_is_not() -> None:
    under = scheduler()
    (event,) = under.add(counting_job("tight", steps=10, deadline=110.0), now=100.0)
    assert isinstance(event, Queued)


@pytest.mark.parametrize("running", [False, True])
def test_expired_work_is_dropped_before_it_is_computed(running: bool) -> None:
    under = scheduler()
    job, mate = counting_job("late", steps=5, deadline=6.0), counting_job("mate", steps=20)
    under.add(job, 0)
    under.add(mate, 0)
    if running:
        step(under)
    assert under.expire(6.0) == []
    (event,) = under.expire(6.1)
    assert isinstance(event, Failed)
    assert (event.job_id, type(event.error)) == ("late", DeadlineError)
    assert chosen(under.schedule(6.1)) == {"mate": 1}


def test_a_finished_job_does_not_expire() -> None:
    under = scheduler()
    job = counting_job("quick", steps=1, deadline=5.0)
    under.add(job, 0)
    step(under)
    assert job.state is State.FINISHED
    assert under.expire(100.0) == []


# ── Cancellation ───────────────────────────────────────────────────────────────────────────────


def test_cancelled_during_a_step_its_result_does_not_count() -> None:
    under = scheduler()
    gone, mate = counting_job("gone", n=2, steps=1), counting_job("mate", steps=1)
    under.add(gone, 0)
    under.add(mate, 0)
    plan = under.schedule(0)
    assert chosen(plan) == {"gone": 2, "mate": 1}
    assert under.cancel("gone") == [Cancelled("gone")]
    events = under.commit(plan, 0, blank)
    assert [event.job_id for event in events] == ["mate"]
    assert gone.state is State.CANCELLED
    assert [sample.row for sample in gone.samples] == [0, 0]
    assert under.cancel("gone") == []
    assert under.cancel("never heard of") == []


def test_fail_all_ends_everybody_once() -> None:
    under = scheduler(max_rows=1)
    for name in "abc":
        under.add(counting_job(name), 0)
    step(under)
    events = under.fail_all(ComputeError("all"))
    assert {event.job_id for event in events} == set("abc")
    assert under.fail_all(ComputeError("again")) == []
    assert (under.running, under.waiting, under.backlog) == (0, 0, 0)


# ── Events ─────────────────────────────────────────────────────────────────────────────────────


def previews(job: Job, max_rows: int = 8) -> list[Preview]:
    under = scheduler(max_rows)
    under.add(job, 0)
    events = []
    while not job.over:
        events += step(under)
    return [event for event in events if isinstance(event, Preview)]


def test_previews_come_at_once_when_due_and_at_the_end() -> None:
    found = previews(counting_job("a", steps=10, preview="x0", preview_every=4))
    assert [(p.step, p.steps, p.timestep) for p in found] == [(1, 10, 9), (4, 10, 6), (8, 10, 2), (10, 10, 0)]
    assert [p.eta_s for p in found] == [9.0, 6.0, 2.0, 0.0]


@pytest.mark.parametrize(("kind", "drawn"), [("x0", ["x0"]), ("xt", ["xt"]), ("both", ["x0", "xt"])])
def test_previews_show_what_was_asked_for(kind: str, drawn: list[str]) -> None:
    (found,) = previews(counting_job("a", n=2, steps=1, preview=kind))  # type: ignore[arg-type]
    assert [(p.index, p.kind) for p in found.pictures] == [(i, look) for i in (0, 1) for look in drawn]


def test_no_previews_when_none_are_asked_for() -> None:
    assert previews(counting_job("a", steps=5, preview="none")) == []


def test_samples_at_different_rows_come_in_different_previews() -> None:
    found = previews(counting_job("a", n=3, steps=2, preview="x0"), max_rows=2)
    assert all(len({p.index for p in preview.pictures}) == len(preview.pictures) for preview in found)
    assert Counter(p.index for preview in found for p in preview.pictures) == {0: 2, 1: 2, 2: 2}


def test_a_finished_job_brings_its_pictures_in_order_and_its_times() -> None:
    under = scheduler(max_rows=2)
    job = counting_job("a", n=3, steps=1)
    under.add(job, 0.0)
    assert step(under, 3.0) == []
    (event,) = under.commit(under.schedule(4.0), 5.0, blank)
    assert isinstance(event, Finished)
    assert [picture.seed for picture in event.pictures] == [0, 1, 2]
    assert (event.queue_s, event.run_s) == (3.0, 2.0)


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
    under = scheduler(max_rows=4, policy=policy, turn=10**6)
    jobs = [counting_job(name, n, steps) for name, n, steps in [("a", 8, 5), ("b", 4, 3), ("c", 12, 4)]]
    for job in jobs:
        under.add(job, 0)
    promised = {job.id: under.eta(job) for job in jobs}
    ends: dict[str, float] = {}
    for count in range(1, 30):
        ends |= {e.job_id: count * STEP_S for e in step(under) if isinstance(e, Finished)}
    assert promised == ends


def slow_ahead(under: Scheduler, job: Job) -> tuple[int, int, int]:
    """What goes before a job, found by looking at everybody: jobs, and the least and most rows."""
    arrival = {name: place for place, name in enumerate(under._jobs)}
    place = arrival.get(job.id, len(arrival))
    others = [other for other in under._jobs.values() if other is not job]
    if under.policy == "sharing":
        rows = sum(other.remaining for other in others)
        return len(others), rows, rows
    if under.policy == "fifo":
        earlier = [other for other in others if arrival[other.id] < place]
        rows = sum(other.remaining for other in earlier)
        return len(earlier), rows, rows
    before = [o for o in others if (o.remaining, arrival[o.id]) < (job.remaining, place)]
    behind = [o for o in others if o not in before and all(sample.row == 0 for sample in o.samples)]
    first = {
        o.id: min(under.max_rows, sum(sample.chain.plan.rows[0] for sample in o.samples)) for o in behind
    }
    sure = sum(o.remaining for o in before) + sum(first[o.id] for o in behind if o.remaining > job.remaining)
    # Of jobs with as much to do, those before and behind count alike.
    ties = [o for o in [*others, job] if o.remaining == job.remaining]
    tied = sum(o in behind for o in ties)
    widest = max((min(under.max_rows, sum(s.chain.plan.rows[0] for s in o.samples)) for o in ties), default=0)
    return len(before), sure + tied, sure + tied * widest


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=30),
    st.sampled_from(["remaining", "fifo", "sharing"]),
    st.integers(0, 20),
)
def test_what_goes_before_is_found_without_looking_at_everybody(
    shapes: list[tuple[int, int, int]], policy: Policy, steps: int
) -> None:
    under = scheduler(max_rows=3, policy=policy)
    jobs = [counting_job(str(i), *shape) for i, shape in enumerate(shapes)]
    for i, job in enumerate(jobs):
        under.add(job, 0)
        if i < steps:
            step(under)
    for job in [*under._jobs.values(), counting_job("next", 2, 3)]:
        count, rows = under._ahead(job)
        jobs_ahead, least, most = slow_ahead(under, job)
        assert count == jobs_ahead
        assert least <= rows <= most


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(-9, 9)), max_size=30), st.integers(0, 6000))
def test_keyed_sums_are_sums(added: list[tuple[int, int]], key: int) -> None:
    sums = KeyedSums()
    for place, value in added:
        sums.add(place, value)
    assert sums.total == sum(value for _, value in added)
    for probe in (key, *(place for place, _ in added)):
        assert sums.at(probe) == sum(value for place, value in added if place == probe)
        assert sums.below(probe) == sum(value for place, value in added if place < probe)


def test_the_eta_of_a_lone_chain_is_its_length() -> None:
    under = scheduler(max_rows=8)
    job = counting_job("a", n=1, steps=10)
    assert under.eta(job) == 10.0
    assert under.shortest(counting_job("b", n=16, steps=10)) == 20.0


def test_what_a_job_goes_on_with_counts_too() -> None:
    under = scheduler(max_rows=8)
    job = counting_job("a", n=1, steps=10, deadline=124.9)
    job.sequel = Sequel(counting_job("a", n=2, steps=15), lambda _pictures: [])
    assert under.shortest(job) == under.eta(job) == 25.0
    (event,) = under.add(job, now=100.0)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    job = counting_job("b", n=8, steps=10, deadline=125.1)
    job.sequel = Sequel(counting_job("b", n=8, steps=15), lambda _pictures: [])
    (event,) = under.add(job, now=100.0)
    assert isinstance(event, Queued)
    assert event.eta_s == 25.0


# ── Step times ─────────────────────────────────────────────────────────────────────────────────


def test_step_times_lie_on_straight_lines_between_the_points() -> None:
    times = StepTimes([(2, 1.0), (4, 2.0), (8, 3.0)])
    assert [times.at(rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 6.0]


def test_step_times_follow_what_is_seen() -> None:
    times = StepTimes([(1, 1.0), (3, 3.0)])
    times.observe(1, 2.0)
    assert times.at(1) == pytest.approx(1.1)
    times.observe(2, 2.05)  # a width not seen before begins at its line
    assert times.at(2) == pytest.approx(2.05)
    assert times.at(3) == 3.0
    for _ in range(100):
        times.observe(3, 5.0)
    assert times.at(3) == pytest.approx(5.0, rel=1e-3)


def test_the_knee_is_the_narrowest_width_near_the_best_rate() -> None:
    assert StepTimes([(1, 1.0), (2, 1.0), (4, 1.0), (8, 2.0), (16, 4.0)]).knee() == 4
    assert StepTimes([(1, 1.0), (2, 1.94), (4, 3.85)]).knee() == 1
    assert StepTimes([(1, 1.0), (2, 1.5), (4, 2.9)]).knee() == 2
