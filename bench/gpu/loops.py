"""Rates of what surrounds the network: the loop, the service, and diffusers beside both."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.networks import call, per_call
from bench.gpu.scale import PRECISIONS, SHIPPED, Figures, Network, Scale
from bench.gpu.served import served
from bench.http import saturate
from model.chain import Chain
from model.denoiser import Denoiser, generate
from model.runtimes import TorchRuntime
from model.samplers import build_plan

SAMPLERS = {"dpmpp_2m": 20, "ddpm": 50}
"""With their numbers of steps."""


def engine(scale: Scale) -> Figures:
    """`Denoiser.launch` and `Engine.step` over the network as the service warms it up, and it alone."""
    from bench.simulated import build, denoiser_rate, engine_rate, model_of
    from service.engine.messages import EngineConfig
    from service.engine.warmup import warm_up

    kinds: dict[str, dict[str, Any]] = {
        "by default": {},
        "not invariant": {"batch_invariant": False},
        "256 rows": {"max_batch": 256},
        "bfloat16, 256 rows": {"max_batch": 256, "dtype": "bfloat16"},
    }
    seconds = 10 * scale.seconds
    for kind, options in kinds.items():
        config = EngineConfig(str(SHIPPED), scale.device, "torch", slots=512, **options)
        begun = time.perf_counter()
        if scale.simulated:
            engine = build(model_of(8), 4, 0.004, config).engine
        else:
            warm = warm_up(scale.model("ours"), config)
            engine = warm.engine
            yield f"{kind}/step times", warm.info.step_times
            yield f"{kind}/invariance", warm.info.invariance.max_abs_difference
        rows = engine.scheduler.max_batch_size
        yield f"{kind}/seconds to warm up", time.perf_counter() - begun
        yield f"{kind}/rows", rows
        denoiser = engine.denoiser
        if isinstance(denoiser, Denoiser) and isinstance(runtime := denoiser.runtime, TorchRuntime):
            action = call(runtime, scale.model("ours"), rows, scale, recorded=True)
            yield f"{kind}/network", rows / per_call(action, scale)
            del action
        for sampler, steps in SAMPLERS.items():
            yield f"{kind}/denoiser/{sampler}", denoiser_rate(engine, sampler, steps, seconds)
            yield f"{kind}/engine/{sampler}", engine_rate(engine, sampler, steps, "none", seconds)
            yield f"{kind}/engine, previews/{sampler}", engine_rate(engine, sampler, steps, "x0", seconds)
        scale.free()
        if scale.simulated:
            return


def http(scale: Scale) -> Figures:
    """Rows per second of the service, kept busy by clients that want JSON, or that stream."""
    kinds = {"by default": {}, "256 rows": {"max_batch": 256}} if not scale.simulated else {"by default": {}}
    for kind, settings in kinds.items():
        with served(scale, **settings) as (url, _):
            for layer, accept in (("json", "application/json"), ("streams", "text/event-stream")):
                for sampler, steps in SAMPLERS.items():
                    body = {"sampler": sampler, "num_inference_steps": steps}
                    rate = saturate(url, accept, body, scale.http_s, scale.clients * (4 if settings else 1))
                    yield f"{kind}/{layer}/{sampler}", rate
                    if scale.simulated:
                        break


def diffusers(scale: Scale) -> Figures:
    """Images per second of a batch from noise to the end: UNet2DModel in diffusers' loop, and ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import DDIMScheduler, UNet2DModel

    names: tuple[Network, ...] = ("ours", "cifar10-32")
    for name in names[: 1 if scale.simulated else 2]:
        model = scale.model(name)
        unet: Any = UNet2DModel.from_config(model.unet.config.to_diffusers())
        unet.load_state_dict(model.unet.state_dict())
        unet.to(scale.device).eval()
        scheduler: Any = DDIMScheduler.from_config(dict(model.scheduler_config))
        scheduler.set_timesteps(scale.steps, device=scale.device)
        # As torch has it: its convolutions may round to TF32, its matrix products may not.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        labelled = model.unet.config.conditional
        for count in scale.images:
            yield (
                f"{name}/diffusers/{count}",
                count / per_call(partial(_pipeline, unet, scheduler, count), scale),
            )
        plan = build_plan(model.schedule, "ddim", scale.steps)
        for precision in scale.precisions:
            dtype, tf32 = PRECISIONS[precision]
            for count in scale.images:
                sizes = (count,)  # as the service has it: one shape, recorded
                denoiser = Denoiser.of(model, TorchRuntime(model, scale.device, dtype, sizes, tf32=tf32))
                chains = [Chain(plan, seed, 0 if labelled else None) for seed in range(count)]
                yield (
                    f"{name}/ours, {precision}/{count}",
                    count / per_call(partial(_generated, denoiser, chains), scale),
                )


def _generated(denoiser: Denoiser, chains: Sequence[Chain]) -> torch.Tensor:
    return generate(denoiser, chains).cpu()


@torch.no_grad()
def _pipeline(unet: Any, scheduler: Any, count: int) -> torch.Tensor:
    """The loop of diffusers' documentation."""
    config = unet.config
    x = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, device=unet.device)
    classes = config.num_class_embeds
    labels = None if classes is None else torch.zeros(count, dtype=torch.int64, device=unet.device)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    return x.cpu()
