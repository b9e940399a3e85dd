"""An engine over a fake device, driven step by step by the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from model.chain import Chain, InitialLatent, SphericalMix, measuring
from model.denoiser import Latent, Stepped
from model.samplers import build_measurement
from model.state import Row
from service.engine.engine import Engine
from service.engine.jobs import Job, JobSpec, PreviewKind, Stage
from service.engine.messages import (
    AddJob,
    Event,
    Finished,
    Preview,
    StepReport,
)
from tests.service.fakes import SCHEDULE, SIZE, FakeDenoiser, fake_engine, job_of

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


class Clock:
    """What the engine measures durations with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("service.engine.engine.perf_counter", lambda: self.now)


def results(events: list[Event]) -> dict[str, list[bytes]]:
    return {
        event.job_id: [picture.pixels.tobytes() for picture in event.pictures]
        for event in events
        if isinstance(event, Finished)
    }


def measuring_job(seed: int, timesteps: list[int], preview: PreviewKind = "both") -> JobSpec:
    image = np.zeros((1, SIZE, SIZE), np.float32)
    chain = measuring(build_measurement(SCHEDULE, timesteps), image, seed)
    return JobSpec("measured", "measure", (Stage("measure", (chain,)),), preview=preview)


def previews(spec: JobSpec, max_batch_size: int = 8) -> list[Preview]:
    events = drain(engine_with(FakeDenoiser(), spec, max_batch_size=max_batch_size))
    return [event for event in events if isinstance(event, Preview)]


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


def pictures_of(events: list[Event], job_id: str) -> list[tuple[int, str, bytes]]:
    """What a job's events show, in order; a preview that was rendered beside a fault counts as well."""
    shown = [e for e in events if isinstance(e, Preview | Finished) and e.job_id == job_id]
    return [(p.index, p.kind, p.pixels.tobytes()) for event in shown for p in event.pictures]
