"""Where steps run, one after the other, while the host does something else.

A queue takes work that ends in tensors and gives a `Pending` for it at once. Work that fails leaves no result
to build on, so what was queued behind it is skipped (`SkippedError`) until `recover` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]
Arrays = list[NDArray[Any]]


class SkippedError(RuntimeError):
    """The work was not begun, because work before it had failed."""


class Pending(Protocol):
    """The results of queued work."""

    def result(self) -> Arrays:
        """Wait for the results, in host memory. Raises what the work raised, or SkippedError."""


class Queue(Protocol):
    """Runs work in order."""

    def submit(self, work: Work) -> Pending:
        """Queue work; returns without waiting for it."""

    def recover(self) -> None:
        """Accept work again after a failure. What was queued before this stays skipped."""


class _Epochs:
    """Which work may run: none of the epoch in which some has failed."""

    def __init__(self) -> None:
        self._epoch, self._failed = 0, -1

    def recover(self) -> None:
        """Begin a new epoch."""
        self._epoch += 1

    def _checked(self, epoch: int, work: Work) -> Sequence[Tensor]:
        if epoch == self._failed:
            raise SkippedError("work before this one has failed")
        try:
            return work()
        except BaseException:
            self._failed = epoch
            raise


class ThreadQueue(_Epochs):
    """A thread, for a network that runs on this processor: it has no queue of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "ddpm-device")

    def submit(self, work: Work) -> Future[Arrays]:
        """Run work on the thread."""
        return self._thread.submit(self._run, self._epoch, work)

    def _run(self, epoch: int, work: Work) -> Arrays:
        return [tensor.cpu().numpy() for tensor in self._checked(epoch, work)]


class CudaQueue(_Epochs):
    """The current CUDA stream: work launches kernels and returns; results are copied when they are there."""

    def submit(self, work: Work) -> _CudaPending:
        """Launch work, and the copy of its results into pinned memory."""
        try:
            results = self._checked(self._epoch, work)
        except Exception as error:  # noqa: BLE001 (raised where the result is read, as by every queue)
            return _CudaPending([], error)
        try:
            return _CudaPending([_to_pinned(tensor) for tensor in results])
        except Exception as error:  # noqa: BLE001 (the step counts, so it must not be tried again)
            return _CudaPending([], torch.AcceleratorError(f"the results cannot be copied: {error}"))


class _CudaPending:
    def __init__(self, results: Sequence[Tensor], error: Exception | None = None) -> None:
        self._results, self._error = results, error
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if error is None:
            self._copied.record()

    def result(self) -> Arrays:
        """Wait for the copies."""
        if self._error is not None:
            raise self._error
        self._copied.synchronize()
        return [tensor.numpy() for tensor in self._results]


def _to_pinned(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on a device, behind what is queued there and without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    # Memory that is not pinned would be copied only once everything before it is done. The allocator does not
    # give this again to anyone before it has been copied.
    return tensor.pin_memory().to(device, non_blocking=True)


def queue_of(device: torch.device) -> Queue:
    """The queue of a device. On MPS, too, results are waited for on a thread."""
    return CudaQueue() if device.type == "cuda" else ThreadQueue()
