"""Ways to run the network behind one call: torch on any device, eager or compiled, and OpenVINO on a CPU.

`forward(x, t, y)` takes and returns float32 torch tensors on `device`. A runtime says in
`batch_sizes` which batch shapes it runs: () is any; otherwise a call is padded up to the next one, for
networks that only give the same bits at the same shape.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.lowering import REWRITES, Rewrites, lowered, to_graph

DtypeName = Literal["float32", "bfloat16", "float16"]
RuntimeName = Literal["auto", "torch", "torch-compile", "openvino"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RuntimeUnavailableError(RuntimeError):
    """The asked-for runtime, device or dtype cannot be had on this machine; the message says why."""


Network = Callable[..., Tensor]
"""(x, t) or (x, t, y) → the network's output."""


class Runtime(Protocol):
    """A network ready to run."""

    name: str
    dtype: DtypeName
    device: torch.device
    batch_sizes: tuple[int, ...]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x: [B, C, H, W] float32; t: [B] int64; y: [B] int64 or None. Returns [B, C_out, H, W] float32."""

    def prepare(self, widths: Iterable[int]) -> None:
        """Spare the first batches of so many rows what only a first one needs, as far as that can be done."""


class TorchRuntime:
    """The network in PyTorch, on CUDA, MPS or CPU; eager, or compiled by torch.compile.

    On CUDA every shape of `batch_sizes` is recorded once as a CUDA graph and then replayed, which spares the
    launches of single kernels. Compiling takes a minute or so for each shape, at its first call.
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
            _pad(values, size) for values in (x.to(TORCH_DTYPES[self.dtype]), t, y) if values is not None
        ]
        network = self._graph(size, inputs) if size in self.batch_sizes else self._network
        return network(*inputs)[:rows].float()

    def prepare(self, widths: Iterable[int]) -> None:
        """Nothing: eager needs none, and the compiler would not be quicker for several at once."""

    def _graph(self, size: int, inputs: Sequence[Tensor]) -> Network:
        """On CUDA the recorded call of `size` rows; recordings of sizes no longer in use are let go."""
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


class OpenVinoRuntime:
    """The network compiled by OpenVINO for this CPU. Bitwise independent of batch size and position.

    A batch is halved over two streams that run side by side, each on half of the cores, since small
    networks gain more from that than from more threads. Every half has a shape compiled for it,
    a power of two rows, because OpenVINO fuses and vectorises better where it knows the shape, and the
    network is written in the way that OpenVINO runs best (`model/lowering.py`).
    """

    name = "openvino"
    streams = 2
    rewrites: ClassVar[Rewrites] = REWRITES

    def __init__(
        self, model: Checkpoint, dtype: Literal["auto"] | DtypeName = "float32", threads: int | None = None
    ) -> None:
        try:
            # Without this its converter reports its use to its maker, from wherever the service runs.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed"
            import openvino as ov  # an optional extra, and heavy
        except ImportError as error:
            raise RuntimeUnavailableError("openvino is not installed: pip install openvino") from error
        if dtype == "float16":
            raise RuntimeUnavailableError("openvino on a CPU runs float32 or bfloat16, not float16")
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.device = torch.device("cpu")
        self.dtype: DtypeName = ("bfloat16" if native else "float32") if dtype == "auto" else dtype
        self.batch_sizes: tuple[int, ...] = ()
        config = model.unet.config
        image = config.in_channels, config.sample_size, config.sample_size
        self._row_shapes = [image, (), ()] if config.num_class_embeds is not None else [image, ()]
        example = [torch.zeros(2, *image)] + [torch.zeros(2, dtype=torch.int64)] * (len(self._row_shapes) - 1)
        self._graph = to_graph(lowered(model.unet, self.rewrites), example)
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" else "f32",
            "NUM_STREAMS": str(self.streams),
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = str(threads)
        self._requests: dict[int, list[Any]] = {}  # by rows, one of each stream

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch of any size. A size that is new compiles its shapes first: a moment."""
        return self._run([x, t] if y is None else [x, t, y])

    def prepare(self, widths: Iterable[int]) -> None:
        """Compile the shapes of these batches side by side."""
        sizes = {_shape(-(-width // self.streams)) for width in widths}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            deque(pool.map(self._compiled, sizes))  # raises what went wrong

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        half = -(-len(inputs[0]) // self.streams)
        outputs = []
        with ExitStack() as stack:  # whatever fails, no request is left running
            parts = zip(*(torch.split(values, half) for values in inputs), strict=True)
            for stream, part in enumerate(parts):
                rows = len(part[0])
                size = _shape(rows)
                request = self._compiled(size)[stream]
                for place, values in enumerate(part):
                    request.get_input_tensor(place).data[:] = _pad(values, size).numpy()
                request.start_async()
                stack.callback(request.wait)
                outputs.append((request, rows))
        # A copy out of the requests' buffers, which the next call overwrites.
        return torch.from_numpy(np.concatenate([r.get_output_tensor(0).data[:n] for r, n in outputs]))

    def _compiled(self, size: int) -> list[Any]:
        """The requests, one of each stream, for `size` rows. They have memory of their own for both ends."""
        if size not in self._requests:
            graph = self._graph.clone()
            graph.reshape({graph.input(i): [size, *shape] for i, shape in enumerate(self._row_shapes)})
            compiled = self._core.compile_model(graph, "CPU", self._options)
            self._requests[size] = [compiled.create_infer_request() for _ in range(self.streams)]
        return self._requests[size]


def _shape(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def _pad(values: Tensor, size: int) -> Tensor:
    if len(values) == size:
        return values
    return torch.cat((values, values[:1].expand(size - len(values), *values.shape[1:])))


def choose_device(wanted: str) -> str:
    """`auto` → the best there is; otherwise the wanted one. Raises RuntimeUnavailableError when absent."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(f"device {wanted!r}: {str(error).splitlines()[0]}") from error
    return wanted


def check_available(runtime: str, device: str) -> None:
    """Raise RuntimeUnavailableError when what is asked for cannot be had here, without loading anything."""
    place = choose_device(device)
    if runtime != "openvino":
        return
    if place != "cpu":
        raise RuntimeUnavailableError(f"openvino runs on the CPU here, not on {place!r}")
    if importlib.util.find_spec("openvino") is None:
        raise RuntimeUnavailableError("openvino is not installed: pip install openvino")


def keep_torch_off(runtime: Runtime) -> None:
    """Leave the cores to a runtime that has threads of its own.

    Torch only updates tables then, but its threads would wait for more by spinning.
    """
    if runtime.name == "openvino":
        torch.set_num_threads(1)


def load_runtime(
    model: Checkpoint,
    runtime: RuntimeName = "auto",
    device: str = "auto",
    dtype: Literal["auto"] | DtypeName = "auto",
    max_rows: int = 16,
    batch_invariant: bool = True,
) -> Runtime:
    """Choose and build a runtime. On a CPU `auto` is OpenVINO where installed, else torch.

    dtype: `auto` is bfloat16 for OpenVINO on a CPU that has instructions for it, since the evaluation of the
    shipped model shows no loss beyond its noise; else float32, as for a network that predicts the posterior
    mean, whose error is multiplied by 1 / c_0, up to thousands, on the way to x₀. max_rows: the widest batch
    that will be asked for. batch_invariant: pad torch's batches to one shape.
    Raises RuntimeUnavailableError when what was asked for cannot be had.
    """
    check_available(runtime, device)
    place = choose_device(device)
    if dtype == "auto" and model.schedule.prediction_type == "posterior_mean":
        dtype = "float32"
    if place == "cpu" and runtime in ("auto", "openvino"):
        try:
            return OpenVinoRuntime(model, dtype)
        except RuntimeUnavailableError:
            if runtime == "openvino":
                raise
    sizes = (max_rows,) if batch_invariant else ()
    precision: DtypeName = "float32" if dtype == "auto" else dtype
    return TorchRuntime(model, place, precision, sizes, compiled=runtime == "torch-compile")
