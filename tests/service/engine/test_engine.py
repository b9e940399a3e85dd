"""One step with a fake network: a fault ends its own job, and batch neighbours continue bit for bit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.chain import Chain, Image, InitialLatent, SphericalMix, measuring
from model.denoiser import Latent
from model.samplers import build_measurement
from service.engine import engine as engine_module
from service.engine.engine import Engine, FatalError, to_array, to_pictures
from service.engine.estimates import StepTimes
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
from service.errors import ComputeError, DeadlineError, DrainingError, NonFiniteError
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, counting_job, fake_engine, job_of

SEEDS = range(8)


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


def kept(engine: Engine, *job_ids: str) -> int:
    """Latents that are held for these jobs."""
    return sum(len(engine._progress[job_id].latents) for job_id in job_ids if job_id in engine._progress)


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
    clock = 0.0
    monkeypatch.setattr("service.engine.engine.perf_counter", lambda: clock)
    engine = engine_with(FakeDenoiser(), job_of("a", [1], steps=3))
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(engine.scheduler.times, "observe", lambda rows, seconds: seen.append((rows, seconds)))
    for now in (0.0, 5.0, 7.0):
        clock = now
        engine.step()
    assert seen == [(1, 5.0), (1, 2.0)]
    clock = 100.0  # nothing was left to do meanwhile
    engine.handle(AddJob(job_of("b", [2], steps=2)))
    engine.step()
    engine.handle(CancelJob("b"))
    clock = 101.0
    engine.step()
    clock = 200.0
    engine.handle(AddJob(job_of("c", [3], steps=1)))
    engine.step()
    assert seen == [(1, 5.0), (1, 2.0), (1, 1.0)]


def test_the_duration_of_a_step_includes_the_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch returns at once; the results are first read by the check that they are finite."""
    clock = 0.0
    monkeypatch.setattr("service.engine.engine.perf_counter", lambda: clock)
    engine = engine_with(FakeDenoiser(), job_of("a", [1]))
    check = engine._drop_nonfinite

    def waits(*arguments: Any) -> int:
        nonlocal clock
        clock += 5.0
        return check(*arguments)

    monkeypatch.setattr(engine, "_drop_nonfinite", waits)
    report = engine.step()
    assert report is not None
    assert report.seconds == 5.0


# ── A sample that breaks the step ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("culprit", [0, 3, 7])
def test_a_raising_sample_fails_alone(culprit: int) -> None:
    denoiser = FakeDenoiser(raises={culprit: ValueError})
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


def test_the_comparison_with_a_clean_run_can_fail() -> None:
    denoiser = FakeDenoiser()
    drain(engine_with(denoiser, job_of("a", [1])))
    denoiser.seen[1, 4] = bytes(len(denoiser.seen[1, 4]))
    assert denoiser.seen != clean_run([1])


def test_two_culprits_fail_and_no_other() -> None:
    denoiser = FakeDenoiser(raises={2: ValueError, 5: KeyError})
    events = drain(engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS)))
    failed = {event.job_id for event in events if isinstance(event, Failed)}
    assert failed == {"job2", "job5"}
    assert denoiser.seen == clean_run([seed for seed in SEEDS if seed not in (2, 5)])


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


@pytest.mark.parametrize(("fit", "limit"), [(7, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_out_of_memory_lowers_the_batch_size_for_good(fit: int, limit: int) -> None:
    denoiser = FakeDenoiser(rows_that_fit=fit)
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS))
    limits: list[int] = []
    engine.on_batch_limit = limits.append
    engine.step()
    assert engine.scheduler.max_batch_size == limits[-1] == limit
    before = len(denoiser.widths)
    events = drain(engine)
    assert {event.job_id for event in events if isinstance(event, Finished)} == {f"job{s}" for s in SEEDS}
    assert set(denoiser.widths[before:]) == {limit}
    assert denoiser.seen == clean_run(list(SEEDS))


def test_a_sample_that_never_fits_fails() -> None:
    engine = engine_with(FakeDenoiser(rows_that_fit=1), job_of("guided", [1], guidance_scale=2.0))
    (event,) = drain(engine)
    assert isinstance(event, Failed)
    assert "OutOfMemoryError" in event.error.detail
    assert engine.scheduler.max_batch_size == 1


def test_a_lost_device_is_fatal() -> None:
    engine = engine_with(FakeDenoiser(raises={1: torch.AcceleratorError}), job_of("a", [1]))
    with pytest.raises(FatalError):
        engine.step()


# ── NaN ────────────────────────────────────────────────────────────────────────────────────────


def test_a_nan_fails_its_own_job() -> None:
    denoiser = FakeDenoiser(gives_nan={3})
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS))
    report = engine.step()
    assert report is not None
    assert report.nonfinite == 1
    (event,) = report.events
    assert isinstance(event, Failed)
    assert (event.job_id, type(event.error)) == ("job3", NonFiniteError)
    events = drain(engine)
    assert {e.job_id for e in events if isinstance(e, Finished)} == {f"job{s}" for s in SEEDS if s != 3}
    del denoiser.seen[3, 0]
    assert denoiser.seen == clean_run([seed for seed in SEEDS if seed != 3])


# ── Cancellation and deadlines ─────────────────────────────────────────────────────────────────


def test_cancelled_between_the_call_and_the_commit() -> None:
    denoiser = FakeDenoiser()
    gone = job_of("gone", [1, 2], steps=1, preview="x0")
    engine = engine_with(denoiser, gone, job_of("neighbour", [3], steps=2))
    report = engine.step(lambda: engine.handle(CancelJob("gone")))
    assert report is not None
    assert report.events == [Cancelled("gone")]  # neither preview nor result, though both were computed
    assert (kept(engine, "gone"), kept(engine, "neighbour")) == (0, 1)
    drain(engine)
    assert denoiser.seen[3, 1] == clean_run_of_two_steps()[3, 1]


def clean_run_of_two_steps() -> dict[tuple[int, int], bytes]:
    denoiser = FakeDenoiser()
    drain(engine_with(denoiser, job_of("neighbour", [3], steps=2)))
    return denoiser.seen


def test_cancelled_between_steps_the_latents_go() -> None:
    engine = engine_with(FakeDenoiser(), job_of("gone", [1]))
    engine.step()
    assert kept(engine, "gone") == 1
    engine.handle(CancelJob("gone"))
    assert engine._progress == {}


def test_a_finished_image_keeps_no_latent() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=3), max_batch_size=1)
    for _ in range(5):
        engine.step()
    assert kept(engine, "a") == 1  # the other one has a step to go
    engine.step()
    assert engine._progress == {}


@pytest.mark.parametrize("broken", [{"gives_nan": {1}}, {"raises": {1: ValueError}}])
def test_a_failed_job_keeps_no_latents(broken: dict[str, Any]) -> None:
    engine = engine_with(FakeDenoiser(**broken), job_of("a", [1, 2, 3], steps=3))
    drain(engine)
    assert engine._progress == {}


def test_a_failing_sample_of_a_job_cancelled_meanwhile_ends_it_once() -> None:
    engine = engine_with(FakeDenoiser(raises={1: ValueError}), job_of("gone", [1]))
    report = engine.step(lambda: engine.handle(CancelJob("gone")))
    assert report is not None
    assert report.events == [Cancelled("gone")]


def test_a_job_that_arrives_during_a_step_runs_in_the_next() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("first", [1], steps=2))
    late = job_of("late", [2], steps=1)
    engine.step(lambda: engine.handle(AddJob(late)))
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
            assert (picture.pixels == to_pictures(x[None])[0]).all()
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
        assert (x0_pred.pixels == to_pictures(made[step][None])[0]).all()
        assert (before.pixels == to_pictures([start, *made][step][None])[0]).all()
        assert x0_pred.measurement == before.measurement == finished.measurements[0][step]
    (last,) = finished.pictures
    assert (last.kind, last.measurement) == ("x0", finished.measurements[0][-1])
    assert [found.timestep for found in finished.measurements[0]] == [80, 20, 0]


def test_a_measured_prediction_has_to_be_finite_too() -> None:
    class Doubtful(FakeDenoiser):
        def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
            made = super()._one(chain, latent, step)
            return Latent(made.x, made.x0 * torch.nan)

    (event,) = drain(engine_with(Doubtful(), measuring_job(7, [80, 20], "none")))
    assert isinstance(event, Failed)
    assert isinstance(event.error, NonFiniteError)
    (fine,) = drain(engine_with(Doubtful(), job_of("a", [7])))
    assert isinstance(fine, Finished)


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


def test_a_finished_job_brings_its_pictures_in_order_and_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.engine.engine.monotonic", lambda: now)
    engine = engine_with(FakeDenoiser(), counting_job("a", n=3, steps=1), max_batch_size=2)
    now = 3.0
    first = engine.step()
    assert first is not None
    assert first.events == []
    now = 5.0
    last = engine.step()
    assert last is not None
    (event,) = last.events
    assert isinstance(event, Finished)
    assert [picture.seed for picture in event.pictures] == [0, 1, 2]
    assert (event.queue_s, event.run_s) == (3.0, 2.0)


def test_pixels_are_clamped_rounded_and_channels_last() -> None:
    x = torch.tensor([-7.0, -1.0, 0.0, 0.996, 1.0, 7.0]).view(1, 2, 3).repeat(3, 1, 1)
    (pixels,) = to_pictures(x[None])
    assert (pixels.shape, pixels.dtype.name) == ((2, 3, 3), "uint8")
    assert pixels[..., 0].tolist() == [[0, 0, 128], [254, 255, 255]]


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
        assert all(latent.base is None for latent in denoiser.carried[seed])  # no view of the whole batch
    assert 3 not in denoiser.carried
    assert denoiser.widths == [3, 3, 3, 4, 4, 1, 1, 1, 1]
    assert engine._progress == {}


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


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_job_is_cancelled_in_either_stage(steps: int) -> None:
    engine = engine_with(FakeDenoiser(), two_stages())
    for _ in range(steps):
        engine.step()
    assert in_flight(engine, "a").place == (steps >= 3)
    assert engine.handle(CancelJob("a")) == [Cancelled("a")]
    assert (engine._progress, len(engine.scheduler), engine.scheduler.backlog) == ({}, 0, 0)
    assert engine.step() is None


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
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[tuple[float, float]]:
        if any(marked(latent.x) for latent in latents):
            raise TypeError("this device has no float64")
        return super().measure(chains, latents, steps)


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
        case "finiteness":
            stacked = torch.stack
            # The only stack of an engine's step before anything is rendered.
            trip = tripping(lambda x: x)
            monkeypatch.setattr(torch, "stack", lambda tensors, dim=0: trip(stacked(tensors, dim)))
            return job_of("faulty", [FAULTY], steps=4)
        case "measuring":
            image = np.zeros((1, SIZE, SIZE), np.float32)
            chain = measuring(build_measurement(SCHEDULE, [90, 40, 0]), image, FAULTY)
            return JobSpec("faulty", "measure", (Stage("measure", (chain,)),))
        case "rendering a preview":
            monkeypatch.setattr(engine_module, "to_pictures", tripping(to_pictures))
            return job_of("faulty", [FAULTY], steps=4, preview="x0")
        case "rendering the result":
            monkeypatch.setattr(engine_module, "to_pictures", tripping(to_pictures))
            return job_of("faulty", [FAULTY], steps=4)
        case "between two stages":
            monkeypatch.setattr(engine_module, "to_array", tripping(to_array))
            stages = (*job_of("faulty", [2, FAULTY], steps=2).stages, *job_of("faulty", [9]).stages)
            return JobSpec("faulty", "ddim", stages)
    raise AssertionError(place)


@pytest.mark.parametrize(
    "place",
    ["finiteness", "measuring", "rendering a preview", "rendering the result", "between two stages"],
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
    assert (engine._progress, len(engine.scheduler), engine.scheduler.backlog) == ({}, 0, 0)


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
    assert engine._progress == {}


def test_abort_ends_all_jobs_and_keeps_nothing() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1]), two_stages(name="b"))
    engine.step()
    events = engine.handle(AbortAll(DrainingError("stopping", 1.0)))
    assert {event.job_id for event in events} == {"a", "b"}
    assert engine._progress == {}
