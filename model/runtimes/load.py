"""Choose, check and build a runtime."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from model.checkpoint import Checkpoint
from model.runtimes.base import DtypeName, Runtime, RuntimeName, RuntimeUnavailableError
from model.runtimes.openvino import OpenVinoRuntime, check_dtype
from model.runtimes.torch import TorchRuntime


def choose_device(wanted: str) -> str:
    """The best device for `auto`, else the given one. Raises RuntimeUnavailableError when it is absent."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError(f"device {wanted!r}: {str(error).splitlines()[0]}") from error
    return wanted


def count_devices(device: torch.device) -> int:
    """How many devices of a kind the machine has: 1 but for CUDA's."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def check_available(runtime: str, device: str, dtype: str = "auto") -> None:
    """Raise RuntimeUnavailableError for what this machine cannot run, without loading anything."""
    place = choose_device(device)
    if runtime != "openvino":
        return
    if place != "cpu":
        raise RuntimeUnavailableError(f"openvino runs on the CPU here, not on {place!r}")
    if importlib.util.find_spec("openvino") is None:
        raise RuntimeUnavailableError("openvino is not installed: pip install openvino")
    check_dtype(dtype)


def keep_torch_off(runtime: Runtime) -> None:
    """Leave the cores to a runtime that has threads of its own: torch's would wait for work by spinning."""
    if runtime.name == "openvino":
        torch.set_num_threads(1)


def load_runtime(
    model: Checkpoint,
    runtime: RuntimeName = "auto",
    device: str = "auto",
    dtype: Literal["auto"] | DtypeName = "auto",
    max_batch_size: int = 16,
    batch_invariant: bool = True,
    tf32: bool = False,
) -> Runtime:
    """Choose and build a runtime. On a CPU `auto` is OpenVINO where installed, else torch.

    dtype: `auto` is bfloat16 for OpenVINO on a CPU that has instructions for it, since the evaluation of the
    shipped model shows no loss beyond its noise; else float32. It is float32 too for a network that predicts
    the posterior mean: x₀ has its error times 1 / c_0, up to thousands. max_batch_size: the largest batch.
    batch_invariant: pad torch's batches to one shape. tf32: let CUDA devices round what they multiply in
    float32 to TF32, which is several times as fast; without it float32 is as exact as on a processor.
    Raises RuntimeUnavailableError for what this machine cannot run.
    """
    check_available(runtime, device, dtype)
    place = choose_device(device)
    if dtype == "auto" and model.schedule.prediction_type == "posterior_mean":
        dtype = "float32"
    if place == "cpu" and runtime in ("auto", "openvino"):
        try:
            return OpenVinoRuntime(model, dtype)
        except RuntimeUnavailableError:
            if runtime == "openvino":
                raise
    sizes = (max_batch_size,) if batch_invariant else ()
    precision: DtypeName = "float32" if dtype == "auto" else dtype
    return TorchRuntime(model, place, precision, sizes, compiled=runtime == "torch-compile", tf32=tf32)
