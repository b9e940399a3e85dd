"""Ways to run the network behind one call: torch on any device, OpenVINO on a CPU.

`forward(x, t, y)` takes and returns float32 torch tensors on `device`. A runtime says in
`batch_sizes` which batch shapes it runs: () is any; otherwise a call is padded up to the next one, for
networks that only give the same bits at the same shape.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.checkpoint import Checkpoint

DtypeName = Literal["float32", "bfloat16", "float16"]
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RuntimeUnavailableError(RuntimeError):
    """The asked-for runtime, device or dtype cannot be had on this machine; the message says why."""


class Runtime(Protocol):
    """A network ready to run."""

    name: str
    dtype: DtypeName
    device: torch.device
    batch_sizes: tuple[int, ...]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x: [B, C, H, W] float32; t: [B] int64; y: [B] int64 or None. Returns [B, C_out, H, W] float32."""


class TorchRuntime:
    """The network in eager PyTorch, on CUDA, MPS or CPU."""

    name = "torch"

    def __init__(
        self,
        model: Checkpoint,
        device: str = "cpu",
        dtype: DtypeName = "float32",
        batch_sizes: Sequence[int] = (),
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.batch_sizes = tuple(sorted(batch_sizes))
        # A copy, so that neither the dtype nor the device of the caller's network changes.
        self.unet = deepcopy(model.unet).to(self.device, TORCH_DTYPES[dtype]).eval()
        if self.device.type == "cuda":
            self.unet = self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch, padded to a fixed shape where `batch_sizes` asks for it."""
        rows = len(x)
        size = next((size for size in self.batch_sizes if size >= rows), rows)
        if size > rows:
            x, t = _pad(x, size), _pad(t, size)
            y = _pad(y, size) if y is not None else None
        out: Tensor = self.unet(x.to(TORCH_DTYPES[self.dtype]), t, y)
        return out[:rows].float()


class OpenVinoRuntime:
    """The network compiled by OpenVINO for this CPU. Bitwise independent of batch size and position."""

    name = "openvino"

    def __init__(self, model: Checkpoint, dtype: DtypeName = "float32", threads: int | None = None) -> None:
        try:
            # Without this its converter reports its use to its maker, from wherever the service runs.
            sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: "not installed"
            import openvino as ov  # an optional extra, and heavy
        except ImportError as error:
            raise RuntimeUnavailableError("openvino is not installed: pip install openvino") from error
        if dtype == "float16":
            raise RuntimeUnavailableError("openvino on a CPU runs float32 or bfloat16, not float16")
        self.device = torch.device("cpu")
        self.dtype: DtypeName = dtype
        self.batch_sizes: tuple[int, ...] = ()
        config = model.unet.config
        example = [torch.zeros(2, config.in_channels, config.sample_size, config.sample_size)]
        example += [torch.zeros(2, dtype=torch.int64)] * (2 if config.num_class_embeds is not None else 1)
        # A copy, since the compiled network shares the memory of the weights it was made from.
        unet = deepcopy(model.unet).eval()
        with torch.no_grad(), warnings.catch_warnings():
            # OpenVINO reads torch.jit's traces; that warns of its age, and of group norm's look at shapes.
            warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            # The converter would trace too, but check the trace by a second one: three quarters of its time.
            traced = torch.jit.trace(unet, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
            graph = ov.convert_model(traced, example_input=tuple(example))
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = str(threads)
        self._request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Run one batch of any size."""
        inputs = [x.numpy(), t.numpy()] + ([y.numpy()] if y is not None else [])
        # infer() copies its results out of the request's buffers, which the next call overwrites.
        return torch.from_numpy(self._request.infer(inputs, share_outputs=False)[0])


def _pad(values: Tensor, size: int) -> Tensor:
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


def load_runtime(
    model: Checkpoint,
    runtime: Literal["auto", "torch", "openvino"] = "auto",
    device: str = "auto",
    dtype: Literal["auto"] | DtypeName = "auto",
    max_rows: int = 16,
    batch_invariant: bool = True,
) -> Runtime:
    """Choose and build a runtime. On a CPU `auto` is OpenVINO where installed, else torch; always float32.

    max_rows: the widest batch that will be asked for. batch_invariant: pad torch's batches to one shape.
    Raises RuntimeUnavailableError when what was asked for cannot be had.
    """
    check_available(runtime, device)
    place = choose_device(device)
    precision: DtypeName = "float32" if dtype == "auto" else dtype
    if place == "cpu" and runtime in ("auto", "openvino"):
        try:
            return OpenVinoRuntime(model, precision)
        except RuntimeUnavailableError:
            if runtime == "openvino":
                raise
    return TorchRuntime(model, place, precision, (max_rows,) if batch_invariant else ())
