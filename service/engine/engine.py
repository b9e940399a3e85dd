"""One step: choose the samples, denoise them, apply what was cancelled meanwhile, commit.

A fault reaches the job that causes it and no other: whatever raises is retried in halves until the culprit
alone fails, in the network call as well as in what follows it (finiteness, measuring, rendering, the
hand-over to a next stage). Running out of memory also lowers the batch size for good. Batch neighbours of a
failed sample continue, bit for bit as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import Protocol, TypeVar

import numpy as np
import torch

from model.chain import Chain, Image
from model.denoiser import Latent, to_pixels
from service.engine.jobs import Job, Sample, SnapshotKind
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Event,
    Finished,
    Load,
    Measurement,
    Picture,
    Pixels,
    Preview,
    StepReport,
    Terminal,
)
from service.engine.scheduler import Scheduler
from service.errors import ComputeError, NonFiniteError

Result = TypeVar("Result")
Failures = dict[Sample, ComputeError]


class Denoises(Protocol):
    """What the engine needs of `model.denoiser.Denoiser`; tests put a fake in its place."""

    def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
        """Where a chain begins. carried: what the stage before it left."""

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[Latent]:
        """New latents, in order; the given ones are untouched."""

    def measure(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[tuple[float, float]]:
        """(bits per dimension, mean squared error) of the latest x₀ predictions, in order."""


class FatalError(RuntimeError):
    """The device is broken for good; the process has to be replaced."""


@dataclass
class _Progress:
    """What the engine holds of a job in flight, by sample of its current stage.

    latents: of samples that have begun; in the last stage, until they are finished. pictures: of finished
    samples in the last stage. carried: the latents that the previous stage left.
    """

    latents: dict[Sample, Latent] = field(default_factory=dict)
    measurements: dict[Sample, list[Measurement]] = field(default_factory=dict)
    pictures: dict[Sample, Picture] = field(default_factory=dict)
    carried: tuple[Image, ...] = ()


@dataclass
class Engine:
    """Carries out commands and runs the scheduler's batches. All of it happens on one thread.

    on_batch_limit: called with the most rows that a network call has from now on, after one ran out of
    memory.
    """

    denoiser: Denoises
    scheduler: Scheduler
    on_batch_limit: Callable[[int], None] = lambda _size: None
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _latest: tuple[float, int] | None = None  # start and batch size of the latest step, if another followed

    @property
    def load(self) -> Load:
        """What is in flight now."""
        return Load(self.scheduler.running, self.scheduler.waiting, self.scheduler.backlog_s)

    def handle(self, command: AddJob | CancelJob | AbortAll) -> list[Event]:
        """Carry out a command, between two steps or between a network call and its commit."""
        match command:
            case AddJob(spec):
                events = self.scheduler.add(spec, monotonic())
                self._progress[spec.id] = _Progress()
            case CancelJob(job_id):
                events = self.scheduler.cancel(job_id)
            case AbortAll(error):
                events = self.scheduler.fail_all(error)
        return self._ended(events)

    def step(self, poll: Callable[[], list[Event]] = list) -> StepReport | None:
        """Advance a batch of samples by one step. None when there is nothing to do.

        `poll` is called between the network call and the commit: it handles the commands that have come, so
        that a job cancelled during the call ends before its result counts, and returns their events.
        """
        begun = perf_counter()
        if self._latest is not None:  # from step to step, so that what lies between two counts as well
            started, size = self._latest
            self.scheduler.times.observe(size, begun - started)
            self._latest = None
        events = self._ended(self.scheduler.expire(monotonic()))
        batch = self.scheduler.schedule(monotonic())
        if not batch.samples:
            return StepReport(events) if events else None

        called = perf_counter()
        latents, failures = self._isolate(self._denoise, batch.samples, self._lower_batch_limit)
        nonfinite = self._drop_nonfinite(latents, failures)  # waits for the device
        seconds = perf_counter() - called

        events += poll()
        here = [sample for sample in latents if not sample.job.over]
        measured = [sample for sample in here if sample.job.stage.kind == "measure"]
        found, faults = self._isolate(lambda samples: self._measure(samples, latents), measured)
        failures |= faults
        here = [sample for sample in here if sample not in failures]
        pictures, faults = self._isolate(lambda samples: self._render(samples, latents, found), here)
        failures |= faults
        for sample, error in failures.items():
            events += self._ended(self.scheduler.fail(sample.job.id, error))
        events += self._commit([sample for sample in here if not sample.job.over], latents, found, pictures)
        if not failures and len(self.scheduler):
            self._latest = begun, batch.size
        return StepReport(events, batch.size, len(latents), seconds, nonfinite)

    def _isolate(
        self,
        action: Callable[[Sequence[Sample]], Sequence[Result]],
        samples: Sequence[Sample],
        on_out_of_memory: Callable[[Sequence[Sample]], None] = lambda _samples: None,
    ) -> tuple[dict[Sample, Result], Failures]:
        """The action's result for each sample, and an error for each that makes it raise."""
        if not samples:
            return {}, {}
        try:
            return dict(zip(samples, action(samples), strict=True)), {}
        except torch.OutOfMemoryError as error:
            out_of_memory, cause = True, error
        except torch.AcceleratorError as error:  # CUDA's state is lost with the first of these
            raise FatalError(str(error)) from error
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends one image and not the service)
            out_of_memory, cause = False, error  # type: ignore[assignment]
        # Outside the except block, so that the traceback no longer holds the failed call's tensors.
        reason = f"{type(cause).__name__} in the step of this image."
        del cause
        if out_of_memory:
            torch.cuda.empty_cache()
            on_out_of_memory(samples)
        if len(samples) == 1:
            return {}, {samples[0]: ComputeError(reason)}
        half = len(samples) // 2
        first, second = (
            self._isolate(action, part, on_out_of_memory) for part in (samples[:half], samples[half:])
        )
        return first[0] | second[0], first[1] | second[1]

    def _lower_batch_limit(self, samples: Sequence[Sample]) -> None:
        """Half of these samples' rows are the most of a network call from now on."""
        fits = max(1, sum(sample.evaluations for sample in samples) // 2)
        self.scheduler.max_batch_size = min(self.scheduler.max_batch_size, fits)
        self.on_batch_limit(self.scheduler.max_batch_size)

    # ── What is done with a batch, all of it before the commit ─────────────────────────────────

    def _denoise(self, samples: Sequence[Sample]) -> Sequence[Latent]:
        """The samples' latents after their next step."""
        for sample in samples:
            progress = self._progress[sample.job.id]
            if sample not in progress.latents:
                progress.latents[sample] = self.denoiser.start(sample.chain, progress.carried)
        latents = [self._latent(sample) for sample in samples]
        return self.denoiser.step(
            [sample.chain for sample in samples], latents, [sample.step for sample in samples]
        )

    def _drop_nonfinite(self, latents: dict[Sample, Latent], failures: Failures) -> int:
        """Move samples whose results are not finite over to the failures. Returns how many."""

        def finite(samples: Sequence[Sample]) -> list[bool]:
            results = [_value(latents[sample], sample.job.stage.result) for sample in samples]
            return torch.stack(results).isfinite().flatten(1).all(1).tolist()

        found, faults = self._isolate(finite, list(latents))
        broken = [sample for sample, fine in found.items() if not fine]
        failures |= faults
        failures |= {each: NonFiniteError("The network gave a NaN or an infinity.") for each in broken}
        for sample in (*faults, *broken):
            del latents[sample]
        return len(broken)

    def _measure(self, samples: Sequence[Sample], latents: dict[Sample, Latent]) -> list[Measurement]:
        """What the step of each sample found about its image."""
        steps = [sample.step for sample in samples]
        values = self.denoiser.measure(
            [each.chain for each in samples], [latents[each] for each in samples], steps
        )
        return [
            Measurement(sample.chain.plan.timesteps[sample.step], *found)
            for sample, found in zip(samples, values, strict=True)
        ]

    def _render(
        self, samples: Sequence[Sample], latents: dict[Sample, Latent], found: dict[Sample, Measurement]
    ) -> list[dict[SnapshotKind, Picture]]:
        """Pictures of the samples' step that somebody will see, by kind: due previews, and final results."""
        wanted = [(sample, kind) for sample in samples for kind in _kinds(sample)]
        if not wanted:
            return [{} for _ in samples]
        values = [_value(self._shown(sample, kind, latents), kind) for sample, kind in wanted]
        pictures: dict[Sample, dict[SnapshotKind, Picture]] = {sample: {} for sample in samples}
        for (sample, kind), pixels in zip(wanted, to_pictures(torch.stack(values)), strict=True):
            picture = Picture(sample.index, sample.chain.seed, kind, pixels, found.get(sample))
            pictures[sample][kind] = picture
        return list(pictures.values())

    def _shown(self, sample: Sample, kind: SnapshotKind, latents: dict[Sample, Latent]) -> Latent:
        """After the step; but a measurement's x_t is the one that was measured, before it."""
        before = kind == "xt" and sample.job.stage.kind == "measure"
        return self._latent(sample) if before else latents[sample]

    def _latent(self, sample: Sample) -> Latent:
        return self._progress[sample.job.id].latents[sample]

    # ── The commit ─────────────────────────────────────────────────────────────────────────────

    def _commit(
        self,
        samples: Sequence[Sample],
        latents: dict[Sample, Latent],
        found: dict[Sample, Measurement],
        pictures: dict[Sample, dict[SnapshotKind, Picture]],
    ) -> list[Event]:
        """Make the step count: samples that failed or were cancelled are not among these."""
        for sample in samples:
            progress = self._progress[sample.job.id]
            progress.latents[sample] = latents[sample]
            if sample in found:
                progress.measurements.setdefault(sample, []).append(found[sample])
            if sample.step + 1 == sample.steps and sample.job.last_stage:
                progress.pictures[sample] = pictures[sample][sample.job.stage.result]
                del progress.latents[sample]
        events: list[Event] = []
        for job, its in self.scheduler.commit(samples).items():
            events += self._previews(job, its, pictures)
            if self.scheduler.stage_done(job):
                events += self._finish_stage(job)
        return events

    def _previews(
        self, job: Job, samples: Sequence[Sample], pictures: dict[Sample, dict[SnapshotKind, Picture]]
    ) -> Iterator[Preview]:
        """One event per step that some of the job's samples have just done and that is due a preview."""
        by_step: dict[int, list[Sample]] = {}
        for sample in samples:
            if _is_due(job, sample.step, sample.steps):
                by_step.setdefault(sample.step, []).append(sample)
        eta = self.scheduler.eta(job) if by_step else 0.0
        for step, group in by_step.items():
            timestep = group[0].chain.plan.timesteps[step - 1]
            shown = tuple(pictures[sample][kind] for sample in group for kind in _preview_kinds(job))
            yield Preview(job.id, step, group[0].steps, timestep, eta, shown)

    def _finish_stage(self, job: Job) -> list[Event]:
        """Finish a job whose stage is done, or begin its next stage from what this one left."""
        progress = self._progress[job.id]
        if not job.last_stage:
            carried, faults = self._isolate(self._carry, job.samples)
            for error in faults.values():
                return self._ended(self.scheduler.fail(job.id, error))
            self._progress[job.id] = _Progress(carried=tuple(carried.values()))
            self.scheduler.next_stage(job)
            return []
        now = monotonic()
        started = job.started if job.started is not None else now
        pictures = tuple(progress.pictures[sample] for sample in job.samples)
        measured = job.samples if job.stage.kind == "measure" else ()
        measurements = tuple(tuple(progress.measurements[sample]) for sample in measured)
        self.scheduler.finish(job)
        times = started - job.spec.created, now - started
        return self._ended([Finished(job.id, pictures, *times, measurements)])

    def _carry(self, samples: Sequence[Sample]) -> list[Image]:
        return [to_array(self._latent(sample).x) for sample in samples]

    def _ended(self, events: list[Event]) -> list[Event]:
        """Let go of what is held for jobs that these events end."""
        for event in events:
            if isinstance(event, Terminal):
                self._progress.pop(event.job_id, None)
        return events


def _is_due(job: Job, step: int, steps: int) -> bool:
    """Whether a preview shows step `step` (from 1): the first, the last, and every `preview_every`-th."""
    if job.spec.preview == "none" or not job.last_stage:
        return False
    return step in (1, steps) or step % job.spec.preview_every == 0


def _preview_kinds(job: Job) -> tuple[SnapshotKind, ...]:
    match job.spec.preview:
        case "none":
            return ()
        case "both":
            return "x0", "xt"
        case kind:
            return (kind,)


def _kinds(sample: Sample) -> dict[SnapshotKind, None]:
    """What is rendered of the step that a sample has just done, before the commit counts it."""
    done, job = sample.step + 1, sample.job
    kinds = _preview_kinds(job) if _is_due(job, done, sample.steps) else ()
    result = (job.stage.result,) if done == sample.steps and job.last_stage else ()
    return dict.fromkeys((*kinds, *result))


def _value(latent: Latent, kind: SnapshotKind) -> torch.Tensor:
    return latent.x0 if kind == "x0" else latent.x


def to_pictures(x: torch.Tensor) -> Pixels:
    """[B, C, H, W] float in [-1, 1], clamped → [B, H, W, C] uint8, in memory of its own."""
    return np.ascontiguousarray(to_pixels(x).transpose(0, 2, 3, 1))


def to_array(x: torch.Tensor) -> Image:
    """A latent [C, H, W], as float32 in memory of its own."""
    return np.array(x.float().cpu().numpy())
