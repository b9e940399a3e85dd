"""Steps with a fake network, each launched before the one before it is read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chain import Chain, InitialLatent, SphericalMix, measuring
from model.denoiser import Stepped
from model.samplers import build_measurement
from model.state import Row
from service.engine.engine import LEAD_S, Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, Stage
from service.engine.messages import (
    AddJob,
    CancelJob,
    Cancelled,
    Event,
    Failed,
    Finished,
    Preview,
    Queued,
    StepReport,
    Terminal,
)
from service.errors import ComputeError, DeadlineError, NonFiniteError
from tests.service.engine.driven import (
    PROMPT,
    Clock,
    Device,
    drain,
    engine_with,
    in_flight,
    kept,
    nothing_is_held,
    pictures_of,
    previews,
    read_next,
    results,
    slots_of,
    two_stages,
)
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, fake_engine, job_of


def test_one_network_call_serves_all_jobs() -> None:
    denoiser = FakeDenoiser()
    jobs = [job_of("a", [1, 2], steps=5), job_of("b", [3], steps=3), job_of("c", [4], 2, guidance_scale=3.0)]
    events = drain(engine_with(denoiser, *jobs))
    assert denoiser.widths == [5, 5, 3, 2, 2]
    assert [event.job_id for event in events if isinstance(event, Finished)] == ["c", "b", "a"]


def test_a_step_reports_itself() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=1))
    assert engine.step() == StepReport([])  # launched
    report = engine.step()
    assert isinstance(report, StepReport)
    assert (report.batch_size, report.samples, report.nonfinite) == (2, 2, 0)
    assert report.seconds > 0
    (event,) = report.events
    assert isinstance(event, Finished)
    assert event.pictures[1].pixels.shape == (SIZE, SIZE, 1)
    assert engine.step() is None


def test_step_times_are_learned_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between two network calls counts, being idle does not."""
    clock = Clock(monkeypatch)
    engine = engine_with(FakeDenoiser(), job_of("a", [1], steps=3))
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(engine.scheduler.times, "observe", lambda rows, seconds: seen.append((rows, seconds)))
    for clock.now in (0.0, 5.0, 7.0, 8.0):
        engine.step()
    assert seen == [(1, 5.0), (1, 2.0), (1, 1.0)]
    clock.now = 100.0  # nothing was left to do meanwhile
    engine.handle(AddJob(job_of("b", [2], steps=1)))
    engine.step()
    clock.now = 104.0
    engine.step()
    assert seen[3:] == [(1, 4.0)]


@PROMPT
def test_nothing_is_learned_from_steps_that_failed_or_were_skipped(
    prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(Device(prompt=prompt, faults={(1, 1): ValueError}), job_of("a", [1], steps=5))
    seen: list[int] = []
    monkeypatch.setattr(engine.scheduler.times, "observe", lambda rows, _seconds: seen.append(rows))
    drain(engine)
    assert seen == [1]  # the third had been launched, and nobody wanted it any more
    engine.handle(AddJob(job_of("b", [1], steps=3)))
    engine.handle(AddJob(job_of("c", [2, 3], steps=4)))
    drain(engine)
    assert seen == [1, 3, 2, 2]  # but for the second


def test_the_duration_of_a_step_includes_the_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch returns at once; the results are there when they are read."""
    clock = Clock(monkeypatch)

    class Slow(FakeDenoiser):
        def step(self, rows: Sequence[Row]) -> list[Stepped]:
            clock.now += 5.0
            return super().step(rows)

    assert read_next(engine_with(Slow(), job_of("a", [1]))).seconds == 5.0


# ── Launched ahead ─────────────────────────────────────────────────────────────────────────────


def test_a_step_is_launched_before_the_one_before_it_is_read() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("a", [1, 2], steps=3))
    counts = []
    while not engine.idle:
        engine.step()
        counts.append((len(denoiser.launched), len(denoiser.widths)))
    assert counts == [(1, 0), (2, 1), (3, 2), (3, 3)]
    assert [[row.step for row in rows] for rows in denoiser.launched] == [[0, 0], [1, 1], [2, 2]]


def test_it_is_known_which_jobs_are_in_the_step_on_its_way() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=2), job_of("b", [3], steps=1))
    assert list(engine.launched) == []
    assert engine.launch() is None
    assert sorted(engine.launched) == ["a", "b"]
    first = engine.launch()
    assert list(engine.launched) == ["a"]
    assert first is not None
    engine.read(first)
    assert not engine.idle
    second = engine.launch()
    assert list(engine.launched) == []
    assert second is not None
    engine.read(second)
    assert engine.idle


def test_the_load_counts_what_is_not_launched_yet() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=2))
    assert (engine.load.running, engine.load.waiting, engine.load.backlog) == (0, 2, 4)
    engine.step()
    assert (engine.load.running, engine.load.waiting, engine.load.backlog) == (2, 0, 2)
    engine.step()
    assert (engine.load.running, engine.load.waiting, engine.load.backlog) == (0, 0, 0)
    assert not engine.idle


def test_there_is_time_to_spare_until_the_next_launch_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    class TakesTime(FakeDenoiser):
        def launch(self, rows: Sequence[Row]) -> Any:
            clock.now += 0.01
            return super().launch(rows)

        def step(self, rows: Sequence[Row]) -> list[Stepped]:
            clock.now += 0.003
            return super().step(rows)

    engine = engine_with(TakesTime(), job_of("a", [1], steps=3))
    engine.scheduler.times = StepTimes([(1, 0.1)])
    assert engine.spare_s() == 0.0
    engine.step()
    launching_s = 0.1 * 0.01
    assert engine.spare_s() == pytest.approx(0.1 - LEAD_S - 0.1 * 0.1 - 2 * launching_s)
    clock.now += 0.05
    assert engine.spare_s() > 0
    clock.now += 0.0475
    assert engine.spare_s() <= 0
    engine.step()  # the next one begins when the first is done, not when it was launched
    launching_s += 0.1 * (0.01 - launching_s)
    assert engine.spare_s() == pytest.approx(0.9 * engine.scheduler.times.at(1) - LEAD_S - 2 * launching_s)
    drain(engine)
    assert engine.spare_s() == 0.0


# ── Cancellation and deadlines ─────────────────────────────────────────────────────────────────


@PROMPT
@pytest.mark.parametrize("last", [False, True])
def test_cancelled_between_launch_and_read(last: bool, prompt: bool) -> None:
    denoiser = Device(prompt=prompt)
    gone = job_of("gone", [1, 2], steps=1 if last else 3, preview="x0")
    engine = engine_with(denoiser, gone, job_of("neighbour", [3], steps=4, preview="both"))
    engine.step()
    slots = set(slots_of(engine, "gone"))
    assert engine.handle(CancelJob("gone")) == [Cancelled("gone")]
    assert (kept(engine, "gone"), kept(engine, "neighbour")) == (0, 1)
    engine.handle(AddJob(job_of("next", [4, 5], steps=2)))
    events = drain(engine)  # neither preview nor result of it, though both were computed
    assert {event.job_id for event in events} == {"neighbour", "next"}
    assert {row.slot for rows in denoiser.launched for row in rows if row.chain.seed in (4, 5)} == slots
    clean = [job_of("neighbour", [3], steps=4, preview="both"), job_of("next", [4, 5], steps=2)]
    assert results(events) == results(drain(engine_with(Device(), *clean)))
    alone = drain(engine_with(Device(), clean[0]))
    assert pictures_of(events, "neighbour") == pictures_of(alone, "neighbour")
    assert nothing_is_held(engine)


def test_a_step_of_cancelled_jobs_alone_is_waited_for() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("gone", [1, 2], preview="x0"))
    engine.step()
    engine.handle(CancelJob("gone"))
    report = engine.step()
    assert report is not None
    assert (report.events, report.batch_size, report.samples) == ([], 2, 0)
    assert denoiser.widths == [2]
    assert engine.step() is None
    assert nothing_is_held(engine)


def test_cancelled_between_steps_the_slots_come_back() -> None:
    engine = engine_with(FakeDenoiser(), job_of("gone", [1]))
    engine.step()
    engine.step()
    assert kept(engine, "gone") == 1
    engine.handle(CancelJob("gone"))
    assert engine._progress == {}
    assert engine._free == [0]


def test_a_finished_image_keeps_no_slot() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=3), max_batch_size=1)
    for _ in range(6):
        engine.step()
    assert kept(engine, "a") == 1  # the other one has a step to go
    engine.step()
    assert nothing_is_held(engine)


@PROMPT
@pytest.mark.parametrize("broken", [{"gives_nan": {1}}, {"raises": {1: ValueError}}])
def test_a_failed_job_keeps_no_slots(broken: dict[str, Any], prompt: bool) -> None:
    engine = engine_with(Device(prompt=prompt, **broken), job_of("a", [1, 2, 3], steps=3))
    drain(engine)
    assert nothing_is_held(engine)


@pytest.mark.parametrize("broken", [{"gives_nan": {1}}, {"raises": {1: ValueError}}])
def test_a_failing_sample_of_a_job_cancelled_meanwhile_ends_it_once(broken: dict[str, Any]) -> None:
    engine = engine_with(FakeDenoiser(**broken), job_of("gone", [1]))
    engine.step()
    assert engine.handle(CancelJob("gone")) == [Cancelled("gone")]
    assert drain(engine) == []


def test_a_job_that_arrives_during_a_step_runs_in_the_next() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("first", [1], steps=2))
    engine.step()
    engine.handle(AddJob(job_of("late", [2], steps=1)))
    drain(engine)
    assert denoiser.widths == [1, 2]


def test_expired_work_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = FakeDenoiser()
    now = time.monotonic()
    engine = engine_with(denoiser, job_of("late", [1], deadline=now + 1.0))
    monkeypatch.setattr("service.engine.engine.monotonic", lambda: now + 1.1)
    (event,) = drain(engine)
    assert isinstance(event, Failed)
    assert isinstance(event.error, DeadlineError)
    assert denoiser.widths == []


# ── Stages ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_starts_from_what_the_one_before_it_left() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, two_stages(), job_of("b", [3], steps=9))
    finished = next(event for event in drain(engine) if isinstance(event, Finished) and event.job_id == "a")
    assert [picture.seed for picture in finished.pictures] == [10, 11, 12]
    for seed in (10, 11, 12):
        left = [latent.tobytes() for latent in denoiser.carried[seed]]
        assert left == [denoiser.seen[1, 2], denoiser.seen[2, 2]]
    assert 3 not in denoiser.carried
    # Between the two stages there is a step without it: what the first one left is read first.
    assert denoiser.widths == [3, 3, 3, 1, 4, 4, 1, 1, 1]
    assert nothing_is_held(engine)


@PROMPT
@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 8])
def test_a_stage_begins_when_all_of_the_one_before_it_is_read(max_batch_size: int, prompt: bool) -> None:
    first = job_of("a", [1, 2, 3, 4, 5], steps=3).stages[0]
    plan = job_of("a", [0], steps=2).stages[0].chains[0].plan
    start = InitialLatent(carried=SphericalMix(0, 4, 0.5))
    second = Stage("denoise", tuple(Chain(plan, 10 + i, None, start) for i in range(4)))
    spec = JobSpec("a", "ddim", (Stage("invert", first.chains), second), preview="x0")
    read: set[tuple[int, int]] = set()

    class Watched(Engine):
        def launch(self) -> Any:
            before = super().launch()
            for row in self._flight.rows.values() if self._flight is not None else ():
                assert row.chain.seed < 10 or {(seed, 2) for seed in range(1, 6)} <= read
            return before

        def read(self, flight: Any) -> StepReport:
            read.update((row.chain.seed, row.step) for row in flight.rows.values())
            return super().read(flight)

    denoiser = Device(prompt=prompt)
    made = fake_engine(denoiser, max_batch_size)
    engine = Watched(denoiser, made.scheduler)
    engine.handle(AddJob(spec))
    events = drain(engine)
    assert len(results(events)["a"]) == 4
    assert max(denoiser.widths) <= max_batch_size
    for seed in (10, 11, 12, 13):
        left = [latent.tobytes() for latent in denoiser.carried[seed]]
        assert left == [denoiser.seen[each, 2] for each in range(1, 6)]
    shown = Counter(p.index for e in events if isinstance(e, Preview) for p in e.pictures)
    assert shown == dict.fromkeys(range(4), 2)
    assert nothing_is_held(engine)


@PROMPT
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_behind_a_failed_one_counts_in_stages_too(stage: int, prompt: bool) -> None:
    """The last step of a stage is run again, since the one before it has failed of another job."""
    step = 1 if stage == 1 else 4  # of a job that has no gap between its stages
    denoiser = Device(prompt=prompt, faults={(3, step): ValueError})
    engine = engine_with(denoiser, two_stages(), job_of("b", [3], steps=9))
    events = drain(engine)
    assert {event.job_id for event in events if isinstance(event, Failed)} == {"b"}
    assert results(events) == results(drain(engine_with(Device(), two_stages())))
    assert nothing_is_held(engine)


def test_previews_are_of_the_last_stage() -> None:
    found = previews(two_stages(preview="x0"))
    assert [(preview.step, preview.steps, len(preview.pictures)) for preview in found] == [
        (1, 2, 3),
        (2, 2, 3),
    ]


def test_a_job_of_two_stages_is_queued_once_and_counts_both() -> None:
    engine = fake_engine(FakeDenoiser(), max_batch_size=1)
    (queued,) = engine.handle(AddJob(two_stages()))
    assert isinstance(queued, Queued)
    assert queued.eta_s == pytest.approx(12 * engine.scheduler.times.at(1))
    assert [type(event) for event in drain(engine)] == [Finished]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_job_is_cancelled_in_either_stage(steps: int) -> None:
    engine = engine_with(FakeDenoiser(), two_stages())
    for _ in range(steps):
        engine.step()
    assert in_flight(engine, "a").place == (steps >= 4)
    assert engine.handle(CancelJob("a")) == [Cancelled("a")]
    assert (engine._progress, len(engine.scheduler), engine.scheduler.backlog) == ({}, 0, 0)
    assert drain(engine) == []
    assert nothing_is_held(engine)


# ── Measurements ───────────────────────────────────────────────────────────────────────────────


def test_samples_are_measured_step_by_step_beside_others() -> None:
    plan = build_measurement(SCHEDULE, [90, 40, 0])
    image = np.zeros((1, SIZE, SIZE), np.float32)
    stage = Stage("measure", tuple(measuring(plan, image, seed) for seed in (1, 2)))
    spec = JobSpec("measured", "measure", (stage,), preview="x0")
    events = drain(engine_with(FakeDenoiser(), spec, job_of("neighbour", [3], steps=5)))
    (finished,) = (e for e in events if isinstance(e, Finished) and e.job_id == "measured")
    assert [[found.timestep for found in each] for each in finished.measurements] == [[90, 40, 0]] * 2
    assert [[found.bits for found in each] for each in finished.measurements] == [[0, 1, 2]] * 2
    shown = [p for e in events if isinstance(e, Preview) for p in e.pictures]
    assert [p.measurement.timestep for p in shown if p.index == 1 and p.measurement] == [90, 40, 0]
    (neighbour,) = (e for e in events if isinstance(e, Finished) and e.job_id == "neighbour")
    assert neighbour.measurements == ()


# ── Slots ──────────────────────────────────────────────────────────────────────────────────────


adding = st.tuples(
    st.just("add"),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=2),  # stages: n, steps
    st.none()
    | st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([ValueError, None, "launch"])),
)


actions = st.lists(
    adding | st.tuples(st.just("cancel"), st.integers(0, 9)) | st.tuples(st.just("step")),
    min_size=1,
    max_size=25,
)


@given(actions, st.booleans(), st.sampled_from([1, 3, 8]), st.sampled_from([1.0, 2.0, 100.0]))
@settings(max_examples=150, deadline=None)
def test_no_two_samples_ever_share_a_slot(
    todo: list[Any], prompt: bool, max_batch_size: int, rows_that_fit: float
) -> None:
    """Whatever comes, is cancelled and fails: every image is as it is alone, and all slots come back."""
    denoiser = Device(prompt=prompt, rows_that_fit=rows_that_fit)
    engine = engine_with(denoiser, max_batch_size=max_batch_size)
    specs: dict[str, JobSpec] = {}
    events: list[Event] = []
    most = seed = 0
    for kind, *rest in [*todo, *[("step",)] * 200]:
        match kind, rest:
            case "add", (shapes, fault):
                name = f"job{len(specs)}"
                stages: list[Stage] = []
                for n, steps in shapes:
                    stages += job_of(name, range(seed, seed + n), steps).stages
                    if fault is not None and fault[2] == "launch":
                        denoiser.unlaunched.add((seed + fault[0], fault[1]))
                    elif fault is not None:
                        denoiser.faults[seed + fault[0], fault[1]] = fault[2]
                    seed += max(n, 4)  # so that a fault is of this job, or of nobody
                specs[name] = JobSpec(name, "ddim", tuple(stages), preview="xt")
                events += engine.handle(AddJob(specs[name]))
            case "cancel", (which,):
                events += engine.handle(CancelJob(f"job{which}"))
            case _:
                most = max(most, sum(specs[job_id].slots for job_id in engine.scheduler._jobs))
                report = engine.step()
                events += report.events if report is not None else []
        held = [slot for job_id in engine._progress for slot in slots_of(engine, job_id)]
        assert sorted([*held, *engine._free]) == list(range(engine._slots))  # each in one place
        assert engine._slots <= most
    assert nothing_is_held(engine)
    assert Counter(e.job_id for e in events if isinstance(e, Terminal)) == dict.fromkeys(specs, 1)
    alone = Device()
    for name, pixels in results(events).items():
        assert results(drain(engine_with(alone, specs[name])))[name] == pixels
    for event in events:
        if isinstance(event, Failed):
            assert type(event.error) in (ComputeError, NonFiniteError)
