"""Which pictures of a job somebody sees, and when."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from model.chain import Chain
from model.denoiser import Latent, render
from service.engine import engine as engine_module
from service.engine.engine import PREVIEW_INTERVAL_S
from service.engine.estimates import StepTimes
from service.engine.jobs import PreviewKind
from service.engine.messages import (
    Event,
    Failed,
    Finished,
    Preview,
)
from service.errors import NonFiniteError
from tests.service.engine.driven import (
    Clock,
    drain,
    engine_with,
    measuring_job,
    previews,
    read_next,
)
from tests.service.fakes import SIZE, FakeDenoiser, counting_job, job_of


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
