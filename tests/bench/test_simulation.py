import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service.scheduler import Scheduler, StepTimes

from bench import simulate
from bench.simulation import CURVES, POLICIES, Case, RunToCompletion, drive, jobs_of, request, run
from bench.workload import WORKLOADS, trace

SECOND = StepTimes([(1, 1.0), (2, 1.0)])  # every step takes a second
NEVER = 10**9


def ends(serving, jobs):
    return [outcome.ended for outcome in drive(serving, jobs, SECOND)]


def two_jobs():
    return [request("long", 0.0, 4), request("short", 0.5, 1)]


def test_fifo_finishes_the_first_first():
    assert ends(Scheduler(1, SECOND, "fifo"), two_jobs()) == [4, 5]


def test_remaining_lets_the_short_one_overtake():
    assert ends(Scheduler(1, SECOND, "remaining", NEVER), two_jobs()) == [5, 2]


def test_a_turn_goes_in_order_of_arrival():
    assert ends(Scheduler(1, SECOND, "remaining", 2), two_jobs()) == [5, 3]


def test_times_to_the_first_step_are_to_its_end():
    outcomes = drive(Scheduler(1, SECOND, "fifo"), two_jobs(), SECOND)
    assert [outcome.first - outcome.created for outcome in outcomes] == [1, 4.5]


def test_the_peer_runs_equal_step_counts_to_completion():
    jobs = [request("a", 0, 3), request("b", 0.5, 3), request("other", 0.6, 2), request("c", 0.7, 3)]
    # a alone; b takes c with it, past the other, though that came earlier.
    assert ends(RunToCompletion(2), jobs) == [3, 6, 8, 6]


def test_the_peer_parts_what_does_not_fit():
    jobs = [request("wide", 0, 2, images=3), request("guided", 0, 2, rows=2)]
    assert ends(RunToCompletion(2), jobs) == [4, 6]  # two images, the third alone, the guided one


def test_slowdown_is_one_for_a_job_alone():
    for images in (1, 2, 16):
        for name, curve in CURVES.items():
            width = max(rows for rows, seconds in curve if rows <= images)
            best = min((w for w, _ in curve if w <= width), key=lambda w: StepTimes(curve).at(w) / w)
            (outcome,) = Case(curve, width=best).drive([request(name, 1.0, 10, images)])
            assert outcome.slowdown(curve) == pytest.approx(1)


jobs_asked_for = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 12), st.integers(1, 6), st.integers(1, 2)),
    min_size=1,
    max_size=25,
)


def asked(gaps_and_shapes):
    created = np.cumsum([gap for gap, *_ in gaps_and_shapes]).tolist()
    return [request(str(i), created[i], *shape) for i, (_, *shape) in enumerate(gaps_and_shapes)]


class Watched(Scheduler):
    """Notes every time it is told."""

    def __post_init__(self):
        super().__post_init__()
        self.told: list[float] = []

    def add(self, job, now):
        assert now >= job.created
        self.told.append(now)
        return super().add(job, now)

    def schedule(self, now):
        self.told.append(now)
        return super().schedule(now)

    def commit(self, plan, now, draw):
        assert now > self.told[-1]
        self.told.append(now)
        return super().commit(plan, now, draw)


@given(jobs_asked_for, st.sampled_from(["remaining", "fifo", "sharing"]), st.integers(1, 8))
def test_the_clock_only_moves_forward_and_every_job_ends(shapes, policy, width):
    times = StepTimes(CURVES["cpu"])
    watched = Watched(width, times, policy)
    outcomes = drive(watched, asked(shapes), times)
    assert watched.told == sorted(watched.told)
    assert len(outcomes) == len(shapes)
    assert all(0 < o.first - o.created <= o.latency for o in outcomes)


@settings(max_examples=100)
@given(jobs_asked_for, st.sampled_from([1, 2, 4, 8]), st.sampled_from([2, 3, 8, 64]))
def test_no_job_outlasts_its_bound(shapes, width, turn):
    times = StepTimes(CURVES["cpu"])
    for outcome in drive(Scheduler(width, times, "remaining", turn), asked(shapes), times):
        assert outcome.latency <= outcome.bound(width, turn, times) + 1e-9


def test_the_bound_is_nearly_reached_by_a_chain_that_only_gets_its_turns():
    small = [request(str(i), 0.0, 1) for i in range(400)]
    large, *_ = drive(Scheduler(1, SECOND, "remaining", 8), [request("large", 0.0, 50), *small], SECOND)
    assert large.ended == 50 * 8  # those that have had no step yet go first but for the turns
    assert large.bound(1, 8, SECOND) == 50 * 8 + 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_below_capacity_what_is_asked_for_is_done(workload, policy):
    outcomes = run(Case(CURVES["cpu"], workload, policy, load=0.4, arrivals=150))
    assert len(outcomes) == 150
    rows = sum(outcome.rows for outcome in outcomes)
    offered = rows / (outcomes[-1].created - outcomes[0].created)
    done = rows / (max(outcome.ended for outcome in outcomes) - outcomes[0].created)
    assert done == pytest.approx(offered, rel=0.07)  # the last jobs end after the last arrival


def test_a_job_costs_what_its_ask_says():
    asks = trace("mix", 100, 50, seed=1)
    assert [job.remaining for job in jobs_of(asks)] == [ask.rows for ask in asks]
    assert [job.created for job in jobs_of(asks)] == [ask.created for ask in asks]


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
