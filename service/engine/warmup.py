"""From a folder to a warm engine: load it, build the runtime, time its steps, measure batch invariance."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
import torch

from model import checkpoint, self_test
from model.chain import Chain, Image
from model.checkpoint import Checkpoint
from model.class_names import distinct
from model.condition import assemble
from model.denoiser import Denoiser
from model.runtimes import (
    DtypeName,
    Runtime,
    RuntimeName,
    check_available,
    count_devices,
    keep_torch_off,
    load_runtime,
)
from model.samplers import Guidance, build_plan
from model.scheduler_config import DEFAULT_CLASS, nearest_sampler
from model.state import Row
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.messages import EngineConfig, EngineInfo, Invariance, ModelInfo, SelfTestResult
from service.engine.scheduler import Policy, Scheduler

logger = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
ROWS_PER_CORE = 4
"""Beyond these a CPU's rows per second have not been seen to grow; a GPU's go on for longer."""
TIMING_S = 0.4
"""How long batch sizes are timed, after the first time."""
COMPILED_ROWS = 8
"""The one batch size of torch-compile, where none is set: each takes a minute to compile."""


@dataclass(frozen=True)
class Warm:
    """A warm engine and what is known about it. devices: of its kind on this machine."""

    engine: Engine
    info: EngineInfo
    model: ModelInfo
    devices: int = 1


def load(config: EngineConfig) -> Checkpoint:
    """Load a folder.

    Raises CheckpointError for a folder that cannot be used, RuntimeUnavailableError for what the machine
    cannot do.
    """
    check_available(config.runtime, config.device, config.dtype)
    return checkpoint.load(Path(config.model), sample_size=config.sample_size)


def model_info(model: Checkpoint) -> ModelInfo:
    """What the API has to know of a checkpoint."""
    config = model.unet.config
    return ModelInfo(
        name=model.name,
        schedule=model.schedule,
        shape=model.shape,
        class_names=distinct(model.class_names),
        conditional=config.conditional,
        guided=model.null_class is not None,
        classified=model.classifier is not None,
        typicality=model.typicality,
        condition=model.condition,
        parameters=sum(parameter.numel() for parameter in model.unet.parameters()),
        sampler=nearest_sampler(model.scheduler_config),
        lowest_timestep=config.lowest_timestep,
        checksum=model.checksum,
    )


def warm_up(model: Checkpoint, settings: EngineConfig) -> Warm:
    """Build, time and check. Raises RuntimeUnavailableError when the machine cannot do what is asked for."""
    # Not padded to one shape yet: the times of small batches decide how large a batch pays.
    runtime = load_runtime(
        model,
        cast("RuntimeName", settings.runtime),
        settings.device,
        cast("DtypeName", settings.dtype),
        batch_invariant=False,
        tf32=not settings.batch_invariant,  # who asks for the same bits anywhere does not want fewer of them
    )
    keep_torch_off(runtime)
    denoiser = Denoiser.of(model, runtime)
    sizes: Sequence[int] = cpu_batch_sizes() if runtime.device.type == "cpu" else BATCH_SIZES
    if settings.runtime == "torch-compile":
        sizes = (settings.max_batch or COMPILED_ROWS,)
    elif settings.max_batch:
        sizes = sorted({size for size in sizes if size < settings.max_batch} | {settings.max_batch})
    steps = min(4, model.schedule.timesteps)
    plan = build_plan(model.schedule, "ddim", steps)
    label = 0 if denoiser.conditional else None
    condition = None
    if model.condition:
        condition = assemble(model.condition, np.zeros(model.shape, np.float32))
    chains = [Chain(plan, seed, label, condition=condition) for seed in range(max(sizes))]

    denoiser.reserve(settings.slots)  # first, since recorded steps are recorded anew for more slots
    runtime.prepare(sizes)
    runtime.batch_sizes = _recorded(runtime, sizes)
    points = _time_batch_sizes(denoiser, chains, sizes)
    if settings.max_batch > points[-1][0]:
        points.append((settings.max_batch, _time_step(denoiser, chains)))
    max_batch_size = settings.max_batch or StepTimes(points).knee()
    if runtime.name != "openvino":
        runtime.batch_sizes = _shapes(runtime, sizes, max_batch_size, invariant=settings.batch_invariant)
        if runtime.batch_sizes:
            points = [(rows, _time_step(denoiser, chains[:rows])) for rows in runtime.batch_sizes]
    if denoiser.classifier is not None:  # what it adds to a result is tried too
        guided = build_plan(model.schedule, "ddim", steps, guidance=Guidance(classifier_scale=1.0))
        chains = [replace(chain, plan=guided) for chain in chains]
    invariance = measure_invariance(denoiser, chains[: max(2, max_batch_size)], max_batch_size)
    info = model_info(model)
    logger.info(
        "%s: the sampler is %s where a request names none",
        model.scheduler_config.get("_class_name", DEFAULT_CLASS), info.sampler,
    )  # fmt: skip
    logger.info(
        "%s %s on %s: %d rows per step, %.0f rows/s, results %s of batch neighbours",
        runtime.name, runtime.dtype, runtime.device, max_batch_size,
        max_batch_size / dict(points)[max_batch_size],
        "independent" if invariance.holds else f"within {invariance.max_abs_difference:.1e}",
    )  # fmt: skip

    # Where a result depends on the one shape that all calls have, that is left as it is.
    shapes = runtime.batch_sizes
    widest = max_batch_size if settings.max_batch or len(shapes) == 1 else max(sizes)
    if len(shapes) > 1:
        shapes = tuple(sizes)

    def on_batch_limit(size: int) -> None:
        if shapes:  # or a smaller batch would be padded to what did not fit
            runtime.batch_sizes = (*(each for each in shapes if each < size), size)

    scheduler = Scheduler(max_batch_size, StepTimes(points), cast("Policy", settings.policy))
    engine = Engine(denoiser, scheduler, on_batch_limit, widest)
    engine_info = EngineInfo(
        model.name,
        runtime.name,
        str(runtime.device),
        runtime.dtype,
        max_batch_size,
        tuple(points),
        invariance,
        run_self_test(model, runtime),
    )
    return Warm(engine, engine_info, info, count_devices(runtime.device))


def run_self_test(model: Checkpoint, runtime: Runtime) -> SelfTestResult | None:
    """Compare one evaluation with the model's known result; None where it has none."""
    test = model.self_test
    if test is None:
        return None
    found = test.evaluate(runtime.forward, model.unet.config.shape, runtime.device)
    result = SelfTestResult(test.difference(found), test.tolerances.get(runtime.dtype, math.inf))
    if not result.passed:
        logger.error(
            "the self-test has failed: the network's output differs by %.3g standard deviations from that in"
            " %s, where %.3g are allowed in %s: the device, its driver or the weights are at fault",
            result.difference, self_test.FILE, result.tolerance, runtime.dtype,
        )  # fmt: skip
    return result


def cpu_batch_sizes() -> tuple[int, ...]:
    """Batch sizes that are worth a try on this machine's processor."""
    most = max(8, ROWS_PER_CORE * (os.cpu_count() or 1))
    return tuple(size for size in BATCH_SIZES if size <= most)


def _recorded(runtime: Runtime, sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes whose steps are recorded: all, where the runtime records any."""
    return tuple(sizes) if runtime.recorder is not None else ()


def _shapes(
    runtime: Runtime, sizes: Sequence[int], max_batch_size: int, *, invariant: bool
) -> tuple[int, ...]:
    """What torch's batches are padded to.

    Torch gives a row the same bits only at the same shape, so every call gets the largest one. Where that is
    not asked for, CUDA still gets a few shapes, which can be recorded.
    """
    if invariant or runtime.name == "torch-compile":
        return (max_batch_size,)
    return _recorded(runtime, [*(size for size in sizes if size < max_batch_size), max_batch_size])


def _time_batch_sizes(
    denoiser: Denoiser, chains: Sequence[Chain], sizes: Sequence[int]
) -> list[tuple[int, float]]:
    """(batch size, seconds) of ever larger steps, until two sizes in a row bring no more rows per second.

    Then all of them again and again, in turn: the least of each counts, so that a disturbance at start-up
    does not decide how large the batches are. A size that takes more memory than there is ends them too.
    """
    times: dict[int, float] = {}
    best, without_gain, out_of_memory = 0.0, 0, False
    for size in sizes:
        try:
            times[size] = _time_step(denoiser, chains[:size])
        except RuntimeError as error:
            if not times or not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            out_of_memory = True
        if out_of_memory:  # here, where nothing holds the failed call's tensors any more
            torch.cuda.empty_cache()
            denoiser.recover()
            break
        rate = size / times[size]
        without_gain = 0 if rate > best * 1.05 else without_gain + 1
        best = max(best, rate)
        if without_gain == 2:
            break
    begun = perf_counter()
    while perf_counter() - begun < TIMING_S:
        for size in times:
            times[size] = min(times[size], _time_step(denoiser, chains[:size], repeats=0))
    return list(times.items())


def _time_step(denoiser: Denoiser, chains: Sequence[Chain], repeats: int = 2) -> float:
    """Seconds of a step of these chains, a preview of each included.

    The best of `repeats` after a first, which counts if it is alone. Raises RuntimeError when it fails.
    """
    times: list[float] = []
    for step in range(min(1 + repeats, len(chains[0].plan))):
        begun = perf_counter()
        try:
            denoiser.launch([Row(chain, i, step, pictures=("x0",)) for i, chain in enumerate(chains)]).read()
        except Exception as error:
            raise RuntimeError(f"the network fails on {len(chains)} rows") from error
        times.append(perf_counter() - begun)
    return min(times[1:] or times)


def measure_invariance(denoiser: Denoiser, chains: Sequence[Chain], max_batch_size: int) -> Invariance:
    """Run the first step of the first chain alone and among others, first and last, and compare the bits."""

    def first_among(count: int, place: int) -> Image:
        order = [*range(1, count)]
        order.insert(place, 0)
        rows = [Row(chains[i], i, 0, arrays=("xt",) if i == 0 else ()) for i in order]
        return denoiser.launch(rows).read()[place].arrays["xt"]

    alone = first_among(1, 0)
    sizes = sorted(
        {size for size in (2, 3, max_batch_size // 2, max_batch_size) if 2 <= size <= max_batch_size}
    )
    worst = 0.0
    for size in sizes:
        for place in (0, size - 1):
            difference = np.abs(first_among(size, place) - alone).max()
            worst = float(np.maximum(worst, difference))
    return Invariance(tuple(sizes), worst)
