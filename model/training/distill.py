"""Distil a teacher: `python -m model.training.distill --teacher FOLDER --data PATH --out FOLDER --steps 4`.

The student needs as many evaluations as it has levels, and no guidance (Salimans & Ho 2022, in one stage
instead of by halving; guidance is folded in as by Meng et al. 2023). It begins as the teacher's network and
learns to do in one step of DDIM what the guided teacher does in several (model/training/segments.py). What
the teacher does is the costly part, so its results are kept in a pool, from which each batch is drawn; a
fraction of the pool is replaced in every step.

FOLDER is a model folder that the service and diffusers load, whose scheduler says how many steps it takes
(model/training/student.py). A stopped run resumes exactly where it was: the pool is part of what is saved. A
student may be a teacher too, of one with fewer steps.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import checkpoint
from model.checkpoint import Checkpoint
from model.runtimes import RuntimeName, RuntimeUnavailableError
from model.samplers import SAMPLERS, Guidance
from model.training import data, loop, student
from model.training.loop import ResumableTrainer, attended, batch_indices, learning_rate
from model.training.segments import Teacher
from model.unet import ConfigError

Objective = Literal["landing", "v"]
LOG = "distill.jsonl"
RECORD_STEPS = 50
FIRST_BATCHES = 8
"""How many the pool holds before the first step."""


@dataclass(frozen=True)
class DistillConfig:
    """How to distil. Times are in seconds.

    timesteps: the teacher's, from the highest, that become the student's levels. substeps: of the teacher
    between two of them. objective: the squared error of v, or of where a step lands. pool: pairs that are
    kept; fresh: how many of them are replaced in each step. label_dropout: the fraction taught without a
    class, and so without guidance, where there is a null class.
    """

    timesteps: tuple[int, ...]
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    label_dropout: float = 0.05
    objective: Objective = "landing"
    sampler: str = "dpmpp_2m"
    substeps: int = 4
    guidance_scale: float = 2.0
    guidance_sigma_min: float = 0.3
    guidance_sigma_max: float = 5.0
    pool: int = 8192
    fresh: int = 32
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    checkpoint_s: float = 240.0
    budget_s: float = math.inf

    @property
    def guidance(self) -> Guidance:
        """Of the teacher."""
        return Guidance(self.guidance_scale, (self.guidance_sigma_min, self.guidance_sigma_max))


class Pool(nn.Module):
    """Pairs to learn from, in a ring: the latest replace the oldest.

    A module for its buffers, which are saved. x, target: [P, C, H, W] float16, since they are many; level,
    label: [P] int64; written: how many there have ever been.
    """

    x: Tensor
    target: Tensor
    level: Tensor
    label: Tensor
    written: Tensor

    def __init__(self, size: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        for name in ("x", "target"):
            self.register_buffer(name, torch.zeros(size, *shape, dtype=torch.float16))
        for name in ("level", "label"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.written), len(self.level))

    def add(self, x: Tensor, target: Tensor, level: int, label: Tensor) -> None:
        """Put pairs of one level in."""
        places = (int(self.written) + torch.arange(len(x))) % len(self.level)
        self.x[places], self.target[places] = x.half(), target.half()
        self.level[places], self.label[places] = level, label
        self.written += len(x)


class Distiller(ResumableTrainer[DistillConfig]):
    """The student, its optimizer and its moving average, advanced one step at a time."""

    state_file = "distill.safetensors"
    trains = "student, or of other settings"

    def __init__(
        self, model: Checkpoint, teacher: Teacher, dataset: data.Dataset, config: DistillConfig
    ) -> None:
        """model: the student, as `student.begin` makes it."""
        self.model, self.teacher, self.dataset = model, teacher, dataset
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        net = deepcopy(model.unet).to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        net.requires_grad_(True)
        self.ema = model.unet.to(self.device).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        super().__init__(net, optimizer, config)
        self.pool = Pool(config.pool, model.shape)
        self.forward = torch.compile(net) if config.compile else net
        weights = student.landing_weights(model.schedule)
        weights = weights if config.objective == "landing" else np.ones_like(weights)
        self.weights = torch.as_tensor(weights, dtype=torch.float32, device=self.device)
        self.losses = np.zeros(model.schedule.timesteps)
        """The latest squared error of v at each level."""

    def step(self) -> float:
        """One optimizer step. Returns its loss; raises RuntimeError, changing nothing, if not finite."""
        config = self.config
        while int(self.pool.written) < min(config.pool, FIRST_BATCHES * config.batch_size):
            self._teach(config.fresh)
        self._teach(config.fresh)
        rng = np.random.Generator(np.random.Philox(key=self.step_seed()))
        torch.manual_seed(self.step_seed())  # dropout draws from the global generator
        picked = torch.from_numpy(rng.integers(len(self.pool), size=config.batch_size))
        x, target, level, y = (
            values[picked].to(self.device)
            for values in (self.pool.x, self.pool.target, self.pool.level, self.pool.label)
        )
        x = x.float().contiguous(memory_format=torch.channels_last)
        self.set_learning_rate()
        with torch.autocast(self.device, torch.bfloat16, enabled=config.bf16):
            out = self.forward(x, level, y if self.model.unet.config.conditional else None)
        each = (out.float() - target.float()).square().flatten(1).mean(1)
        loss = (self.weights[level] * each).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {self.step_number}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_norm)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        for at in range(len(self.losses)):
            if (some := level == at).any():
                self.losses[at] = float(each.detach()[some].mean())
        self.step_number += 1
        return value

    def _teach(self, count: int) -> None:
        """Have the teacher make `count` pairs of one level; the levels take turns."""
        written = int(self.pool.written)
        levels = self.model.schedule.timesteps
        turn = written // count
        place = turn % levels
        index = batch_indices(self.config.seed, turn, count, len(self.dataset))
        labels = self._labels(index, written)
        images = in_range(self.dataset.batch(index), self.model.schedule.data_range)
        null = self.model.null_class
        asked = [None if label is None or label == null else label for label in labels]
        seed = self.config.seed * 2**40 + written
        made = self.teacher.segment(place, images, asked, seed)
        level = levels - 1 - place
        at = torch.full((count,), level)
        target = student.v_target(self.model.schedule, made.x, at, made.end)
        known = torch.tensor([label or 0 for label in labels])
        self.pool.add(made.x, target, level, known)

    def _labels(self, index: NDArray[np.int64], written: int) -> list[int | None]:
        """Of the images: a class, or the null class of a fraction; None where there are no classes."""
        if not self.model.unet.config.conditional:
            return [None] * len(index)
        labels = self.dataset.labels[index]
        if self.model.null_class is not None:
            rng = np.random.Generator(np.random.Philox(key=self.config.seed, counter=[0, 0, 1, written]))
            dropped = rng.random(len(labels)) < self.config.label_dropout
            labels = np.where(dropped, self.model.null_class, labels)
        return [int(label) for label in labels]

    def modules(self) -> Mapping[str, nn.Module]:
        """The network, its moving average, and the pool."""
        return {"net": self.net, "ema": self.ema, "pool": self.pool}

    def export(self, folder: Path) -> None:
        """Write the model folder, with the averaged weights."""
        checkpoint.save(folder, self.model)


def in_range(images: NDArray[np.float32], data_range: tuple[float, float]) -> NDArray[np.float32]:
    """Images in [-1, 1] as the network takes them."""
    low, high = data_range
    return images if data_range == (-1.0, 1.0) else (low + (images + 1) * ((high - low) / 2)).astype("f4")


def run(trainer: Distiller, folder: Path) -> Iterator[dict[str, object]]:
    """Train as `loop.train` does, yielding a record every RECORD_STEPS steps."""
    config = trainer.config
    losses: list[float] = []
    levels: list[NDArray[np.float64]] = []
    with closing(loop.train(trainer, folder, config.budget_s)) as steps:
        for loss in steps:
            losses.append(loss)
            levels.append(trainer.losses.copy())
            if trainer.step_number % RECORD_STEPS == 0:
                yield {
                    "step": trainer.step_number,
                    "images": trainer.step_number * config.batch_size,
                    "taught": int(trainer.pool.written),
                    "seconds": round(trainer.seconds, 1),
                    "loss": sum(losses) / len(losses),
                    "v_by_level": [round(float(each), 6) for each in np.mean(levels, axis=0)],
                    "learning_rate": learning_rate(config, trainer.step_number),
                }
                losses, levels = [], []


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m model.training.distill", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, help="model folder")
    add("--data", type=Path, required=True, help="folder of IDX files or of pictures (sub-folder = class)")
    add("--out", type=Path, required=True, help="the student's model folder, to write or to resume")
    add("--init", type=Path, help="start from the weights of this student of as many levels")
    add("--steps", type=int, default=4, help="evaluations that the student needs")
    add(
        "--timesteps",
        type=lambda text: tuple(int(number) for number in text.split(",")),
        help="the teacher's that become the student's, falling, like 999,649,353,124 (default: spaced)",
    )
    add("--runtime", default="auto", choices=get_args(RuntimeName), help="of the teacher")
    add("--optimizer-steps", type=int, default=4000, help="of the training")
    add("--sampler", choices=tuple(SAMPLERS), help="the teacher's (default: dpmpp_2m; a student's is ddim)")
    for name, value in asdict(DistillConfig(())).items():
        flag = "--" + name.replace("_", "-")
        if name in ("steps", "timesteps", "sampler"):
            continue
        if name == "objective":
            add(flag, default=value, choices=get_args(Objective), help="whose squared error is minimised")
        elif isinstance(value, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            add(flag, type=type(value), default=value)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Distiller:
    """The trainer of a command line. Raises CheckpointError, ConfigError, DataError, or ScheduleError."""
    teacher = checkpoint.load(args.teacher)
    distilled = teacher.schedule.distilled_guidance
    folded = args.guidance_scale if distilled is None else distilled
    if teacher.null_class is None and distilled is None:
        folded = 1.0
    timesteps = args.timesteps or student.default_timesteps(teacher.schedule.timesteps, args.steps)
    if len(timesteps) != args.steps:
        raise ConfigError(f"--timesteps are {len(timesteps)}, where --steps is {args.steps}")
    if not 1 <= args.fresh <= args.pool:
        raise ConfigError(f"--fresh must be from 1 to --pool, which is {args.pool}")
    names = asdict(DistillConfig(())).keys() - {"steps", "timesteps", "sampler", "guidance_scale"}
    config = DistillConfig(
        timesteps,
        steps=args.optimizer_steps,
        sampler=args.sampler or ("dpmpp_2m" if distilled is None else "ddim"),
        guidance_scale=folded if distilled is None else 1.0,
        **{name: getattr(args, name) for name in names},
    )
    model = student.begin(teacher, timesteps, folded)
    if args.init is not None:
        model = student.with_weights(model, checkpoint.load(args.init))
    _, height, width = model.shape
    dataset = data.load(args.data, (height, width), model.shape[0])
    if model.class_names and len(dataset.class_names) != len(model.class_names):
        counts = f"{len(dataset.class_names)} classes, but the teacher has {len(model.class_names)}"
        raise data.DataError(f"{args.data}: {counts}")
    guide = Teacher(
        teacher,
        timesteps,
        sampler=config.sampler,
        substeps=config.substeps,
        guidance=config.guidance,
        runtime=args.runtime,
    )
    return Distiller(model, guide, dataset, config)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for unusable data, folders or options."""
    args = parse(argv)
    try:
        trainer = prepare(args)
        if trainer.resume(args.out):
            print(f"resumed at step {trainer.step_number}")
    except (data.DataError, checkpoint.CheckpointError, ValueError, RuntimeUnavailableError) as error:
        print(error, file=sys.stderr)
        return 3
    log = loop.Log(args.out / "training" / LOG, trainer.step_number)
    print(f"levels at the teacher's timesteps {', '.join(map(str, trainer.config.timesteps))};"
          f" rows of the teacher for a pair: {trainer.teacher.rows()}")  # fmt: skip
    with attended(trainer, smoothing=0.05, mininterval=5) as bar:
        for record in run(trainer, args.out):
            log.add(record)
            bar.update(trainer.step_number - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
    if trainer.stopping:
        print(f"stopped and saved at step {trainer.step_number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
