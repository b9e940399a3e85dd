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
from model.denoiser import Latent
from model.encoder import EncoderConfig, NoiseClassifier
from model.samplers import ROW, Guidance, Plan, build_plan
from model.schedule import NoiseSchedule, linear_betas
from model.unet import UNet, UNetConfig
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import EngineInfo, Invariance
from service.engine.scheduler import Scheduler
from service.engine.warmup import Warm
from service.settings import Settings

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
    preview_every: int = 1,
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
    """Computes each sample by itself, so that batch neighbours change nothing.

    raises, gives_nan: seeds whose samples do so in every step. rows_that_fit: a larger call runs out of
    memory. carried: what chains were started with, by seed.
    """

    gate: Gate = field(default_factory=Gate)
    raises: dict[int, type[Exception]] = field(default_factory=dict)
    gives_nan: set[int] = field(default_factory=set)
    rows_that_fit: float = math.inf
    widths: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    seen: dict[tuple[int, int], bytes] = field(default_factory=dict)
    carried: dict[int, Sequence[Image]] = field(default_factory=dict)

    def start(self, chain: Chain, carried: Sequence[Image] = ()) -> Latent:
        self.starts.append(chain.seed)
        if carried:
            self.carried[chain.seed] = carried
        x = torch.from_numpy(noise.normal(chain.seed, noise.START, (1, SIZE, SIZE)))
        return Latent(x, torch.zeros_like(x))

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[Latent]:
        self.gate.come_through()
        width = sum(chain.plan.evaluations[step] for chain, step in zip(chains, steps, strict=True))
        self.widths.append(width)
        if width > self.rows_that_fit:
            raise torch.OutOfMemoryError(f"{width} rows do not fit")
        for chain in chains:
            if chain.seed in self.raises:
                raise self.raises[chain.seed](f"seed {chain.seed}")
        return [self._one(*each) for each in zip(chains, latents, steps, strict=True)]

    def measure(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[tuple[float, float]]:
        """The step, and how far the x₀ prediction is from grey."""
        return [
            (float(step), float(latent.x0.square().mean()))
            for latent, step in zip(latents, steps, strict=True)
        ]

    def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
        x = 0.9 * latent.x + 0.1 * torch.from_numpy(noise.normal(chain.seed, step, (1, SIZE, SIZE)))
        if chain.seed in self.gives_nan:
            x[0, 0, 0] = float("nan")
        self.seen[chain.seed, step] = x.numpy().tobytes()
        return Latent(x, x.clamp(-1, 1))


# ── A model and an app ─────────────────────────────────────────────────────────────────────────


def tiny_model(guided: bool = True, classes: int = 3, learned: bool = False) -> Checkpoint:
    """A network of a few random weights: three classes and a null class, 8×8 pixels.

    learned: it predicts its variance.
    """
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1 + learned,
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
    classifier = NoiseClassifier(EncoderConfig(SIZE, 1, 3, (8, 16), norm_num_groups=4))
    return classifier.eval().requires_grad_(False)


def fake_engine(denoiser: FakeDenoiser, max_batch_size: int = 8) -> Engine:
    times = StepTimes([(1, 0.001), (max_batch_size, 0.002)])
    return Engine(denoiser, Scheduler(max_batch_size, times))


def fake_info(max_batch_size: int = 8) -> EngineInfo:
    times = ((1, 0.001), (max_batch_size, 0.002))
    return EngineInfo("tiny", "fake", "cpu", "float32", max_batch_size, times, Invariance((2,), 0.0))


def fake_warm(denoiser: FakeDenoiser, max_batch_size: int = 8) -> Callable[[Checkpoint, Settings], Warm]:
    """A `warm` for create_app that has nothing to load."""

    def warm(_model: Checkpoint, _settings: Settings) -> Warm:
        return Warm(fake_engine(denoiser, max_batch_size), fake_info(max_batch_size))

    return warm
