"""An engine over a simulated device, and what its layers reach in this process.

Apart from `bench.device`, whose API process does without torch, like the service's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import torch

from bench.loop import engine_per_second, steps_per_second
from bench.soak import tiny_model
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser
from model.runtimes.simulated import SimulatedNoise, SimulatedRuntime
from model.samplers import Plan, build_plan
from model.state import Row
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import EngineConfig, EngineInfo, Invariance
from service.engine.scheduler import Scheduler
from service.engine.warmup import Warm, model_info


def model_of(size: int) -> Checkpoint:
    """A model whose network is never run."""
    return replace(tiny_model(size, channels=3), name="simulated")


def build(
    model: Checkpoint, rows: int, step_s: float, config: EngineConfig, *, recorded: bool = True
) -> Warm:
    """An engine over the simulated device in the place of the network. recorded: see SimulatedRuntime."""
    torch.set_num_threads(1)
    runtime = SimulatedRuntime(rows, step_s, recorded=recorded)
    denoiser = Denoiser.of(model, runtime, SimulatedNoise(model.unet.config.shape))
    denoiser.reserve(config.slots)
    plan = build_plan(model.schedule, "ddim", 1)
    denoiser.launch([Row(Chain(plan, 0), 0, 0)]).read()  # compiles the step
    times = ((1, step_s), (rows, step_s))
    engine = Engine(denoiser, Scheduler(rows, StepTimes(times)))
    invariance = Invariance((), 0.0)  # x / 2 cannot depend on other rows
    info = EngineInfo(model.name, runtime.name, "cpu", runtime.dtype, rows, times, invariance)
    return Warm(engine, info, model_info(model))


def denoiser_rate(engine: Engine, sampler: str, steps: int, seconds: float) -> float:
    """Rows per second of full steps, two of them in flight."""
    denoiser, plan = _plan(engine, sampler, steps)
    rows = [Row(Chain(plan, slot), slot, 1) for slot in range(engine.scheduler.max_batch_size)]
    return steps_per_second(denoiser, rows, seconds)


def engine_rate(engine: Engine, sampler: str, steps: int, preview: PreviewKind, seconds: float) -> float:
    """Rows per second of the engine, kept busy by jobs of one image, which have previews as by default."""
    _, plan = _plan(engine, sampler, steps)
    numbers = count()

    def next_job() -> JobSpec:
        number = next(numbers)
        stage = Stage("denoise", (Chain(plan, number),))
        return JobSpec(str(number), sampler, (stage,), preview=preview, preview_every=None)

    return engine_per_second(engine, next_job, engine.scheduler.max_batch_size * 3 // 2, seconds)


def _plan(engine: Engine, sampler: str, steps: int) -> tuple[Denoiser, Plan]:
    denoiser = engine.denoiser
    assert isinstance(denoiser, Denoiser)
    assert denoiser.schedule is not None
    return denoiser, build_plan(denoiser.schedule, sampler, steps)
