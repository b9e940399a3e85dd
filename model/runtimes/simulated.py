"""A device that computes next to nothing in a given time: it measures what surrounds the network.

The interpreter's lock is released while it waits, as during a GPU's work. What is left of the time that the
device could have been busy is the cost of the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from model.runtimes.base import DtypeName, Recorder
from model.runtimes.queues import Arrays, ThreadQueue, Work


class SimulatedRuntime:
    """rows: up to so many take `step_s` seconds a step, more in proportion. The output is x / 2.

    What a device would do in a step besides the network (gather, update, noise, scatter) is computed here, on
    this processor, and counts as part of that time. recorded: compile steps of so many rows for it, where a
    GPU records them; it takes a C++ compiler a few seconds, and the processor then has half the work.
    """

    name = "simulated"
    dtype: DtypeName = "float32"

    def __init__(self, rows: int, step_s: float, *, recorded: bool = False) -> None:
        self.rows, self.step_s = rows, step_s
        self.device = torch.device("cpu")
        self.batch_sizes: tuple[int, ...] = (rows,) if recorded else ()
        self.recorder: Recorder | None = _compiled if recorded else None
        self.called = 0
        self.queue = _TimedQueue(self)

    def seconds(self, batch_size: int) -> float:
        """What a step of so many rows takes."""
        return self.step_s * max(1.0, batch_size / self.rows)

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:  # noqa: ARG002 (as in a Runtime)
        """x: [B, C, H, W] float32. Returns its half."""
        self.called = len(x)
        return x * 0.5

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing to prepare."""


def _compiled(
    function: Callable[[Tensor], Any],
    example: Tensor,
    beside: object = None,  # noqa: ARG001
) -> Callable[[Tensor], Any]:
    compiled: Callable[[Tensor], Any] = torch.compile(function, dynamic=False)
    compiled(example)
    return compiled


class SimulatedNoise:
    """Rows drawn in advance: what takes a device no time takes a processor most of a step.

    shape: (C, H, W).
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self._drawn = torch.randn((256, *shape), generator=torch.Generator().manual_seed(0))

    def __call__(self, seeds: Tensor, steps: Tensor, stream: int) -> Tensor:
        """[N, C, H, W] for seeds and steps, [N] int64."""
        return self._drawn.index_select(0, (7 * seeds + 31 * steps + stream) & 0xFF)


class _TimedQueue(ThreadQueue):
    """A queue whose steps end no earlier than the device's would."""

    def __init__(self, runtime: SimulatedRuntime) -> None:
        super().__init__()
        self._runtime, self._free = runtime, 0.0

    def submit(self, work: Work) -> Future[Arrays]:
        """Note when the device could have begun."""
        submitted = time.perf_counter()
        return self._thread.submit(self._timed, submitted, self._epoch, work)

    def _timed(self, submitted: float, epoch: int, work: Work) -> Arrays:
        arrays = self._run(epoch, work)
        # A device begins at once with what is queued, however late this thread wakes up.
        self._free = max(submitted, self._free) + self._runtime.seconds(self._runtime.called)
        time.sleep(max(0.0, self._free - time.perf_counter()))
        return arrays
