"""What every runtime is: the protocol, its names and dtypes, and the error when one cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from model.runtimes.queues import Queue

DtypeName = Literal["float32", "bfloat16", "float16"]
RuntimeName = Literal["auto", "torch", "torch-compile", "openvino"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RuntimeUnavailableError(RuntimeError):
    """The asked-for runtime, device or dtype cannot be had on this machine; the message says why."""


class Recorder(Protocol):
    """Makes a function of one tensor, given in host memory, quicker to call at one shape."""

    def __call__(
        self, function: Callable[[Tensor], Any], example: Tensor, beside: Any = None
    ) -> Callable[[Tensor], Any]:
        """As `Recorded`, which is one."""


class Runtime(Protocol):
    """A network ready to run."""

    name: str
    dtype: DtypeName
    device: torch.device
    batch_sizes: tuple[int, ...]

    @property
    def recorder(self) -> Recorder | None:
        """What records whole steps of each of `batch_sizes`; None if nothing does."""

    @property
    def queue(self) -> Queue:
        """Where steps run."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x: [B, C, H, W] float32; t: [B]; y: [B] int64 or None. Returns [B, C_out, H, W] float32."""

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Do now, as far as possible, what the first batches of so many rows would have to wait for."""


def pad(values: Tensor, size: int) -> Tensor:
    """Repeat the first row until there are `size` rows: [B, …] → [size, …], B ≤ size."""
    if len(values) == size:
        return values
    return torch.cat((values, values[:1].expand(size - len(values), *values.shape[1:])))
