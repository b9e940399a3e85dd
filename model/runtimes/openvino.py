"""The network in OpenVINO, on a CPU."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Checkpoint
from model.runtimes.base import DtypeName, RuntimeUnavailableError, pad
from model.runtimes.lowering import REWRITES, Rewrites, lowered, to_graph
from model.runtimes.queues import ThreadQueue
from model.unet import UNet


def check_dtype(dtype: str) -> None:
    """Raise RuntimeUnavailableError for a precision that this runtime does not have."""
    if dtype == "float16":
        raise RuntimeUnavailableError("openvino on a CPU runs float32 or bfloat16, not float16")


class OpenVinoRuntime:
    """The network compiled by OpenVINO for this CPU. Bitwise independent of batch size and position.

    A batch is halved over two streams that run side by side, each on half of the cores: small networks gain
    more from that than from more threads. Every half runs at a compiled shape, a power of two rows, because
    OpenVINO fuses and vectorises better where it knows the shape. The network is lowered to what OpenVINO
    runs best (`model/runtimes/lowering.py`).
    """

    name = "openvino"
    streams = 2
    rewrites: ClassVar[Rewrites] = REWRITES

    def __init__(
        self, model: Checkpoint, dtype: Literal["auto"] | DtypeName = "float32", threads: int | None = None
    ) -> None:
        try:
            # Without this OpenVINO's converter sends usage reports over the network.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed"
            import openvino as ov  # an optional extra, and heavy
        except ImportError as error:
            raise RuntimeUnavailableError("openvino is not installed: pip install openvino") from error
        check_dtype(dtype)
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.device = torch.device("cpu")
        self.dtype: DtypeName = ("bfloat16" if native else "float32") if dtype == "auto" else dtype
        self.batch_sizes: tuple[int, ...] = ()
        self.recorder = None
        self.queue = ThreadQueue()
        # The rewrites are of our own layers; others are as OpenVINO's converter has them.
        network = lowered(model.unet, self.rewrites) if isinstance(model.unet, UNet) else model.unet
        # In bfloat16 OpenVINO would round timesteps to eight bits before it takes their sines.
        self._features, body, self._scaled = network.split()
        config = model.unet.config
        y = torch.zeros(2, dtype=torch.int64) if config.conditional else None
        example = [torch.zeros(2, *config.shape), *self._features(torch.ones(2), y)]
        self._row_shapes = [tuple(values.shape[1:]) for values in example]
        self._graph = to_graph(body, example)
        self._options = {
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" else "f32",
            "NUM_STREAMS": str(self.streams),
        }
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = str(threads)
        self._requests: dict[int, list[Any]] = {}  # by rows, one of each stream

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch of any size. A new size compiles its shapes first, within seconds."""
        with torch.inference_mode():
            return self._scaled(self._run([x, *self._features(t, y)]), t)

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Compile the shapes of these batches side by side."""
        sizes = {_shape(-(-size // self.streams)) for size in batch_sizes}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            deque(pool.map(self._compiled, sizes))  # raises what went wrong

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        half = -(-len(inputs[0]) // self.streams)
        outputs = []
        with ExitStack() as stack:  # no request is left running after an error
            parts = zip(*(torch.split(values, half) for values in inputs), strict=True)
            for stream, part in enumerate(parts):
                rows = len(part[0])
                size = _shape(rows)
                request = self._compiled(size)[stream]
                for place, values in enumerate(part):
                    request.get_input_tensor(place).data[:] = pad(values, size).numpy()
                request.start_async()
                stack.callback(request.wait)
                outputs.append((request, rows))
        # A copy out of the requests' buffers, which the next call overwrites.
        return torch.from_numpy(np.concatenate([r.get_output_tensor(0).data[:n] for r, n in outputs]))

    def _compiled(self, size: int) -> list[Any]:
        """The requests, one of each stream, for `size` rows. Each owns its input and output memory."""
        if size not in self._requests:
            graph = self._graph.clone()
            graph.reshape({graph.input(i): [size, *shape] for i, shape in enumerate(self._row_shapes)})
            compiled = self._core.compile_model(graph, "CPU", self._options)
            self._requests[size] = [compiled.create_infer_request() for _ in range(self.streams)]
        return self._requests[size]


def _shape(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()
