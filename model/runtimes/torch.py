"""The network in PyTorch; on CUDA recorded as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.runtimes.base import TORCH_DTYPES, DtypeName, pad

Network = Callable[..., Tensor]
"""(x, t) or (x, t, y) → the network's output."""


class TorchRuntime:
    """The network in PyTorch, on CUDA, MPS or CPU; eager, or compiled by torch.compile.

    On CUDA every shape of `batch_sizes` is recorded once as a CUDA graph and then replayed, which saves
    the launches of single kernels. Compiling takes a minute or so for each shape, at its first call.
    """

    def __init__(
        self,
        model: Checkpoint,
        device: str = "cpu",
        dtype: DtypeName = "float32",
        batch_sizes: Sequence[int] = (),
        *,
        compiled: bool = False,
    ) -> None:
        self.name = "torch-compile" if compiled else "torch"
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_sizes = tuple(sorted(batch_sizes))
        # A copy, so that neither the dtype nor the device of the caller's network changes.
        self.unet = deepcopy(model.unet).to(self.device, TORCH_DTYPES[dtype]).eval().requires_grad_(False)
        if self.device.type == "cuda" or compiled:
            self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network: Network = torch.compile(self.unet, dynamic=False) if compiled else self.unet
        self._graphs: dict[int, _CudaGraph] = {}

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch, padded to a fixed shape where `batch_sizes` asks for it."""
        rows = len(x)
        size = next((size for size in self.batch_sizes if size >= rows), rows)
        inputs = [
            pad(values, size) for values in (x.to(TORCH_DTYPES[self.dtype]), t, y) if values is not None
        ]
        network = self._graph(size, inputs) if size in self.batch_sizes else self._network
        return network(*inputs)[:rows].float()

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing: eager mode needs none, and compiling several shapes at once would not be quicker."""

    def _graph(self, size: int, inputs: Sequence[Tensor]) -> Network:
        """On CUDA the recorded call of `size` rows; recordings of sizes no longer in use are freed."""
        if self.device.type != "cuda":
            return self._network
        if size not in self._graphs:
            self._graphs = {n: graph for n, graph in self._graphs.items() if n in self.batch_sizes}
            self._graphs[size] = _CudaGraph(self._network, inputs)
        return self._graphs[size]


class _CudaGraph:
    """A call of the network at one shape, recorded and then replayed."""

    def __init__(self, network: Network, inputs: Sequence[Tensor]) -> None:
        self._inputs = [values.clone() for values in inputs]
        # Libraries choose and allocate in their first calls, which a recording must not contain.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                network(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = network(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output for new inputs of the same shapes, in memory of its own."""
        for kept, values in zip(self._inputs, inputs, strict=True):
            kept.copy_(values)
        self._graph.replay()
        return self._output.clone()
