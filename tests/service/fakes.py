"""Stand-ins for the network: chains that only count, and a denoiser that waits at a gate."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from model import noise
from model.chain import Chain, Image
from model.checkpoint import Checkpoint
from model.denoiser import Latent, Stepped, render
from model.encoder import EncoderConfig, NoiseClassifier
from model.runtimes import SkippedError
from model.samplers import ROW, Guidance, Plan, build_plan
from model.schedule import NoiseSchedule, linear_betas
from model.state import Row
from model.unet import UNet, UNetConfig
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import EngineConfig, EngineInfo, Invariance, ModelInfo
from service.engine.scheduler import Scheduler
from service.engine.warmup import Warm, model_info

PATIENCE_S = 60.0
"""How long a test waits for something that should happen at once, before it fails."""
EVERYWHERE: dict[str, Any] = {"guidance_sigma_min": 0.0, "guidance_sigma_max": None}
"""Of a request: guidance at every noise level, not at the default ones alone."""

SIZE = 8
SCHEDULE = NoiseSchedule(linear_betas(100), timestep_spacing="trailing")


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Look again and again until it holds. Fails after PATIENCE_S."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not come about in {PATIENCE_S:.0f} s"
        time.sleep(0.002)


# ── Jobs for the scheduler, which only looks at lengths and costs ──────────────────────────────


@cache
def plan_of(steps: int, evaluations: int = 1) -> Plan:
    """A plan of so many steps, each of which costs 1 or 2 network evaluations; it computes nothing."""
    table = np.zeros(steps, ROW)
    table["t"] = np.arange(steps)[::-1]
    table["w"] = evaluations
    return Plan(table)


def counting_stage(n: int = 1, steps: int = 10, evaluations: int = 1) -> Stage:
    return Stage("denoise", tuple(Chain(plan_of(steps, evaluations), i) for i in range(n)))


def counting_job(
    job_id: str,
    n: int = 1,
    steps: int = 10,
    evaluations: int = 1,
    deadline: float | None = None,
    preview: PreviewKind = "none",
    preview_every: int | None = 1,
) -> JobSpec:
    """A job for the scheduler alone."""
    stages = (counting_stage(n, steps, evaluations),)
    return JobSpec(job_id, "ddim", stages, deadline, preview=preview, preview_every=preview_every)


# ── Jobs for the engine ────────────────────────────────────────────────────────────────────────


def job_of(
    job_id: str,
    seeds: Sequence[int],
    steps: int = 5,
    guidance_scale: float = 1.0,
    preview: PreviewKind = "none",
    deadline: float | None = None,
) -> JobSpec:
    """A job that the engine can run."""
    label = None if guidance_scale == 1.0 else 0
    plan = build_plan(SCHEDULE, "ddim", steps, guidance=Guidance(guidance_scale))
    stage = Stage("denoise", tuple(Chain(plan, seed, label) for seed in seeds))
    return JobSpec(job_id, "ddim", (stage,), deadline, created=time.monotonic(), preview=preview)


class Gate:
    """What the fake denoiser waits at before every step: open, or shut except for a number of steps."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed = math.inf
        self.arrived = 0

    def shut(self) -> None:
        with self._changed:
            self._allowed = 0

    def open(self) -> None:
        self.allow(math.inf)

    def allow(self, steps: float = 1) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    def come_through(self) -> None:
        with self._changed:
            self.arrived += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed > 0, PATIENCE_S), "nobody opened the gate"
            self._allowed -= 1

    def wait_for_arrival(self, number: int) -> None:
        """Until the worker stands before its `number`-th step, counted from 1."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.arrived >= number, PATIENCE_S), "the step never came"


@dataclass
class FakeDenoiser:
    """Computes each sample by itself, so that batch neighbours change nothing; and only when it is read.

    raises, gives_nan: seeds whose samples do so in every step. rows_that_fit: a larger call runs out of
    memory. lost: what it raises from now on, whatever it is given. probed: how often it was called for no
    sample. seen: every x, by seed and step. carried: what chains were started with, by seed.
    """

    gate: Gate = field(default_factory=Gate)
    raises: dict[int, type[Exception]] = field(default_factory=dict)
    gives_nan: set[int] = field(default_factory=set)
    rows_that_fit: float = math.inf
    lost: Exception | None = None
    widths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    seen: dict[tuple[int, int], bytes] = field(default_factory=dict)
    carried: dict[int, Sequence[Image]] = field(default_factory=dict)
    slots: dict[int, Latent] = field(default_factory=dict)
    launched: list[list[Row]] = field(default_factory=list)
    epoch: int = 0
    failed: int = -1
    probed: int = 0

    def launch(self, rows: Sequence[Row]) -> FakeStep:
        self.launched.append(list(rows))
        return FakeStep(self, rows, self.epoch)

    def recover(self) -> None:
        self.epoch += 1

    def probe(self) -> None:
        assert self.epoch != self.failed, "it is still skipping what it is given"
        self.probed += 1
        if self.lost is not None:
            raise self.lost

    def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
        self.starts.append(chain.seed)
        if carried:
            self.carried[chain.seed] = carried
        x = torch.from_numpy(noise.normal(chain.seed, noise.START, (1, SIZE, SIZE)))
        return Latent(x, torch.zeros_like(x))

    def step(self, rows: Sequence[Row]) -> list[Stepped]:
        """What a step does once its turn has come. The slots change last."""
        self.gate.come_through()
        if self.lost is not None:
            raise self.lost
        width = sum(row.chain.plan.evaluations[row.step] for row in rows)
        self.widths.append(width)
        if width > self.rows_that_fit:
            raise torch.OutOfMemoryError(f"{width} rows do not fit")
        for row in rows:
            if row.chain.seed in self.raises:
                raise self.raises[row.chain.seed](f"seed {row.chain.seed}")
        before = [
            self.start(row.chain, row.carried) if row.step == 0 else self.slots[row.slot] for row in rows
        ]
        after = [self._one(row.chain, latent, row.step) for row, latent in zip(rows, before, strict=True)]
        done = [_stepped(*each) for each in zip(rows, before, after, strict=True)]
        self.slots |= {row.slot: latent for row, latent in zip(rows, after, strict=True)}
        return done

    def measure(
        self, chains: Sequence[Chain], steps: Sequence[int], x0_preds: Sequence[Image]
    ) -> Sequence[tuple[float, float]]:
        """The step, and how far the x₀ prediction is from grey."""
        return [(float(step), float(np.square(x0).mean())) for x0, step in zip(x0_preds, steps, strict=True)]

    def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
        x = 0.9 * latent.x + 0.1 * torch.from_numpy(noise.normal(chain.seed, step, (1, SIZE, SIZE)))
        if chain.seed in self.gives_nan:
            x[0, 0, 0] = float("nan")
        self.seen[chain.seed, step] = x.numpy().tobytes()
        return Latent(x, x.clamp(-1, 1))


@dataclass(frozen=True)
class FakeStep:
    denoiser: FakeDenoiser
    rows: Sequence[Row]
    epoch: int

    def read(self) -> list[Stepped]:
        if self.epoch == self.denoiser.failed:
            raise SkippedError
        try:
            return self.denoiser.step(self.rows)
        except BaseException:
            self.denoiser.failed = self.epoch
            raise


def _stepped(row: Row, before: Latent, after: Latent) -> Stepped:
    values = {"x0": after.x0, "xt": after.x, "before": before.x}
    return Stepped(
        bool((after.x + after.x0).isfinite().all()),
        {kind: render(values[kind][None])[0].numpy() for kind in row.pictures},
        {kind: values[kind].numpy() for kind in row.arrays},
    )


# ── A model and an app ─────────────────────────────────────────────────────────────────────────


def tiny_model(
    guided: bool = True,
    classes: int = 3,
    learned: bool = False,
    shape: tuple[int, int, int] = (1, SIZE, SIZE),
) -> Checkpoint:
    """A network of a few random weights: three classes and a null class, 8×8 pixels of grey.

    learned: it predicts its variance. shape: (C, H, W) of a sample.
    """
    channels, *size = shape
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=(size[0], size[1]),
        in_channels=channels,
        out_channels=channels * (1 + learned),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=None,
        num_class_embeds=classes + guided if classes else None,
    )
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 100,
        "timestep_spacing": "trailing",
        "variance_type": "learned_range" if learned else "fixed_small",
    }
    return Checkpoint(
        "tiny",
        UNet(config).eval(),
        NoiseSchedule.from_diffusers(scheduler),
        scheduler,
        ("cat", "dog", "Ankle Boot")[:classes],
        classes if guided and classes else None,
    )


def tiny_classifier() -> NoiseClassifier:
    """A noise-aware classifier for the same images and classes, of a few random weights."""
    torch.manual_seed(1)
    classifier = NoiseClassifier(EncoderConfig((SIZE, SIZE), 1, 3, (8, 16), norm_num_groups=4))
    return classifier.eval().requires_grad_(False)


def fake_engine(denoiser: FakeDenoiser, max_batch_size: int = 8) -> Engine:
    times = StepTimes([(1, 0.001), (max_batch_size, 0.002)])
    return Engine(denoiser, Scheduler(max_batch_size, times))


def fake_info(max_batch_size: int = 8) -> EngineInfo:
    times = ((1, 0.001), (max_batch_size, 0.002))
    return EngineInfo("tiny", "fake", "cpu", "float32", max_batch_size, times, Invariance((2,), 0.0))


@cache
def fake_model() -> ModelInfo:
    return model_info(tiny_model())


def fake_warm(denoiser: FakeDenoiser, max_batch_size: int = 8) -> Callable[[EngineConfig], Warm]:
    """Makes an engine that has nothing to load."""

    def warm(_: EngineConfig) -> Warm:
        return Warm(fake_engine(denoiser, max_batch_size), fake_info(max_batch_size), fake_model())

    return warm
