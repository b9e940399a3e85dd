"""`python -m tests.golden.shipped`: write shipped.json, the pictures of the included models on this machine.

Two pictures for each model, runtime and dtype. Processors round differently, so other machines only have to
come near the pixels; the sha256 of the pictures has to be the same where the machine is of the same kind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import OpenVinoRuntime, TorchRuntime
from model.samplers import build_plan

FILE = Path(__file__).with_name("shipped.json")
WEIGHTS = Path(__file__).parents[2] / "weights"
MODELS = ("avatars", "avatars-4", "fashion-mnist", "fashion-mnist-4")
RUNTIMES = {"torch": TorchRuntime, "openvino": OpenVinoRuntime}
DTYPES = ("float32", "bfloat16")
NAMES = [f"{model} {runtime} {dtype}" for model in MODELS for runtime in RUNTIMES for dtype in DTYPES]
IMAGES, STEPS = 2, 8
Pixels = NDArray[np.uint8]


def kind_of_machine() -> str:
    """What decides how results are rounded: the processor's instructions, and the libraries that use them.

    bfloat16 is multiplied by AMX, by AVX-512, or as float32, which round differently.
    """
    libraries = [f"{name} {version(name)}" for name in ("torch", "openvino", "numpy")]
    has = torch.cpu.get_capabilities()
    bfloat16 = [name for name in ("avx512_bf16", "amx_bf16") if has.get(name)]
    return ", ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *bfloat16, *libraries])


def pictures(model: Checkpoint, runtime: str, dtype: Any) -> Pixels:
    """[IMAGES, C, H, W], of seeds and classes from 0, in 8 steps of the sampler that makes no noise.

    Of a distilled model in as many as it takes.
    """
    plan = build_plan(model.schedule, "ddim", min(STEPS, model.schedule.timesteps))
    conditional = model.unet.config.conditional
    chains = [Chain(plan, seed, seed if conditional else None) for seed in range(IMAGES)]
    made = RUNTIMES[runtime](model, dtype=dtype)
    denoiser = Denoiser.of(model, made)
    denoiser.reserve(IMAGES)
    return to_pixels(generate(denoiser, chains), model.schedule.data_range)


def record_of(pixels: Pixels) -> dict[str, Any]:
    """What is kept of pictures."""
    data = pixels.tobytes()
    text = base64.b64encode(data).decode()
    return {"shape": list(pixels.shape), "sha256": hashlib.sha256(data).hexdigest(), "pixels": text}


def pixels_of(record: dict[str, Any]) -> Pixels:
    """The pictures again."""
    return np.frombuffer(base64.b64decode(record["pixels"]), np.uint8).reshape(record["shape"])


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in NAMES:
        model, runtime, dtype = name.split()
        found[name] = record_of(pictures(checkpoint.load(WEIGHTS / model), runtime, dtype))
    FILE.write_text(json.dumps({"machine": kind_of_machine(), "pictures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
