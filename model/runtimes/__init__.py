"""Runtimes: how the network is run, behind one call.

`forward(x, t, y)` takes and returns float32 torch tensors on `device`. `batch_sizes` lists the batch shapes a
runtime runs: () is any; otherwise a call is padded up to the next one, because torch gives a row the same
bits only at the same shape. Steps run on the runtime's `queue`. TorchRuntime runs on any device, eager or
compiled; OpenVinoRuntime on a CPU.
"""

from model.runtimes.base import (
    TORCH_DTYPES,
    DtypeName,
    Recorder,
    Runtime,
    RuntimeName,
    RuntimeUnavailableError,
)
from model.runtimes.load import check_available, choose_device, count_devices, keep_torch_off, load_runtime
from model.runtimes.openvino import OpenVinoRuntime
from model.runtimes.queues import Pending, Queue, SkippedError, ThreadQueue, to_device
from model.runtimes.recorded import Recorded
from model.runtimes.torch import TorchRuntime

__all__ = [
    "TORCH_DTYPES",
    "DtypeName",
    "OpenVinoRuntime",
    "Pending",
    "Queue",
    "Recorded",
    "Recorder",
    "Runtime",
    "RuntimeName",
    "RuntimeUnavailableError",
    "SkippedError",
    "ThreadQueue",
    "TorchRuntime",
    "check_available",
    "choose_device",
    "count_devices",
    "keep_torch_off",
    "load_runtime",
    "to_device",
]
