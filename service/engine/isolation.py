"""Who is to blame: what raises for some samples is tried again in halves, until the culprits fail alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from traceback import clear_frames
from typing import TypeVar

import torch

from model.runtimes import SkippedError
from service.engine.jobs import Sample
from service.errors import ComputeError

Result = TypeVar("Result")
Failures = dict[Sample, ComputeError]


class FatalError(RuntimeError):
    """The device is broken for good; the process has to be replaced."""


def isolate(
    action: Callable[[Sequence[Sample]], Sequence[Result]],
    samples: Sequence[Sample],
    on_out_of_memory: Callable[[Sequence[Sample]], None] = lambda _samples: None,
    retry: Callable[[Sequence[Sample]], Sequence[Result]] | None = None,
) -> tuple[dict[Sample, Result], Failures]:
    """The action's result for each sample, and an error for each that makes it raise.

    retry: what is done instead of the action after it has failed. Raises FatalError for a lost device, and
    SkippedError as it comes.
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
    clear_frames(cause.__traceback__)
    del cause
    if out_of_memory:
        torch.cuda.empty_cache()
        on_out_of_memory(samples)
    if len(samples) == 1:
        return {}, {samples[0]: ComputeError(reason)}
    half = len(samples) // 2
    first, second = (
        isolate(retry or action, part, on_out_of_memory) for part in (samples[:half], samples[half:])
    )
    return first[0] | second[0], first[1] | second[1]
