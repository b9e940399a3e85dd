"""What the peers share: the request, and two implementations of computing a batch of images.

The environment chooses one: BENCH_PIPELINE is `diffusers` (as that library's documentation has it) or `ours`
(this repository's runtime and denoiser, BENCH_RUNTIME and BENCH_DTYPE as in the service's settings);
BENCH_MODEL names the model folder.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel

from model import checkpoint
from model.chain import Chain
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import DtypeName, keep_torch_off, load_runtime
from model.samplers import Guidance, Plan, build_plan

MAX_BATCH = 16
"""Images of a batch, for every peer that batches."""


class Wanted(BaseModel):
    """A request: DDIM, of a class, image i with seed + i. A guidance_scale of 1 is none."""

    n: int = 1
    seed: int = 0
    num_inference_steps: int = 50
    class_label: int = 0
    guidance_scale: float = 1.0

    @property
    def kind(self) -> tuple[int, bool]:
        """(steps, guided): what images must have in common to be computed side by side."""
        return self.num_inference_steps, self.guidance_scale != 1.0

    def each(self) -> list[Wanted]:
        """One request for each of its images."""
        return [self.model_copy(update={"n": 1, "seed": self.seed + i}) for i in range(self.n)]


Pipeline = Callable[[Sequence[Wanted]], list[str]]
"""Computes single images of one kind side by side; each comes back as a base64 PNG."""


class Diffusers:
    """UNet2DModel and DDIMScheduler in the loop of diffusers' documentation, with guidance as it has it.

    Guided steps take the ε of the clipped x₀, as the service does, which is not diffusers' default.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # some frameworks leave their workers only one
        self.unet: Any = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        self.scheduler: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.unet.eval()

    @torch.no_grad()
    def __call__(self, images: Sequence[Wanted]) -> list[str]:
        """Run all timesteps over one batch, two rows for each image where they are guided."""
        config = self.unet.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(each.seed)) for each in images]
        x = torch.cat(noise)
        labels = torch.tensor([each.class_label for each in images])
        no_class = torch.full_like(labels, config.num_class_embeds - 1)
        scale = torch.tensor([each.guidance_scale for each in images]).view(-1, 1, 1, 1)
        steps, guided = images[0].kind
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            if guided:
                both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([no_class, labels])).sample
                unconditional, conditional = both.chunk(2)
                eps = unconditional + scale * (conditional - unconditional)
            else:
                eps = self.unet(x, t, class_labels=labels).sample
            x = self.scheduler.step(eps, t, x, use_clipped_model_output=guided).prev_sample
        pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return [png(image) for image in pixels]


class Ours:
    """This repository's runtime and denoiser, all images side by side to the end."""

    def __init__(self, folder: Path, runtime: str = "auto", dtype: str = "auto") -> None:
        model = checkpoint.load(folder)
        self.schedule = model.schedule
        loaded = load_runtime(
            model, cast("Any", runtime), "cpu", cast("DtypeName", dtype), batch_invariant=False
        )
        keep_torch_off(loaded)  # as the service does
        self.denoiser = Denoiser.of(model, loaded)
        self._plan = lru_cache(self._build)

    def _build(self, steps: int, guidance_scale: float) -> Plan:
        return build_plan(self.schedule, "ddim", steps, guidance=Guidance(guidance_scale))

    def __call__(self, images: Sequence[Wanted]) -> list[str]:
        """Drain a trajectory of the images' chains."""
        chains = [
            Chain(self._plan(each.num_inference_steps, each.guidance_scale), each.seed, each.class_label)
            for each in images
        ]
        return [png(image) for image in to_pixels(generate(self.denoiser, chains))]


def load() -> Pipeline:
    """Load what the environment names. Raises KeyError for a BENCH_PIPELINE that is neither."""
    folder = Path(os.environ.get("BENCH_MODEL", "weights/fashion-mnist"))
    options = os.environ.get("BENCH_RUNTIME", "auto"), os.environ.get("BENCH_DTYPE", "auto")
    makers: dict[str, Callable[[], Pipeline]] = {
        "diffusers": lambda: Diffusers(folder),
        "ours": lambda: Ours(folder, *options),
    }
    return makers[os.environ.get("BENCH_PIPELINE", "diffusers")]()


def in_groups(pipeline: Pipeline, requests: Sequence[Wanted]) -> list[list[str]]:
    """Compute a batch of requests of any kinds: kind by kind, at most MAX_BATCH images at a time.

    What a framework needs that batches requests of any kinds. Returns each request's images.
    """
    answers: list[list[str]] = [[] for _ in requests]
    for kind in dict.fromkeys(request.kind for request in requests):
        places = [i for i, request in enumerate(requests) if request.kind == kind for _ in range(request.n)]
        images = [image for request in requests if request.kind == kind for image in request.each()]
        for start in range(0, len(images), MAX_BATCH):
            done = pipeline(images[start : start + MAX_BATCH])
            for place, image in zip(places[start : start + MAX_BATCH], done, strict=True):
                answers[place].append(image)
    return answers


def png(pixels: NDArray[np.uint8]) -> str:
    """[C, H, W] uint8, C 1 or 3 → a PNG in base64."""
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = BytesIO()
    picture.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
