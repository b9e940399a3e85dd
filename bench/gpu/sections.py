"""The sections of `bench.gpu`: functions that yield (name, figure) as they go, and how long each may take.

Names are paths, such as "tf32/recorded/64". What was yielded before a section fails or is stopped is kept.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from bench.gpu.checks import TESTS_S, bits, gpu_tests, service
from bench.gpu.loops import diffusers, engine, http
from bench.gpu.networks import compiled, rates
from bench.gpu.scale import Figures, Scale


def machine(scale: Scale) -> Figures:
    """What it ran on."""
    yield "torch", torch.__version__
    yield "python", sys.version.split()[0]
    with suppress(ImportError):
        from bench.machine import describe  # psutil

        yield "host", describe()
    if scale.simulated:
        yield "card", "none: simulated"
        return
    yield "card", torch.cuda.get_device_name()
    yield "memory_gib", round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    yield "cuda", torch.version.cuda
    yield "cudnn", torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    with suppress(OSError):  # nvidia-smi is not always there
        yield "driver", Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    with suppress(OSError, subprocess.SubprocessError):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
        yield "driver", done.stdout.strip()
    with suppress(ImportError):
        import triton

        yield "triton", triton.__version__


SECTIONS: dict[str, tuple[Callable[[Scale], Figures], float]] = {
    "machine": (machine, 40.0),
    "bits": (bits, 60.0),
    "rates, ours": (partial(rates, name="ours"), 75.0),
    "service": (service, 90.0),
    "engine": (engine, 75.0),
    "rates, cifar10-32": (partial(rates, name="cifar10-32"), 75.0),
    "tests": (gpu_tests, TESTS_S + 10),
    "http": (http, 100.0),
    "diffusers": (diffusers, 60.0),
    "rates, celebahq-256": (partial(rates, name="celebahq-256"), 90.0),
    "compiled": (compiled, 90.0),
}
"""In order of what would be missed most, with the seconds that each may take."""
