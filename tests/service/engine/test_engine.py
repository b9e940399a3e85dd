"""One step with a fake network: what goes wrong is narrowed down, and mates go on bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from service.events import Cancelled, Event, Failed, Finished, Preview
from service.jobs import Job, PreviewKind, Sequel, State

from model.denoiser import Chain, Latent, probing
from model.samplers import build_probe
from service.engine import Engine, FatalError, StepReport, to_pictures
from service.errors import ComputeError, DeadlineError, NonFiniteError
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, counting_job, fake_engine, job_of

MATES = range(8)


def engine_with(denoiser: FakeDenoiser, *jobs: Job, max_rows: int = 16) -> Engine:
    engine = fake_engine(denoiser, max_rows)
    for job in jobs:
        engine.scheduler.add(job, job.created)
    return engine


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while (report := engine.step()) is not None:
        events += report.events
    return events


def kept(*jobs: Job) -> int:
    """Latents that are held for the jobs."""
    return sum(sample.latent is not None for job in jobs for sample in job.samples)


def clean_run(seeds: list[int]) -> dict[tuple[int, int], bytes]:
    """Every x of these seeds, each computed alone."""
    denoiser = FakeDenoiser()
    for seed in seeds:
        drain(engine_with(denoiser, job_of("alone", [seed])))
    return denoiser.seen


def test_one_network_call_serves_everybody() -> None:
    denoiser = FakeDenoiser()
    jobs = [job_of("a", [1, 2], steps=5), job_of("b", [3], steps=3), job_of("c", [4], 2, guidance_scale=3.0)]
    events = drain(engine_with(denoiser, *jobs))
    assert denoiser.widths == [5, 5, 3, 2, 2]
    assert [event.job_id for event in events if isinstance(event, Finished)] == ["c", "b", "a"]


def test_a_step_reports_itself() -> None:
    engine = engine_with(FakeDenoiser(), job_of("a", [1, 2], steps=1))
    report = engine.step()
    assert isinstance(report, StepReport)
    assert (report.rows, report.samples, report.nonfinite) == (2, 2, 0)
    assert report.seconds > 0
    (event,) = report.events
    assert isinstance(event, Finished)
    assert event.pictures[1].pixels.shape == (SIZE, SIZE, 1)
    assert engine.step() is None


def test_step_times_are_learned_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies between two network calls counts, being idle does not."""
    clock = 0.0
    monkeypatch.setattr("service.engine.perf_counter", lambda: clock)
    engine = engine_with(FakeDenoiser(), job_of("a", [1], steps=3))
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(engine.scheduler.times, "observe", lambda rows, seconds: seen.append((rows, seconds)))
    for now in (0.0, 5.0, 7.0):
        clock = now
        engine.step()
    assert seen == [(1, 5.0), (1, 2.0)]
    clock = 100.0  # nothing was left to do meanwhile
    engine.scheduler.add(job_of("b", [2], steps=2), 0.0)
    engine.step()
    engine.scheduler.cancel("b")
    clock = 101.0
    engine.step()
    clock = 200.0
    engine.scheduler.add(job_of("c", [3], steps=1), 0.0)
    engine.step()
    assert seen == [(1, 5.0), (1, 2.0), (1, 1.0)]


# ── A sample that breaks the step ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("culprit", [0, 3, 7])
def test_a_raising_sample_fails_alone(culprit: int) -> None:
    denoiser = FakeDenoiser(raises={culprit: ValueError})
    jobs = [job_of(f"job{seed}", [seed]) for seed in MATES]
    engine = engine_with(denoiser, *jobs)
    events = drain(engine)
    ends = {event.job_id: event for event in events if isinstance(event, Finished | Failed)}
    failed = ends.pop(f"job{culprit}")
    assert isinstance(failed, Failed)
    assert type(failed.error) is ComputeError
    assert "ValueError" in failed.error.detail
    assert "seed" not in failed.error.detail  # the exception's own words stay in the house
    assert all(isinstance(event, Finished) for event in ends.values())
    # 8, then the half with the culprit, its quarter, itself, each followed by the half without.
    assert sorted(denoiser.widths[:7]) == [1, 1, 2, 2, 4, 4, 8]
    assert denoiser.widths[7:] == [7, 7, 7, 7]
    assert denoiser.seen == clean_run([seed for seed in MATES if seed != culprit])
    assert engine.scheduler.max_rows == 16


def test_the_comparison_with_a_clean_run_can_fail() -> None:
    denoiser = FakeDenoiser()
    drain(engine_with(denoiser, job_of("a", [1])))
    denoiser.seen[1, 4] = bytes(len(denoiser.seen[1, 4]))
    assert denoiser.seen != clean_run([1])


def test_two_culprits_fail_and_nobody_else() -> None:
    denoiser = FakeDenoiser(raises={2: ValueError, 5: KeyError})
    events = drain(engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in MATES)))
    failed = {event.job_id for event in events if isinstance(event, Failed)}
    assert failed == {"job2", "job5"}
    assert denoiser.seen == clean_run([seed for seed in MATES if seed not in (2, 5)])


def test_a_job_fails_once_when_two_of_its_images_do() -> None:
    denoiser = FakeDenoiser(raises={1: ValueError, 2: ValueError})
    events = drain(engine_with(denoiser, job_of("a", [1, 2, 3])))
    assert [type(event) for event in events] == [Failed]


def test_a_sample_whose_start_raises_fails_alone() -> None:
    class NoSuchLabel(FakeDenoiser):
        def start(self, chain: Chain) -> Latent:
            if chain.seed == 2:
                raise ValueError("no such class")
            return super().start(chain)

    events = drain(engine_with(NoSuchLabel(), *(job_of(f"job{seed}", [seed]) for seed in range(4))))
    assert {e.job_id for e in events if isinstance(e, Failed)} == {"job2"}
    assert {e.job_id for e in events if isinstance(e, Finished)} == {"job0", "job1", "job3"}


# ── Memory ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("fit", "limit"), [(7, 4), (4, 4), (3, 2), (2, 2), (1, 1)])
def test_out_of_memory_narrows_the_batch_for_good(fit: int, limit: int) -> None:
    denoiser = FakeDenoiser(rows_that_fit=fit)
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in MATES))
    told: list[int] = []
    engine.narrow = told.append
    engine.step()
    assert engine.scheduler.max_rows == told[-1] == limit
    narrowing = len(denoiser.widths)
    events = drain(engine)
    assert {event.job_id for event in events if isinstance(event, Finished)} == {f"job{s}" for s in MATES}
    assert set(denoiser.widths[narrowing:]) == {limit}
    assert denoiser.seen == clean_run(list(MATES))


def test_a_sample_that_never_fits_fails() -> None:
    engine = engine_with(FakeDenoiser(rows_that_fit=1), job_of("guided", [1], guidance_scale=2.0))
    (event,) = drain(engine)
    assert isinstance(event, Failed)
    assert "OutOfMemoryError" in event.error.detail
    assert engine.scheduler.max_rows == 1


def test_a_lost_device_is_nobodys_fault() -> None:
    engine = engine_with(FakeDenoiser(raises={1: torch.AcceleratorError}), job_of("a", [1]))
    with pytest.raises(FatalError):
        engine.step()


# ── NaN ────────────────────────────────────────────────────────────────────────────────────────


def test_a_nan_fails_its_own_job() -> None:
    denoiser = FakeDenoiser(gives_nan={3})
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in MATES))
    report = engine.step()
    assert report is not None
    assert report.nonfinite == 1
    (event,) = report.events
    assert isinstance(event, Failed)
    assert (event.job_id, type(event.error)) == ("job3", NonFiniteError)
    events = drain(engine)
    assert {e.job_id for e in events if isinstance(e, Finished)} == {f"job{s}" for s in MATES if s != 3}
    del denoiser.seen[3, 0]
    assert denoiser.seen == clean_run([seed for seed in MATES if seed != 3])


# ── Cancellation and deadlines ─────────────────────────────────────────────────────────────────


def test_cancelled_between_the_call_and_the_commit() -> None:
    denoiser = FakeDenoiser()
    gone, mate = job_of("gone", [1, 2], steps=1, preview="x0"), job_of("mate", [3], steps=2)
    engine = engine_with(denoiser, gone, mate)
    report = engine.step(lambda: engine.scheduler.cancel("gone"))
    assert report is not None
    assert report.events == [Cancelled("gone")]  # neither preview nor result, though both were computed
    assert gone.state is State.CANCELLED
    assert (kept(gone), kept(mate)) == (0, 1)
    drain(engine)
    assert denoiser.seen[3, 1] == clean_run_of_two_steps()[3, 1]


def clean_run_of_two_steps() -> dict[tuple[int, int], bytes]:
    denoiser = FakeDenoiser()
    drain(engine_with(denoiser, job_of("mate", [3], steps=2)))
    return denoiser.seen


def test_cancelled_between_steps_the_latents_go() -> None:
    gone = job_of("gone", [1])
    engine = engine_with(FakeDenoiser(), gone)
    engine.step()
    assert kept(gone) == 1
    engine.scheduler.cancel("gone")
    assert kept(gone) == 0


def test_a_finished_image_keeps_no_latent() -> None:
    job = job_of("a", [1, 2], steps=3)
    engine = engine_with(FakeDenoiser(), job, max_rows=1)
    for _ in range(5):
        engine.step()
    assert kept(job) == 1  # the other one has a row to go
    engine.step()
    assert kept(job) == 0


@pytest.mark.parametrize("broken", [{"gives_nan": {1}}, {"raises": {1: ValueError}}])
def test_a_failed_job_keeps_no_latents(broken: dict[str, Any]) -> None:
    job = job_of("a", [1, 2, 3], steps=3)
    drain(engine_with(FakeDenoiser(**broken), job))
    assert kept(job) == 0


def test_a_failing_sample_of_a_job_cancelled_meanwhile_ends_it_once() -> None:
    engine = engine_with(FakeDenoiser(raises={1: ValueError}), job_of("gone", [1]))
    report = engine.step(lambda: engine.scheduler.cancel("gone"))
    assert report is not None
    assert report.events == [Cancelled("gone")]


def test_who_arrives_during_a_step_runs_in_the_next() -> None:
    denoiser = FakeDenoiser()
    engine = engine_with(denoiser, job_of("first", [1], steps=2))
    late = job_of("late", [2], steps=1)
    engine.step(lambda: engine.scheduler.add(late, late.created))
    drain(engine)
    assert denoiser.widths == [1, 2]


def test_expired_work_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = FakeDenoiser()
    job = job_of("late", [1])
    job.deadline = job.created + 1.0
    engine = engine_with(denoiser, job)
    monkeypatch.setattr("service.engine.monotonic", lambda: job.created + 1.1)
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


def probe_of(seed: int, timesteps: list[int], preview: PreviewKind = "both") -> Job:
    image = np.zeros((1, SIZE, SIZE), np.float32)
    job = Job("probe", "probe", preview=preview)
    job.add(probing(build_probe(SCHEDULE, timesteps), image, seed))
    return job


def test_a_probe_shows_what_was_seen_and_leaves_its_last_guess() -> None:
    denoiser = FakeDenoiser()
    job = probe_of(7, [80, 20, 0])
    events = drain(engine_with(denoiser, job))
    start = FakeDenoiser().start(job.samples[0].chain).x  # type: ignore[arg-type]
    made = [
        torch.frombuffer(bytearray(denoiser.seen[7, row]), dtype=torch.float32).view(1, SIZE, SIZE)
        for row in range(3)
    ]
    for row, event in enumerate(events[:-1]):
        assert isinstance(event, Preview)
        guess, seen = event.pictures
        assert (guess.kind, seen.kind) == ("x0", "xt")
        assert (guess.pixels == to_pictures(made[row][None])[0]).all()
        assert (seen.pixels == to_pictures([start, *made][row][None])[0]).all()
        assert guess.measure == seen.measure == job.samples[0].measures[row]
    finished = events[-1]
    assert isinstance(finished, Finished)
    (last,) = finished.pictures
    assert (last.kind, last.measure) == ("x0", finished.measures[0][-1])
    assert [measure.timestep for measure in finished.measures[0]] == [80, 20, 0]


def test_a_probes_guess_has_to_be_finite_too() -> None:
    class Doubtful(FakeDenoiser):
        def _one(self, chain: Chain, latent: Latent, row: int) -> Latent:
            made = super()._one(chain, latent, row)
            return Latent(made.x, made.x0 * torch.nan, made.seen)

    (event,) = drain(engine_with(Doubtful(), probe_of(7, [80, 20], "none")))
    assert isinstance(event, Failed)
    assert isinstance(event.error, NonFiniteError)
    (fine,) = drain(engine_with(Doubtful(), job_of("a", [7])))
    assert isinstance(fine, Finished)


def test_pixels_are_clamped_rounded_and_channels_last() -> None:
    x = torch.tensor([-7.0, -1.0, 0.0, 0.996, 1.0, 7.0]).view(1, 2, 3).repeat(3, 1, 1)
    (pixels,) = to_pictures(x[None])
    assert (pixels.shape, pixels.dtype.name) == ((2, 3, 3), "uint8")
    assert pixels[..., 0].tolist() == [[0, 0, 128], [254, 255, 255]]


def test_only_chains_that_can_be_computed_are_taken() -> None:
    engine = engine_with(FakeDenoiser(), counting_job("a"))
    (event,) = drain(engine)
    assert isinstance(event, Failed)


def test_only_what_goes_on_gives_its_latents() -> None:
    denoiser = FakeDenoiser()
    first, other = job_of("a", [1, 2], steps=3), job_of("b", [3], steps=2)
    first.sequel = Sequel(job_of("a", [4, 5, 6], steps=2), lambda _pictures: [])
    pictures = {
        event.job_id: event.pictures
        for event in drain(engine_with(denoiser, first, other))
        if isinstance(event, Finished)
    }
    assert [picture.latent for picture in pictures["b"]] == [None]
    for picture in pictures["a"]:
        assert picture.latent is not None
        assert picture.latent.tobytes() == denoiser.seen[picture.seed, 2]
        assert picture.latent.base is None  # not a look into the whole batch


# ── Probes ─────────────────────────────────────────────────────────────────────────────────────


def test_a_probe_is_measured_row_by_row_beside_others() -> None:
    plan = build_probe(SCHEDULE, [90, 40, 0])
    image = np.zeros((1, SIZE, SIZE), np.float32)
    job = Job("probe", "probe", preview="x0")
    for seed in (1, 2):
        job.add(probing(plan, image, seed))
    events = drain(engine_with(FakeDenoiser(), job, job_of("mate", [3], steps=5)))
    (finished,) = (event for event in events if isinstance(event, Finished) and event.job_id == "probe")
    assert [[measure.timestep for measure in each] for each in finished.measures] == [[90, 40, 0]] * 2
    assert [[measure.bits for measure in each] for each in finished.measures] == [[0, 1, 2]] * 2
    looks = [p for e in events if isinstance(e, Preview) for p in e.pictures]
    assert [look.measure.timestep for look in looks if look.index == 1 and look.measure] == [90, 40, 0]
    (mate,) = (event for event in events if isinstance(event, Finished) and event.job_id == "mate")
    assert mate.measures == ((),)
