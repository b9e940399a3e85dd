"""A function of tensors, recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs")


class Recorded(Generic[Outputs]):
    """Recorded once at the shapes of its input, and then replayed: one launch instead of one for each kernel.

    function: of a tensor on the device; it neither waits for the device nor branches on values. example: an
    input, in host memory, with which it may be run a few times. beside: another one whose memory it shares:
    of the two, only the outputs of the latest call can still be read by what is queued after it.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Outputs],
        example: Tensor,
        beside: Recorded[Outputs] | None = None,
    ) -> None:
        self._input = example.cuda()
        # Libraries choose and allocate in their first calls, which a recording must not contain.
        current, aside = torch.cuda.current_stream(), _aside(torch.cuda.current_device())
        aside.wait_stream(current)
        try:
            with torch.cuda.stream(aside):
                for _ in range(3):
                    function(self._input)
        finally:  # also after a failure, when memory that is still read there is given to others here
            current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        pool = beside._graph.pool() if beside is not None else None
        with torch.cuda.graph(self._graph, pool=pool, stream=aside):
            self._outputs = function(self._input)

    def __call__(self, given: Tensor) -> Outputs:
        """The outputs for a new input, in memory that the next call overwrites."""
        self._input.copy_(given.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._outputs


@cache
def _aside(device: int) -> torch.cuda.Stream:  # noqa: ARG001 (it is made on the current one, which this is)
    """One for all recordings: what libraries keep for each stream is kept once."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
