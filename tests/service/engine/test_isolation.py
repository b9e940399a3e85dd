"""A fault ends the job that causes it and no other: neighbours continue bit for bit."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.chain import Chain, Image, measuring
from model.denoiser import Latent, Stepped, render
from model.samplers import build_measurement
from model.state import Row
from service.engine.isolation import FatalError
from service.engine.jobs import JobSpec, Stage
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Cancelled,
    Event,
    Failed,
    Finished,
    Terminal,
)
from service.errors import ComputeError, NonFiniteError
from tests.service import fakes
from tests.service.engine.driven import (
    PROMPT,
    SEEDS,
    Device,
    clean_run,
    drain,
    engine_with,
    nothing_is_held,
    pictures_of,
    read_next,
    results,
    two_stages,
)
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, job_of

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
def test_out_of_memory_lowers_the_batch_size(fit: int, limit: int, prompt: bool) -> None:
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
    assert engine.scheduler.max_batch_size == 16


@PROMPT
def test_a_job_that_never_fits_does_not_narrow_the_steps_of_others(prompt: bool) -> None:
    denoiser = Device(prompt=prompt, raises={3: torch.OutOfMemoryError})
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed], steps=4) for seed in SEEDS))
    limits: list[int] = []
    engine.on_batch_limit = limits.append
    events = drain(engine)
    assert {event.job_id for event in events if isinstance(event, Failed)} == {"job3"}
    assert len(results(events)) == 7
    assert engine.scheduler.max_batch_size == limits[-1] == 16
    assert denoiser.widths[-2:] == [7, 7]
    assert nothing_is_held(engine)


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


CUDA_ERROR = RuntimeError("CUDA error: an illegal memory access was encountered")
"""As torch raises it where it has no class of its own for it."""


@PROMPT
def test_a_device_that_fails_without_any_sample_is_fatal(prompt: bool) -> None:
    """Whatever it raises, and before any job is blamed for it."""
    denoiser = Device(prompt=prompt)
    engine = engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS))
    engine.step()
    denoiser.lost = CUDA_ERROR
    with pytest.raises(FatalError, match="illegal memory access"):
        drain(engine)


def test_a_device_that_works_is_asked_before_a_sample_is_blamed() -> None:
    denoiser = Device(raises={2: RuntimeError}, gives_nan={4})
    events = drain(engine_with(denoiser, *(job_of(f"job{seed}", [seed]) for seed in SEEDS)))
    assert {event.job_id for event in events if isinstance(event, Failed)} == {"job2", "job4"}
    assert denoiser.probed == 1


def test_a_probe_that_runs_out_of_memory_does_not_end_the_engine() -> None:
    class Cramped(Device):
        def probe(self) -> None:
            super().probe()
            raise torch.OutOfMemoryError("nothing is left")

    denoiser = Cramped(raises={2: RuntimeError})
    events = drain(engine_with(denoiser, job_of("a", [1]), job_of("b", [2])))
    assert [type(event) for event in events] == [Failed, Finished]
    assert denoiser.probed == 1


def test_a_failed_step_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = Device(raises={2: KeyError})
    drain(engine_with(denoiser, job_of("fine", [1]), job_of("culprit", [2])))
    together, alone = caplog.records
    assert "2 images failed together, KeyError" in together.getMessage()
    assert "seed 2 in job culprit" in alone.getMessage()
    assert "raise self.raises" in caplog.text


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
