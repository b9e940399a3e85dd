"""The network in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.runtimes.base import TORCH_DTYPES, DtypeName, Recorder, pad
from model.runtimes.queues import queue_of
from model.runtimes.recorded import Recorded

Call = Callable[..., Tensor]
"""(x, t) or (x, t, y) → the network's output."""


class TorchRuntime:
    """The network in PyTorch, on CUDA, MPS or CPU; eager, or compiled by torch.compile.

    On CUDA a whole step of each shape of `batch_sizes` is recorded (`model/denoiser.py`). Compiling takes a
    minute or so for each shape, at its first call.

    tf32: whether a CUDA device may multiply float32 values rounded to 10 bits of mantissa, several times as
    fast: the images look alike, but differ from those of float32 elsewhere. Torch knows one such choice for
    a process, and one current device; the latest runtime's count.
    """

    def __init__(
        self,
        model: Checkpoint,
        device: str = "cpu",
        dtype: DtypeName = "float32",
        batch_sizes: Sequence[int] = (),
        *,
        compiled: bool = False,
        tf32: bool = False,
    ) -> None:
        self.name = "torch-compile" if compiled else "torch"
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_sizes = tuple(sorted(batch_sizes))
        if self.device.type == "cuda":
            if self.device.index is not None:
                torch.cuda.set_device(self.device)  # streams, graphs and Triton's kernels have no other
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            # Of convolutions torch allows it unless told otherwise. Not by `conv.fp32_precision`: whoever
            # then asks for `allow_tf32`, as torch's compiler does, gets an error.
            torch.backends.cudnn.allow_tf32 = tf32
        # A copy, so that neither the dtype nor the device of the caller's network changes.
        self.unet = deepcopy(model.unet).to(self.device, TORCH_DTYPES[dtype]).eval().requires_grad_(False)
        if self.device.type == "cuda" or compiled:
            self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network: Call = torch.compile(self.unet, dynamic=False) if compiled else self.unet
        self.queue = queue_of(self.device)
        self.recorder: Recorder | None = Recorded if self.device.type == "cuda" else None

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch, padded to a fixed shape where `batch_sizes` asks for it."""
        rows = len(x)
        size = next((size for size in self.batch_sizes if size >= rows), rows)
        inputs = [
            pad(values, size) for values in (x.to(TORCH_DTYPES[self.dtype]), t, y) if values is not None
        ]
        return self._network(*inputs)[:rows].float()

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing: eager mode needs none, and compiling several shapes at once would not be quicker."""
