"""One step: choose the samples, denoise them, apply what was cancelled meanwhile, commit.

What goes wrong is narrowed down here: a step that raises is retried in halves until the culprit alone
fails, running out of memory also narrows the batch for good, and a result that is not finite fails its
own job. Mates go on, bit for bit as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Protocol

import numpy as np
import torch

from model.denoiser import Chain, Latent, to_pixels
from service.errors import ComputeError, NonFiniteError
from service.events import Event, Floats, Measure, Picture, Pixels
from service.jobs import Sample
from service.scheduler import Scheduler, StepPlan


class Denoises(Protocol):
    """What the engine needs of `model.denoiser.Denoiser`; tests put a fake in its place."""

    def start(self, chain: Chain) -> Latent:
        """x_T of a chain."""

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> Sequence[Latent]:
        """New latents, in order."""

    def measure(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> Sequence[tuple[float, float]]:
        """(bits per dimension, mean squared error) of probes' latest guesses, in order."""


class FatalError(RuntimeError):
    """The device is broken for good; the process has to be replaced."""


@dataclass(frozen=True)
class StepReport:
    """What a step was: rows of its network call, samples advanced, seconds, and what happened."""

    rows: int
    samples: int
    seconds: float
    events: list[Event]
    nonfinite: int


@dataclass
class Engine:
    """Runs the scheduler's plans. Everything here happens on the worker's thread.

    narrow: told how many rows a network call has at most from now on, after one ran out of memory.
    """

    denoiser: Denoises
    scheduler: Scheduler
    narrow: Callable[[int], None] = lambda _rows: None
    _latest: tuple[float, int] | None = (
        None  # start and rows of the latest step, if it tells of the next ones
    )

    def step(self, poll: Callable[[], list[Event]] = list) -> StepReport | None:
        """Advance a batch of samples by one row. None when there is nothing to do.

        `poll` is called between the network call and the commit: it applies arrivals and cancellations, so
        that a job cancelled during the call leaves before its result counts, and returns their events.
        """
        begun = perf_counter()
        if self._latest is not None:  # from step to step: what a step takes with all that is done between two
            started, rows = self._latest
            self.scheduler.times.observe(rows, begun - started)
            self._latest = None
        events = self.scheduler.expire(monotonic())
        plan = self.scheduler.schedule(monotonic())
        if not plan.samples:
            return StepReport(0, 0, 0.0, events, 0) if events else None
        called = perf_counter()
        latents, failures = self._denoise(plan.samples)
        seconds = perf_counter() - called

        events += poll()
        nonfinite = self._check_finite(latents, failures)
        for sample, error in failures.items():
            events += self.scheduler.fail(sample.job.id, error)
        for sample, latent in latents.items():
            if not sample.job.over:
                sample.latent = latent
        self._measure([sample for sample in latents if sample.chain.plan.probe and not sample.job.over])
        events += self.scheduler.commit(StepPlan(tuple(latents), plan.rows), monotonic(), draw)
        if not failures and len(self.scheduler):
            self._latest = begun, plan.rows
        return StepReport(plan.rows, len(latents), seconds, events, nonfinite)

    def _denoise(self, samples: Sequence[Sample]) -> tuple[dict[Sample, Latent], dict[Sample, ComputeError]]:
        """Latents of the samples that could be advanced, and errors of those that could not."""
        try:
            known = [sample.latent or self.denoiser.start(_chain(sample)) for sample in samples]
            advanced = self.denoiser.step(
                [_chain(sample) for sample in samples], known, [sample.row for sample in samples]
            )
            return dict(zip(samples, advanced, strict=True)), {}
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
            fits = max(1, sum(sample.cost for sample in samples) // 2)
            self.scheduler.max_rows = min(self.scheduler.max_rows, fits)
            self.narrow(self.scheduler.max_rows)
        if len(samples) == 1:
            return {}, {samples[0]: ComputeError(reason)}
        half = len(samples) // 2
        first, second = self._denoise(samples[:half]), self._denoise(samples[half:])
        return first[0] | second[0], first[1] | second[1]

    def _measure(self, probes: Sequence[Sample]) -> None:
        """Add to each probe's measures what it has just found."""
        if not probes:
            return
        rows = [sample.row for sample in probes]
        found = self.denoiser.measure(
            [_chain(each) for each in probes], [each.latent for each in probes], rows
        )
        for sample, row, values in zip(probes, rows, found, strict=True):
            sample.measures += (Measure(sample.chain.plan.timesteps[row], *values),)

    def _check_finite(self, latents: dict[Sample, Latent], failures: dict[Sample, ComputeError]) -> int:
        """Move samples whose latents are not finite over to the failures. Returns how many."""
        if not latents:
            return 0
        results = [latent.x0 if each.chain.plan.probe else latent.x for each, latent in latents.items()]
        finite = torch.stack(results).isfinite().flatten(1).all(1).tolist()
        broken = [sample for sample, fine in zip(latents, finite, strict=True) if not fine]
        for sample in broken:
            del latents[sample]
            failures[sample] = NonFiniteError("The network gave a NaN or an infinity for this image.")
        return len(broken)


def draw(looks: Sequence[tuple[Sample, str]]) -> list[Picture]:
    """What samples' latents look like: the x₀ guess ("x0") or the latent itself ("xt").

    Of a probe, whose next latent has nothing to do with its guess, the one that it guessed from.
    """
    values = [_value(sample, kind) for sample, kind in looks]
    return [
        Picture(
            sample.index,
            sample.chain.seed,
            kind,
            pixels,
            sample.measures[-1] if sample.measures else None,
            to_array(sample.latent.x) if sample.job.sequel is not None else None,
        )
        for (sample, kind), pixels in zip(looks, to_pictures(torch.stack(values)), strict=True)
    ]


def _value(sample: Sample, kind: str) -> torch.Tensor:
    latent: Latent = sample.latent
    if kind == "x0":
        return latent.x0
    return latent.seen if sample.chain.plan.probe and latent.seen is not None else latent.x


def to_pictures(x: torch.Tensor) -> Pixels:
    """[B, C, H, W] float in [-1, 1], clamped → [B, H, W, C] uint8, in memory of its own."""
    return np.ascontiguousarray(to_pixels(x).transpose(0, 2, 3, 1))


def to_array(x: torch.Tensor) -> Floats:
    """A latent [C, H, W], as float32 in memory of its own."""
    return np.array(x.float().cpu().numpy())


def _chain(sample: Sample) -> Chain:
    chain = sample.chain
    assert isinstance(chain, Chain)  # jobs.py knows only the protocol; the service builds the real one
    return chain
