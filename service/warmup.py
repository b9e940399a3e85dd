"""From a loaded checkpoint to a warm engine: build the runtime, time its steps, measure its invariance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from model.checkpoint import Checkpoint
from model.denoiser import Chain, Denoiser, Latent
from model.runtimes import Runtime, keep_torch_off, load_runtime
from model.samplers import Guidance, build_plan
from service.engine import Engine
from service.jobs import Job, State
from service.scheduler import Scheduler, StepTimes
from service.settings import Settings

logger = logging.getLogger(__name__)

# A CPU's rows per second stop growing at a few rows; a GPU's go on for longer.
CPU_WIDTHS = (1, 2, 4, 8, 16)
GPU_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
TIMING_S = 0.4
"""How long widths are timed, after the first time."""
COMPILED_ROWS = 8
"""The one width of torch-compile, where none is set: every width takes a minute to compile."""


@dataclass(frozen=True)
class Invariance:
    """What batch mates did to a result when it was tried: largest difference over the batch sizes."""

    batch_sizes: tuple[int, ...]
    max_abs_difference: float

    @property
    def holds(self) -> bool:
        """Whether every result was the same to the last bit."""
        return self.max_abs_difference == 0.0


@dataclass(frozen=True)
class Warm:
    """A warm engine and what was found out on the way. step_times: (rows, seconds)."""

    engine: Engine
    runtime: str
    device: str
    dtype: str
    step_times: tuple[tuple[int, float], ...]
    invariance: Invariance


def warm_up(model: Checkpoint, settings: Settings) -> Warm:
    """Build, time and check. Raises RuntimeUnavailableError when the machine cannot do what is asked for."""
    # Not padded yet: the times of narrow steps decide how wide a batch is worth it.
    runtime = load_runtime(model, settings.runtime, settings.device, settings.dtype, batch_invariant=False)
    keep_torch_off(runtime)
    denoiser = Denoiser.of(model, runtime)
    widths: Sequence[int] = CPU_WIDTHS if runtime.device.type == "cpu" else GPU_WIDTHS
    if settings.runtime == "torch-compile":
        widths = (settings.max_batch or COMPILED_ROWS,)
    elif settings.max_batch:
        widths = sorted({width for width in widths if width < settings.max_batch} | {settings.max_batch})
    steps = min(4, model.schedule.timesteps)
    plan = build_plan(model.schedule, "ddim", steps)
    label = 0 if denoiser.conditional else None
    chains = [Chain(plan, seed, label) for seed in range(max(widths))]

    runtime.prepare(widths)
    points = _time_widths(denoiser, chains, widths)
    if settings.max_batch > points[-1][0]:
        points.append((settings.max_batch, _time_step(denoiser, chains)))
    max_rows = settings.max_batch or StepTimes(points).knee()
    if runtime.name != "openvino":
        runtime.batch_sizes = _shapes(runtime, widths, max_rows, invariant=settings.batch_invariant)
        if runtime.batch_sizes:
            points = [(rows, _time_step(denoiser, chains[:rows])) for rows in runtime.batch_sizes]
    if denoiser.classifier is not None:  # what it adds to a result is to be tried too
        led = build_plan(model.schedule, "ddim", steps, guidance=Guidance(classifier_scale=1.0))
        chains = [Chain(led, chain.seed, label) for chain in chains]
    invariance = measure_invariance(denoiser, chains[: max(2, max_rows)], max_rows)
    logger.info(
        "%s %s on %s: %d rows per step, %.0f rows/s, results %s of batch mates",
        runtime.name, runtime.dtype, runtime.device, max_rows, max_rows / dict(points)[max_rows],
        "independent" if invariance.holds else f"within {invariance.max_abs_difference:.1e}",
    )  # fmt: skip

    def narrow(rows: int) -> None:
        if runtime.batch_sizes:  # or a narrower batch would be padded to what did not fit
            runtime.batch_sizes = (rows,)

    engine = Engine(denoiser, Scheduler(max_rows, StepTimes(points), settings.policy), narrow)
    return Warm(engine, runtime.name, str(runtime.device), runtime.dtype, tuple(points), invariance)


def _shapes(runtime: Runtime, widths: Sequence[int], max_rows: int, *, invariant: bool) -> tuple[int, ...]:
    """What torch's batches are padded to.

    Torch gives a row the same bits only at the same shape, so every call gets the widest one. Where that is
    not asked for, CUDA still gets a few shapes, which can be recorded.
    """
    if invariant or runtime.name == "torch-compile":
        return (max_rows,)
    if runtime.device.type == "cuda":
        return (*(width for width in widths if width < max_rows), max_rows)
    return ()


def _time_widths(
    denoiser: Denoiser, chains: Sequence[Chain], widths: Sequence[int]
) -> list[tuple[int, float]]:
    """(rows, seconds) of ever wider steps, until two widths in a row bring no more rows per second.

    Then all of them again and again, in turn: the least of each counts, so that what disturbs a start
    for a moment does not decide how wide its batches are.
    """
    times: dict[int, float] = {}
    best, in_vain = 0.0, 0
    for width in widths:
        times[width] = _time_step(denoiser, chains[:width])
        rate = width / times[width]
        in_vain = 0 if rate > best * 1.05 else in_vain + 1
        best = max(best, rate)
        if in_vain == 2:
            break
    begun = perf_counter()
    while perf_counter() - begun < TIMING_S:
        for width in times:
            times[width] = min(times[width], _time_step(denoiser, chains[:width], repeats=0))
    return list(times.items())


def _time_step(denoiser: Denoiser, chains: Sequence[Chain], repeats: int = 2) -> float:
    """Seconds of an engine's step of these chains, a look at each of them included.

    The best of `repeats` after a first, which counts if it is alone. Raises RuntimeError when it fails.
    """
    engine = Engine(denoiser, Scheduler(sum(chain.plan.rows[0] for chain in chains), StepTimes([(1, 1.0)])))
    job = Job("warm-up", "ddim", preview="x0")
    for chain in chains:
        job.add(chain)
    engine.scheduler.add(job, 0.0)
    times: list[float] = []
    while len(times) <= repeats and not job.over:
        begun = perf_counter()
        engine.step()
        times.append(perf_counter() - begun)
    if job.state is State.FAILED:
        raise RuntimeError(f"the network fails on {len(chains)} rows")
    return min(times[1:] or times)


def measure_invariance(denoiser: Denoiser, chains: Sequence[Chain], max_rows: int) -> Invariance:
    """Run the first chain's first row alone and amid others, first and last, and compare bit for bit."""
    latents = [denoiser.start(chain) for chain in chains]

    def first_amid(count: int, place: int) -> Latent:
        order = [*range(1, count)]
        order.insert(place, 0)
        stepped = denoiser.step([chains[i] for i in order], [latents[i] for i in order], [0] * count)
        return stepped[place]

    alone = first_amid(1, 0).x
    sizes = sorted({size for size in (2, 3, max_rows // 2, max_rows) if 2 <= size <= max_rows})
    worst = 0.0
    for size in sizes:
        for place in (0, size - 1):
            difference = (first_amid(size, place).x - alone).abs().max().item()
            worst = float(np.maximum(worst, difference))
    return Invariance(tuple(sizes), worst)
