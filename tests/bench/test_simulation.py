import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate
from bench.simulation import CURVES, POLICIES, Case, RunToCompletion, drive, job_of, jobs_of, run
from bench.workload import WORKLOADS, trace
from service.engine.estimates import StepTimes
from service.engine.scheduler import Scheduler

SECOND = StepTimes([(1, 1.0), (2, 1.0)])  # every step takes a second
NEVER = 10**9


def ends(scheduler, jobs):
    return [outcome.ended for outcome in drive(scheduler, jobs, SECOND)]


def two_jobs():
    return [job_of("long", 0.0, 4), job_of("short", 0.5, 1)]


def test_fifo_finishes_the_first_first():
    assert ends(Scheduler(1, SECOND, "fifo"), two_jobs()) == [4, 5]


def test_remaining_lets_the_short_one_overtake():
    assert ends(Scheduler(1, SECOND, "remaining", NEVER), two_jobs()) == [5, 2]


def test_every_nth_step_goes_in_order_of_arrival():
    assert ends(Scheduler(1, SECOND, "remaining", 2), two_jobs()) == [5, 3]


def test_times_to_the_first_step_are_to_its_end():
    outcomes = drive(Scheduler(1, SECOND, "fifo"), two_jobs(), SECOND)
    assert [outcome.first - outcome.created for outcome in outcomes] == [1, 4.5]


def test_the_peer_runs_equal_step_counts_to_completion():
    jobs = [job_of("a", 0, 3), job_of("b", 0.5, 3), job_of("other", 0.6, 2), job_of("c", 0.7, 3)]
    # a alone; b takes c with it, past the other, though that came earlier.
    assert ends(RunToCompletion(2), jobs) == [3, 6, 8, 6]


def test_the_peer_splits_a_request_that_does_not_fit():
    jobs = [job_of("wide", 0, 2, images=3), job_of("guided", 0, 2, evaluations_per_step=2)]
    assert ends(RunToCompletion(2), jobs) == [4, 6]  # two images, the third alone, the guided one


def test_slowdown_is_one_for_a_job_alone():
    for images in (1, 2, 16):
        for name, curve in CURVES.items():
            sizes = [size for size, _ in curve if size <= images]
            best = min(sizes, key=lambda size: StepTimes(curve).at(size) / size)
            (outcome,) = Case(curve, batch_size=best).drive([job_of(name, 1.0, 10, images)])
            assert outcome.slowdown(curve) == pytest.approx(1)


shapes_of_jobs = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 12), st.integers(1, 6), st.integers(1, 2)),
    min_size=1,
    max_size=25,
)


def arriving(gaps_and_shapes):
    created = np.cumsum([gap for gap, *_ in gaps_and_shapes]).tolist()
    return [job_of(str(i), created[i], *shape) for i, (_, *shape) in enumerate(gaps_and_shapes)]


class Watched(Scheduler):
    """Notes every time that it is given."""

    def __post_init__(self):
        super().__post_init__()
        self.given: list[float] = []

    def add(self, spec, now, *, again=False):
        assert now >= spec.created
        self.given.append(now)
        return super().add(spec, now, again=again)

    def schedule(self, now):
        self.given.append(now)
        return super().schedule(now)


@given(shapes_of_jobs, st.sampled_from(["remaining", "fifo", "sharing"]), st.integers(1, 8))
def test_the_clock_only_moves_forward_and_every_job_ends(shapes, policy, size):
    times = StepTimes(CURVES["cpu"])
    watched = Watched(size, times, policy)
    outcomes = drive(watched, arriving(shapes), times)
    assert watched.given == sorted(watched.given)
    assert len(outcomes) == len(shapes)
    assert all(0 < o.first - o.created <= o.latency for o in outcomes)


@settings(max_examples=100)
@given(shapes_of_jobs, st.sampled_from([1, 2, 4, 8]), st.sampled_from([2, 3, 8, 64]))
def test_no_job_outlasts_its_bound(shapes, size, interval):
    times = StepTimes(CURVES["cpu"])
    for outcome in drive(Scheduler(size, times, "remaining", interval), arriving(shapes), times):
        assert outcome.latency <= outcome.bound(size, interval, times) + 1e-9


def test_the_bound_is_nearly_reached_by_a_chain_that_only_gets_fifo_steps():
    small = [job_of(str(i), 0.0, 1) for i in range(400)]
    large, *_ = drive(Scheduler(1, SECOND, "remaining", 8), [job_of("large", 0.0, 50), *small], SECOND)
    assert large.ended == 50 * 8  # requests without a step go first except in FIFO steps
    assert large.bound(1, 8, SECOND) == 50 * 8 + 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_below_capacity_throughput_is_the_offered_load(workload, policy):
    outcomes = run(Case(CURVES["cpu"], workload, policy, load=0.4, arrivals=150))
    assert len(outcomes) == 150
    evaluations = sum(outcome.evaluations for outcome in outcomes)
    offered = evaluations / (outcomes[-1].created - outcomes[0].created)
    done = evaluations / (max(outcome.ended for outcome in outcomes) - outcomes[0].created)
    assert done == pytest.approx(offered, rel=0.07)  # the last jobs end after the last arrival


def test_a_job_has_the_evaluations_of_its_request():
    requests = trace("mix", 100, 50, seed=1)
    jobs = jobs_of(requests)
    assert [job.evaluations for job in jobs] == [request.evaluations for request in requests]
    assert [job.created for job in jobs] == [request.created for request in requests]


def table_of(capsys, *arguments):
    run.cache_clear()
    simulate.main(["--quick", *arguments])
    return capsys.readouterr().out


def test_the_same_seed_gives_the_same_tables(capsys):
    arguments = ["--curve", "cpu", "--only", "policies"]
    first = table_of(capsys, *arguments)
    assert "|mix|peer|16|" in first
    assert table_of(capsys, *arguments) == first
    assert table_of(capsys, *arguments, "--seed", "1") != first


def test_every_table_is_printed_and_written(capsys, tmp_path):
    info = tmp_path / "info.json"
    info.write_text(json.dumps({"runtime": {"step_seconds": {"8": 0.05, "1": 0.01, "2": 0.015}}}))
    printed = table_of(capsys, "--curve", str(info), "--out", str(tmp_path))
    assert "1: 10.0, 2: 15.0, 8: 50.0" in printed
    assert all(f"#### {name}" in printed for name in simulate.SECTIONS)
    assert (tmp_path / "scheduling-tables.md").read_text().strip() == printed.strip()
    assert (tmp_path / "scheduling.svg").read_text().startswith("<?xml")
