"""Who is to blame: what raises for some samples is tried again in halves, until the culprits fail alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from traceback import clear_frames
from typing import TypeVar

import torch

from model.runtimes import SkippedError
from service.engine.jobs import Sample
from service.errors import ComputeError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Failures = dict[Sample, ComputeError]


class FatalError(RuntimeError):
    """The device is broken for good; the process has to be replaced."""


def isolate(
    action: Callable[[Sequence[Sample]], Sequence[Result]],
    samples: Sequence[Sample],
    on_out_of_memory: Callable[[Sequence[Sample]], bool] = lambda _samples: False,
    retry: Callable[[Sequence[Sample]], Sequence[Result]] | None = None,
    probe: Callable[[], None] = lambda: None,
) -> tuple[dict[Sample, Result], Failures]:
    """The action's result for each sample, and an error for each that makes it raise.

    on_out_of_memory: called with what did not fit. Returns whether it might in a call that is narrower from
    now on, though it is a single sample. retry: what is done instead of the action after it has failed.
    probe: raises where the device is broken, which is asked before a sample is blamed. Raises FatalError for
    such a device or a lost one, and SkippedError as it comes.
    """
    if not samples:
        return {}, {}
    try:
        return dict(zip(samples, action(samples), strict=True)), {}
    except torch.OutOfMemoryError as error:
        out_of_memory, cause = True, error
    except torch.AcceleratorError as error:  # CUDA's state is lost with the first of these
        raise FatalError(str(error)) from error
    except SkippedError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever it is, it ends one image and not the service)
        out_of_memory, cause = False, error  # type: ignore[assignment]
    # Outside the except block, so that the traceback no longer holds the failed call's tensors; the step may
    # keep its error.
    reason = f"{type(cause).__name__} in the step of this image."
    _log(samples, cause)
    clear_frames(cause.__traceback__)
    del cause
    narrower = False
    if out_of_memory:
        torch.cuda.empty_cache()
        narrower = on_out_of_memory(samples)
    if len(samples) == 1:
        if narrower:
            return isolate(retry or action, samples, on_out_of_memory, probe=probe)
        if not out_of_memory:
            _check(probe)
        return {}, {samples[0]: ComputeError(reason)}
    half = len(samples) // 2
    first, second = (
        isolate(retry or action, part, on_out_of_memory, probe=probe)
        for part in (samples[:half], samples[half:])
    )
    return first[0] | second[0], first[1] | second[1]


def _check(probe: Callable[[], None]) -> None:
    """Raise FatalError if the device fails without the sample as well."""
    try:
        probe()
    except torch.OutOfMemoryError:  # it is short of memory, not broken
        return
    except Exception as error:
        raise FatalError(f"the network fails for no image too: {error}") from error


def _log(samples: Sequence[Sample], cause: Exception) -> None:
    if isinstance(cause, torch.OutOfMemoryError):
        logger.warning("%d images ran out of memory: %s", len(samples), cause)
    elif len(samples) == 1:
        job, seed = samples[0].job.id, samples[0].chain.seed
        logger.error("the image of seed %d in job %s failed", seed, job, exc_info=cause)
    else:
        what = type(cause).__name__
        logger.warning("%d images failed together, %s: they are tried in halves", len(samples), what)
