"""Steps with a fake network, launched ahead: a fault ends its own job, neighbours continue bit for bit."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chain import Chain, Image, InitialLatent, SphericalMix, measuring
from model.denoiser import Latent, Stepped, render
from model.samplers import build_measurement
from model.state import Row
from service.engine import engine as engine_module
from service.engine.engine import LEAD_S, PREVIEW_INTERVAL_S, Engine
from service.engine.estimates import StepTimes
from service.engine.isolation import FatalError
from service.engine.jobs import Job, JobSpec, PreviewKind, Stage
from service.engine.messages import (
    AbortAll,
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
from tests.service import fakes
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, counting_job, fake_engine, job_of

SEEDS = range(8)
PROMPT = pytest.mark.parametrize("prompt", [False, True], ids=["late", "prompt"])


@dataclass
class Device(FakeDenoiser):
    """prompt: it computes at once what is launched, as if never behind; else as late as can be, when read.

    faults: what steps raise, by seed and step; None: they give a NaN. unlaunched: seeds and steps of rows
    that make a launch raise.
    """

    prompt: bool = False
    faults: dict[tuple[int, int], type[Exception] | None] = field(default_factory=dict)
    unlaunched: set[tuple[int, int]] = field(default_factory=set)

    def launch(self, rows: Sequence[Row]) -> Any:
        if not self.unlaunched.isdisjoint((row.chain.seed, row.step) for row in rows):
            raise OverflowError("on purpose")
        step = super().launch(rows)
        return Computed(step.read) if self.prompt else step

    def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
        made = super()._one(chain, latent, step)
        error = self.faults.get((chain.seed, step))
        if error is not None:
            raise error("on purpose")
        return Latent(made.x * torch.nan, made.x0) if (chain.seed, step) in self.faults else made


class Computed:
    """A step that has been computed; what it raised is raised when it is read."""

    def __init__(self, compute: Callable[[], Sequence[Stepped]]) -> None:
        try:
            self._done, self._error = compute(), None
        except Exception as error:  # noqa: BLE001 (whatever it is)
            self._error = error

    def read(self) -> Sequence[Stepped]:
        if self._error is not None:
            raise self._error
        return self._done


def engine_with(denoiser: FakeDenoiser, *specs: JobSpec, max_batch_size: int = 16) -> Engine:
    engine = fake_engine(denoiser, max_batch_size)
    for spec in specs:
        engine.handle(AddJob(spec))
    return engine


def in_flight(engine: Engine, job_id: str) -> Job:
    return engine.scheduler._jobs[job_id]


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while (report := engine.step()) is not None:
        events += report.events
    return events


def read_next(engine: Engine) -> StepReport:
    """Launch a step, and one before it if there is none; then the report of that."""
    report = engine.step()
    if report is not None and not report.batch_size:
        report = engine.step()
    assert report is not None
    return report


def slots_of(engine: Engine, job_id: str) -> list[int]:
    """Those that the samples of a job hold."""
    begun = engine._progress[job_id].begun if job_id in engine._progress else ()
    return [sample.slot for sample in begun if sample.slot is not None]


def kept(engine: Engine, *job_ids: str) -> int:
    """Slots that are held for these jobs."""
    return sum(len(slots_of(engine, job_id)) for job_id in job_ids)


def nothing_is_held(engine: Engine) -> bool:
    """Whether all that the engine held has been let go of, each slot once."""
    assert sorted(engine._free) == list(range(engine._slots))
    assert (len(engine.scheduler), engine.scheduler.backlog) == (0, 0)
    return engine.idle and engine._progress == {}


def clean_run(seeds: list[int]) -> dict[tuple[int, int], bytes]:
    """Every x of these seeds, each computed alone."""
    denoiser = FakeDenoiser()
    for seed in seeds:
        drain(engine_with(denoiser, job_of("alone", [seed])))
    return denoiser.seen


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


class Clock:
    """What the engine measures durations with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("service.engine.engine.perf_counter", lambda: self.now)


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


# ── A sample that breaks the step ──────────────────────────────────────────────────────────────


@PROMPT
@pytest.mark.parametrize("culprit", [0, 3, 7])
def test_a_raising_sample_fails_alone(culprit: int, prompt: bool) -> None:
    denoiser = Device(prompt=prompt, raises={culprit: ValueError})
    jobs = [job_of(f"job{seed}", [seed]) for seed in SEEDS]
    engine = engine_with(denoiser, *jobs)
    events = drain(engine)
    ends = {event.job_id: event for event in events if isinstance(event, Finished | Failed)}
    failed = ends.pop(f"job{culprit}")
    assert isinstance(failed, Failed)
    assert type(failed.error) is ComputeError
    assert "ValueError" in failed.error.detail
    assert "seed" not in failed.error.detail  # the exception's own words stay inside
    assert all(isinstance(event, Finished) for event in ends.values())
    # 8, then the half with the culprit, its quarter, itself, each followed by the half without.
    assert sorted(denoiser.widths[:7]) == [1, 1, 2, 2, 4, 4, 8]
    assert denoiser.widths[7:] == [7, 7, 7, 7]
    assert denoiser.seen == clean_run([seed for seed in SEEDS if seed != culprit])
    assert engine.scheduler.max_batch_size == 16
    assert nothing_is_held(engine)


def results(events: list[Event]) -> dict[str, list[bytes]]:
    return {
        event.job_id: [picture.pixels.tobytes() for picture in event.pictures]
        for event in events
        if isinstance(event, Finished)
    }


def fail_and_no_other(denoiser: Device, culprits: set[int], steps: int = 5) -> list[Event]:
    """Run eight jobs of one image and see that these fail, and that the others are as without them."""
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed], steps) for seed in SEEDS))
    events = drain(engine)
    assert {e.job_id for e in events if isinstance(e, Failed)} == {f"job{seed}" for seed in culprits}
    assert Counter(e.job_id for e in events if isinstance(e, Terminal)) == {f"job{s}": 1 for s in SEEDS}
    fine = [seed for seed in SEEDS if seed not in culprits]
    clean = Device()
    alone = drain(engine_with(clean, *(job_of(f"job{seed}", [seed], steps) for seed in fine)))
    assert results(events) == results(alone)
    assert {key: x for key, x in denoiser.seen.items() if key[0] not in culprits} == clean.seen
    assert nothing_is_held(engine)
    return events


@PROMPT
@pytest.mark.parametrize("fault", [ValueError, None], ids=["raises", "nan"])
@pytest.mark.parametrize("step", range(5))
def test_a_sample_fails_alone_that_is_in_the_next_step_too(
    step: int, fault: type[Exception] | None, prompt: bool
) -> None:
    denoiser = Device(prompt=prompt, faults={(3, step): fault})
    events = fail_and_no_other(denoiser, {3})
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert type(failed.error) is (ComputeError if fault else NonFiniteError)
    # The next step had been launched with it.
    assert step == 4 or (3, step + 1) in {(row.chain.seed, row.step) for row in denoiser.launched[step + 1]}


@PROMPT
@pytest.mark.parametrize(
    "faults",
    [
        {(1, 1): ValueError, (6, 2): ValueError},
        {(1, 1): ValueError, (6, 2): None},
        {(1, 1): None, (6, 2): ValueError},
        {(1, 0): ValueError, (2, 1): KeyError, (7, 2): ValueError, (0, 3): None, (5, 4): ValueError},
    ],
)
def test_steps_that_fail_one_after_the_other(
    faults: dict[tuple[int, int], type[Exception] | None], prompt: bool
) -> None:
    fail_and_no_other(Device(prompt=prompt, faults=faults), {seed for seed, _ in faults})


@PROMPT
@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_sample_that_cannot_be_launched_fails_alone(step: int, prompt: bool) -> None:
    denoiser = Device(prompt=prompt, unlaunched={(3, step)})
    events = fail_and_no_other(denoiser, {3})
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert type(failed.error) is ComputeError
    assert "OverflowError" in failed.error.detail


@PROMPT
def test_a_failed_launch_and_a_failed_step_one_after_the_other(prompt: bool) -> None:
    for faulty, unlaunched in ((1, 2), (2, 1)):
        faults: dict[tuple[int, int], type[Exception] | None] = {(4, faulty): ValueError}
        fail_and_no_other(Device(prompt=prompt, faults=faults, unlaunched={(5, unlaunched)}), {4, 5})


def test_nothing_is_launched_more_often_than_needed() -> None:
    denoiser = Device(faults={(2, 0): ValueError})
    drain(engine_with(denoiser, job_of("a", [1], steps=4), job_of("b", [2], steps=4)))
    launched = [[(row.chain.seed, row.step) for row in rows] for rows in denoiser.launched]
    ahead, retried = [[(1, 0), (2, 0)], [(1, 1), (2, 1)]], [[(1, 0)], [(2, 0)], [(1, 1)]]
    assert launched == [*ahead, *retried, [(1, 2)], [(1, 3)]]


@PROMPT
def test_a_job_that_comes_while_a_lone_one_fails_is_served(prompt: bool) -> None:
    """Its steps are launched behind a failed one, until one of them is run again."""
    for options in ({"faults": {(1, 0): ValueError}}, {"unlaunched": {(1, 0)}}):
        denoiser = Device(prompt=prompt, **options)
        engine = engine_with(denoiser, job_of("lone", [1]))
        engine.step()
        engine.handle(AddJob(job_of("late", [2, 3])))
        events = drain(engine)
        assert results(events) == results(drain(engine_with(Device(), job_of("late", [2, 3]))))
        assert {event.job_id for event in events if isinstance(event, Failed)} == {"lone"}
        assert nothing_is_held(engine)


@PROMPT
@pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError])
def test_a_sample_is_not_blamed_for_a_cancelled_one(error: type[Exception], prompt: bool) -> None:
    denoiser = Device(prompt=prompt, raises={1: error})
    engine = engine_with(denoiser, job_of("culprit", [1]), job_of("neighbour", [2]))
    engine.step()
    events = [*engine.handle(CancelJob("culprit")), *drain(engine)]
    assert [type(event) for event in events] == [Cancelled, Finished]
    assert results(events) == results(drain(engine_with(Device(), job_of("neighbour", [2]))))
    assert engine.scheduler.max_batch_size == 16
    assert nothing_is_held(engine)


@pytest.mark.parametrize("cancel", [False, True])
def test_what_a_failed_step_held_is_free_before_it_is_retried(cancel: bool) -> None:
    """Though the step keeps its error, and an error its frames."""
    held: list[weakref.ref[torch.Tensor]] = []

    class Holding(Device):
        def step(self, rows: Sequence[Row]) -> list[Stepped]:
            assert all(activations() is None for activations in held)
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            return super().step(rows)

    denoiser = Holding(prompt=True, raises={1: torch.OutOfMemoryError})
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in range(4)))
    engine.step()
    if cancel:
        engine.handle(CancelJob("job1"))
    events = drain(engine)
    assert len(results(events)) == 3


def test_the_comparison_with_a_clean_run_can_fail() -> None:
    denoiser = FakeDenoiser()
    drain(engine_with(denoiser, job_of("a", [1])))
    denoiser.seen[1, 4] = bytes(len(denoiser.seen[1, 4]))
    assert denoiser.seen != clean_run([1])


@PROMPT
def test_two_culprits_fail_and_no_other(prompt: bool) -> None:
    fail_and_no_other(Device(prompt=prompt, raises={2: ValueError, 5: KeyError}), {2, 5})


def test_a_job_fails_once_when_two_of_its_images_do() -> None:
    denoiser = FakeDenoiser(raises={1: ValueError, 2: ValueError})
    events = drain(engine_with(denoiser, job_of("a", [1, 2, 3])))
    assert [type(event) for event in events] == [Failed]


def test_a_sample_whose_start_raises_fails_alone() -> None:
    class NoSuchLabel(FakeDenoiser):
        def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
            if chain.seed == 2:
                raise ValueError("no such class")
            return super().start(chain, carried)

    events = drain(engine_with(NoSuchLabel(), *(job_of(f"job{seed}", [seed]) for seed in range(4))))
    assert {e.job_id for e in events if isinstance(e, Failed)} == {"job2"}
    assert {e.job_id for e in events if isinstance(e, Finished)} == {"job0", "job1", "job3"}


# ── Memory ─────────────────────────────────────────────────────────────────────────────────────


@PROMPT
@pytest.mark.parametrize(("fit", "limit"), [(7, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_out_of_memory_lowers_the_batch_size_for_good(fit: int, limit: int, prompt: bool) -> None:
    denoiser = Device(prompt=prompt, rows_that_fit=fit)
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS))
    limits: list[int] = []
    engine.on_batch_limit = limits.append
    read_next(engine)
    assert engine.scheduler.max_batch_size == limits[-1] == limit
    read_next(engine)  # as wide as the first, since it had been launched before that was read
    before = len(denoiser.widths)
    events = drain(engine)
    assert {event.job_id for event in events if isinstance(event, Finished)} == {f"job{s}" for s in SEEDS}
    assert set(denoiser.widths[before:]) == {limit}
    assert min(limits) == engine.scheduler.max_batch_size == limit
    assert denoiser.seen == clean_run(list(SEEDS))


def test_a_sample_that_never_fits_fails() -> None:
    engine = engine_with(FakeDenoiser(rows_that_fit=1), job_of("guided", [1], guidance_scale=2.0))
    (event,) = drain(engine)
    assert isinstance(event, Failed)
    assert "OutOfMemoryError" in event.error.detail
    assert engine.scheduler.max_batch_size == 1


def test_a_lost_device_is_fatal() -> None:
    engine = engine_with(FakeDenoiser(raises={1: torch.AcceleratorError}), job_of("a", [1]))
    engine.step()
    with pytest.raises(FatalError):
        engine.step()


def test_a_lost_device_is_fatal_even_beside_a_cancelled_job() -> None:
    denoiser = FakeDenoiser(raises={1: torch.AcceleratorError})
    engine = engine_with(denoiser, job_of("a", [1]), job_of("gone", [2]))
    engine.step()
    engine.handle(CancelJob("gone"))
    with pytest.raises(FatalError):
        engine.step()


# ── NaN ────────────────────────────────────────────────────────────────────────────────────────


def test_a_nan_fails_its_own_job() -> None:
    denoiser = FakeDenoiser(gives_nan={3})
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS))
    report = read_next(engine)
    assert (report.samples, report.nonfinite) == (7, 1)
    (event,) = report.events
    assert isinstance(event, Failed)
    assert (event.job_id, type(event.error)) == ("job3", NonFiniteError)
    events = drain(engine)
    assert {e.job_id for e in events if isinstance(e, Finished)} == {f"job{s}" for s in SEEDS if s != 3}
    del denoiser.seen[3, 0], denoiser.seen[3, 1]  # the second step had been launched
    assert denoiser.seen == clean_run([seed for seed in SEEDS if seed != 3])


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


# ── Pictures ───────────────────────────────────────────────────────────────────────────────────


def test_previews_and_results_are_the_latents() -> None:
    denoiser = FakeDenoiser()
    events = drain(engine_with(denoiser, job_of("a", [7], steps=3, preview="both")))
    for event in events:
        row = event.step - 1 if isinstance(event, Preview) else 2
        x = torch.frombuffer(bytearray(denoiser.seen[7, row]), dtype=torch.float32).view(1, SIZE, SIZE)
        pictures = event.pictures if isinstance(event, Preview | Finished) else ()
        assert [p.kind for p in pictures] == (["x0", "xt"] if isinstance(event, Preview) else ["xt"])
        for picture in pictures:
            assert (picture.pixels == render(x[None])[0].numpy()).all()
    assert len(events) == 4


def measuring_job(seed: int, timesteps: list[int], preview: PreviewKind = "both") -> JobSpec:
    image = np.zeros((1, SIZE, SIZE), np.float32)
    chain = measuring(build_measurement(SCHEDULE, timesteps), image, seed)
    return JobSpec("measured", "measure", (Stage("measure", (chain,)),), preview=preview)


def test_a_measurement_shows_what_was_measured_and_leaves_its_last_prediction() -> None:
    denoiser = FakeDenoiser()
    spec = measuring_job(7, [80, 20, 0])
    events = drain(engine_with(denoiser, spec))
    start = FakeDenoiser().start(spec.stages[0].chains[0]).x
    made = [
        torch.frombuffer(bytearray(denoiser.seen[7, step]), dtype=torch.float32).view(1, SIZE, SIZE)
        for step in range(3)
    ]
    finished = events[-1]
    assert isinstance(finished, Finished)
    for step, event in enumerate(events[:-1]):
        assert isinstance(event, Preview)
        x0_pred, before = event.pictures
        assert (x0_pred.kind, before.kind) == ("x0", "xt")
        assert (x0_pred.pixels == render(made[step][None])[0].numpy()).all()
        assert (before.pixels == render([start, *made][step][None])[0].numpy()).all()
        assert x0_pred.measurement == before.measurement == finished.measurements[0][step]
    (last,) = finished.pictures
    assert (last.kind, last.measurement) == ("x0", finished.measurements[0][-1])
    assert [found.timestep for found in finished.measurements[0]] == [80, 20, 0]


def test_a_prediction_has_to_be_finite_too() -> None:
    class Doubtful(FakeDenoiser):
        def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
            made = super()._one(chain, latent, step)
            return Latent(made.x, made.x0 * torch.nan)

    for spec in (measuring_job(7, [80, 20], "none"), job_of("a", [7])):
        (event,) = drain(engine_with(Doubtful(), spec))
        assert isinstance(event, Failed)
        assert isinstance(event.error, NonFiniteError)


def previews(spec: JobSpec, max_batch_size: int = 8) -> list[Preview]:
    events = drain(engine_with(FakeDenoiser(), spec, max_batch_size=max_batch_size))
    return [event for event in events if isinstance(event, Preview)]


def test_previews_come_at_once_when_due_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "at", lambda *_: 1.0)  # a second a step
    found = previews(counting_job("a", steps=10, preview="x0", preview_every=4))
    assert [(p.step, p.steps, p.timestep) for p in found] == [(1, 10, 9), (4, 10, 6), (8, 10, 2), (10, 10, 0)]
    assert [p.eta_s for p in found] == [9.0, 6.0, 2.0, 0.0]


@pytest.mark.parametrize(("kind", "shown"), [("x0", ["x0"]), ("xt", ["xt"]), ("both", ["x0", "xt"])])
def test_previews_show_what_was_asked_for(kind: PreviewKind, shown: list[str]) -> None:
    (found,) = previews(counting_job("a", n=2, steps=1, preview=kind))
    assert [(p.index, p.kind) for p in found.pictures] == [(i, each) for i in (0, 1) for each in shown]


def test_no_previews_when_none_are_asked_for() -> None:
    assert previews(counting_job("a", steps=5, preview="none")) == []


def test_samples_at_different_steps_come_in_different_previews() -> None:
    found = previews(counting_job("a", n=3, steps=2, preview="x0"), max_batch_size=2)
    assert all(len({p.index for p in preview.pictures}) == len(preview.pictures) for preview in found)
    assert Counter(p.index for preview in found for p in preview.pictures) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(
    ("step_s", "shown"),
    [
        (PREVIEW_INTERVAL_S * 0.3, [1, 5, 9, 13, 17, 20]),
        (PREVIEW_INTERVAL_S * 0.01, [1, 20]),
        (PREVIEW_INTERVAL_S * 1.1, [*range(1, 21)]),
    ],
)
def test_by_default_previews_come_as_fast_as_an_eye_can_follow(
    step_s: float, shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    jobs = [counting_job(name, n=2, steps=20, preview="x0", preview_every=None) for name in "ab"]
    engine = engine_with(FakeDenoiser(), *jobs)
    found: list[Event] = []
    while (report := engine.step()) is not None:
        found += report.events
        clock.now += step_s
    for name in "ab":  # of each job by itself, and of all its samples
        its = [event for event in found if isinstance(event, Preview) and event.job_id == name]
        assert [preview.step for preview in its] == shown
        assert all(len(preview.pictures) == 2 for preview in its)


def test_by_default_a_slow_chain_has_about_two_dozen_previews(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    spec = counting_job("a", steps=60, preview="x0", preview_every=None)
    engine = engine_with(FakeDenoiser(), spec)
    found: list[Event] = []
    while (report := engine.step()) is not None:
        found += report.events
        clock.now += 2 * PREVIEW_INTERVAL_S
    assert [event.step for event in found if isinstance(event, Preview)] == [1, *range(2, 61, 2)]


def test_by_default_many_jobs_share_what_can_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PREVIEWS_PER_S", 20)
    clock = Clock(monkeypatch)
    jobs = [counting_job(f"job{i}", steps=20, preview="x0", preview_every=None) for i in range(8)]
    unseen = [counting_job(f"unseen{i}", steps=40) for i in range(8)]  # have no part in it
    engine = engine_with(FakeDenoiser(), *jobs, *unseen)  # 8 jobs: one every 0.4 s
    found: list[Event] = []
    while (report := engine.step()) is not None:
        found += report.events
        clock.now += PREVIEW_INTERVAL_S * 1.01
    steps = [event.step for event in found if isinstance(event, Preview) and event.job_id == "job3"]
    assert steps == [1, 5, 9, 13, 17, 20]


def test_where_images_take_turns_each_has_its_first_preview_and_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    spec = counting_job("a", n=5, steps=30, preview="x0", preview_every=None)
    engine = engine_with(FakeDenoiser(), spec, max_batch_size=2)
    found: list[tuple[float, Preview]] = []
    while (report := engine.step()) is not None:
        found += [(clock.now, event) for event in report.events if isinstance(event, Preview)]
        clock.now += PREVIEW_INTERVAL_S / 8
    shown = [(picture.index, preview.step) for _, preview in found for picture in preview.pictures]
    assert set(shown) >= {(index, step) for index in range(5) for step in (1, 30)}
    between = [when for when, preview in found if preview.step not in (1, 30)]
    times = list(dict.fromkeys(between))  # samples at different steps are shown in events of their own
    assert len(times) > 3
    assert all(after - before > 0.99 * PREVIEW_INTERVAL_S for before, after in pairwise(times))


def test_a_finished_job_brings_its_pictures_in_order_and_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.engine.engine.monotonic", lambda: now)
    engine = engine_with(FakeDenoiser(), counting_job("a", n=3, steps=1), max_batch_size=2)
    now = 3.0
    assert read_next(engine).events == []
    now = 5.0
    (event,) = read_next(engine).events
    assert isinstance(event, Finished)
    assert [picture.seed for picture in event.pictures] == [0, 1, 2]
    assert (event.queue_s, event.run_s) == (3.0, 2.0)


# ── Stages ─────────────────────────────────────────────────────────────────────────────────────


def two_stages(
    shares: Sequence[float] = (0.0, 0.5, 1.0), preview: PreviewKind = "none", name: str = "a"
) -> JobSpec:
    """Two samples in three steps, then as many as there are shares in two, from what the first ones left."""
    first = job_of(name, [1, 2], steps=3).stages[0]
    plan = job_of(name, [0], steps=2).stages[0].chains[0].plan
    second = tuple(
        Chain(plan, 10 + i, None, InitialLatent(carried=SphericalMix(0, 1, share)))
        for i, share in enumerate(shares)
    )
    return JobSpec(name, "ddim", (Stage("invert", first.chains), Stage("denoise", second)), preview=preview)


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


# ── What a fault may reach ─────────────────────────────────────────────────────────────────────

FAULTY = 3
"""The seed whose sample breaks something."""


def marked(x: torch.Tensor) -> bool:
    """Whether a batch [B, C, H, W] or a latent [C, H, W] holds the faulty sample: its first pixel says so."""
    return bool((x.reshape(-1, SIZE * SIZE)[:, 0] == 0.625).any())


class Marking(FakeDenoiser):
    """Writes a mark into every latent of FAULTY, for what comes after the forward to trip over."""

    def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
        made = super()._one(chain, latent, step)
        if chain.seed == FAULTY:
            made.x[0, 0, 0] = made.x0[0, 0, 0] = 0.625
        return made

    def measure(
        self, chains: Sequence[Chain], steps: Sequence[int], x0_preds: Sequence[Image]
    ) -> Sequence[tuple[float, float]]:
        if any(marked(torch.from_numpy(x0)) for x0 in x0_preds):
            raise TypeError("this device has no float64")
        return super().measure(chains, steps, x0_preds)


def tripping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which raises where the faulty sample is among what it gets."""

    def trip(x: torch.Tensor) -> Any:
        if marked(x):
            raise RuntimeError("on purpose")
        return function(x)

    return trip


def faulty_in(place: str, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """A job that breaks in one place after the forward, and the break itself."""
    match place:
        case "measuring":
            image = np.zeros((1, SIZE, SIZE), np.float32)
            chain = measuring(build_measurement(SCHEDULE, [90, 40, 0]), image, FAULTY)
            return JobSpec("faulty", "measure", (Stage("measure", (chain,)),))
        case "rendering a preview":
            monkeypatch.setattr(fakes, "render", tripping(render))
            return job_of("faulty", [FAULTY], steps=4, preview="x0")
        case "rendering the result":
            monkeypatch.setattr(fakes, "render", tripping(render))
            return job_of("faulty", [FAULTY], steps=4)
        case "between two stages":
            made = fakes._stepped

            def trips(row: Row, before: Latent, after: Latent) -> Stepped:
                tripping(len)(after.x if row.arrays else torch.zeros(SIZE, SIZE))
                return made(row, before, after)

            monkeypatch.setattr(fakes, "_stepped", trips)
            stages = (*job_of("faulty", [2, FAULTY], steps=2).stages, *job_of("faulty", [9]).stages)
            return JobSpec("faulty", "ddim", stages)
    raise AssertionError(place)


@pytest.mark.parametrize(
    "place", ["measuring", "rendering a preview", "rendering the result", "between two stages"]
)
def test_a_fault_after_the_forward_ends_its_own_job_and_no_other(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Marking()
    neighbours = [job_of(f"job{seed}", [seed], steps=5, preview="both") for seed in (4, 5, 6, 7)]
    clean = drain(engine_with(FakeDenoiser(), *neighbours))
    with monkeypatch.context() as patch:
        faulty = faulty_in(place, patch)
        engine = engine_with(denoiser, *neighbours[:2], faulty, *neighbours[2:])
        events = drain(engine)
    ends = {event.job_id: event for event in events if isinstance(event, Terminal)}
    failed = ends.pop("faulty")
    assert isinstance(failed, Failed)
    assert (type(failed.error), failed.error.code, failed.started) == (ComputeError, "compute_failed", True)
    assert not [event for event in events if isinstance(event, Finished) and event.job_id == "faulty"]
    assert all(isinstance(event, Finished) for event in ends.values())
    assert pictures_of(events, "faulty") == pictures_of(clean, "faulty") == []
    for spec in neighbours:
        assert pictures_of(events, spec.id) == pictures_of(clean, spec.id) != []
    assert nothing_is_held(engine)


def pictures_of(events: list[Event], job_id: str) -> list[tuple[int, str, bytes]]:
    """What a job's events show, in order; a preview that was rendered beside a fault counts as well."""
    shown = [e for e in events if isinstance(e, Preview | Finished) and e.job_id == job_id]
    return [(p.index, p.kind, p.pixels.tobytes()) for event in shown for p in event.pictures]


def test_a_second_stage_that_cannot_start_ends_its_own_job_and_no_other() -> None:
    class NoStart(FakeDenoiser):
        def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
            if carried and chain.seed == 11:
                raise ValueError("the two latents are one")
            return super().start(chain, carried)

    denoiser = NoStart()
    engine = engine_with(denoiser, two_stages(), job_of("neighbour", [5], steps=9))
    ends = {event.job_id: event for event in drain(engine) if isinstance(event, Terminal)}
    assert isinstance(ends["a"], Failed)
    assert isinstance(ends["neighbour"], Finished)
    clean = FakeDenoiser()
    drain(engine_with(clean, job_of("alone", [5], steps=9)))
    assert all(denoiser.seen[5, step] == clean.seen[5, step] for step in range(9))
    assert nothing_is_held(engine)


def test_abort_ends_all_jobs_and_keeps_nothing() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("a", [1], preview="x0"), two_stages(name="b"))
    engine.step()
    events = engine.handle(AbortAll())
    assert events == [Cancelled("a"), Cancelled("b")]
    assert engine._progress == {}
    assert drain(engine) == []
    assert denoiser.widths == [3]
    assert nothing_is_held(engine)


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
