"""Train the noise-aware classifier of a model, for classifier guidance.

`python -m model.training.noise_classifier --model FOLDER --data PATH`

The classifier (model/encoder.py) sees training images under the noise of the model's own schedule, at
stratified timesteps, and learns their classes by cross-entropy (Dhariwal & Nichol 2021, §4.1). A stopped run
resumes exactly where it was (model/training/loop.py). The service loads FOLDER/classifier; FOLDER/training
holds the state to resume from. At the end a table gives the accuracy on test images by timestep.

It is not the judge of model/evaluation/evaluate.py: the judge sees clean images only, and must not have
guided the samples it judges.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from model import checkpoint, diffusion
from model.checkpoint import CheckpointError
from model.encoder import EncoderConfig, NoiseClassifier
from model.schedule import NoiseSchedule
from model.training.data import DataError, Dataset, load_splits
from model.training.train import batch_indices
from model.unet import ConfigError

STATE = "noise-classifier.safetensors"


@dataclass(frozen=True)
class Schooling:
    """How to train. Steps are optimizer steps; times are in seconds."""

    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_s: float = 60.0


def learning_rate(config: Schooling, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class Teacher:
    """The classifier and its optimizer, advanced one step at a time."""

    def __init__(
        self, net: NoiseClassifier, schedule: NoiseSchedule, dataset: Dataset, config: Schooling
    ) -> None:
        self.config, self.schedule, self.dataset = config, schedule, dataset
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = net.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)
        self.step_number = 0
        self.stopping = False

    def stop(self) -> None:
        """Ask `run` to end after the step it is in."""
        self.stopping = True

    def step(self) -> float:
        """One optimizer step. Returns its cross-entropy in nats."""
        config = self.config
        rng = torch.Generator(self.device).manual_seed(config.seed * 1_000_003 + self.step_number)
        index = batch_indices(config.seed, self.step_number, config.batch_size, len(self.dataset))
        x0 = torch.from_numpy(self.dataset.batch(index)).to(self.device)
        y = torch.from_numpy(self.dataset.labels[index]).to(self.device)
        t = diffusion.spread_timesteps(len(index), self.schedule.timesteps, rng)
        eps = torch.randn(x0.shape, generator=rng, device=self.device)
        x = diffusion.q_sample(self.schedule, x0, t, eps)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step_number)
        loss = F.cross_entropy(self.net(x, t), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step_number += 1
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write the state to resume from, and the classifier into the model folder."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        meta = {"step": str(self.step_number), "config": json.dumps(asdict(self.config))}
        path = folder / "training" / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".part"), meta)
        path.with_suffix(".part").replace(path)
        checkpoint.save_classifier(folder, self.net)

    def resume(self, folder: Path) -> bool:
        """Go on from what `save` wrote. Returns whether there was anything.

        Raises CheckpointError when that is the state of another classifier.
        """
        path = folder / "training" / STATE
        if not path.exists():
            return False
        with safe_open(path, "pt", self.device) as file:
            meta = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        part = {name.removeprefix("net."): v for name, v in state.items() if name.startswith("net.")}
        try:
            self.net.load_state_dict(part)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: the state of another classifier") from error
        for name, parameter in self.net.named_parameters():
            if f"optimizer.step.{name}" in state:  # not if saved before the first step
                found = {key: state[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                for key in ("exp_avg", "exp_avg_sq"):  # in the parameter's layout
                    found[key] = torch.empty_like(parameter).copy_(found[key])
                self.optimizer.state[parameter] = found
        self.step_number = int(meta["step"])
        return True


def run(teacher: Teacher, folder: Path) -> Iterator[float]:
    """Train to the last step or a stop, yielding each step's loss. Saves now and then, and at the end."""
    last_save = time.monotonic()
    try:
        while teacher.step_number < teacher.config.steps and not teacher.stopping:
            yield teacher.step()
            if time.monotonic() - last_save > teacher.config.checkpoint_s:
                teacher.save(folder)
                last_save = time.monotonic()
    finally:
        teacher.save(folder)


@torch.no_grad()
def accuracy(
    net: NoiseClassifier, schedule: NoiseSchedule, dataset: Dataset, timesteps: Sequence[int], seed: int = 0
) -> list[float]:
    """The share of the images that it is right about under the noise of each timestep."""
    device = net.head.weight.device
    rng = torch.Generator(device).manual_seed(seed)
    hits = np.zeros(len(timesteps), np.int64)
    with tqdm(total=len(dataset), desc="accuracy", unit="image", mininterval=1) as bar:
        for start in range(0, len(dataset), 500):
            index = np.arange(start, min(start + 500, len(dataset)))
            x0 = torch.from_numpy(dataset.batch(index)).to(device)
            y = torch.from_numpy(dataset.labels[index]).to(device)
            for place, timestep in enumerate(timesteps):
                t = torch.full_like(y, timestep)
                eps = torch.randn(x0.shape, generator=rng, device=device)
                found = net(diffusion.q_sample(schedule, x0, t, eps), t).argmax(1)
                hits[place] += int((found == y).sum())
            bar.update(len(index))
    return [float(share) for share in hits / len(dataset)]


def table(schedule: NoiseSchedule, timesteps: Sequence[int], shares: Sequence[float]) -> str:
    """Accuracy against the timestep, as Markdown."""
    lines = ["| t | signal √ᾱ | accuracy |", "|--:|--:|--:|"]
    for t, share in zip(timesteps, shares, strict=True):
        lines.append(f"| {t} | {schedule.alphas_cumprod[t] ** 0.5:.3f} | {share:.3f} |")
    return "\n".join(lines)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m model.training.noise_classifier", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder; the classifier goes into it")
    add("--data", type=Path, required=True, help="IDX files, or pictures in train/ and test/ by class")
    add("--held-out", help="the split to report on (default: t10k of IDX files, test/ of pictures)")
    add("--channels", type=_integers, default=None, help="widths, the stem's first, like 16,32,64,96")
    add("--layers", type=int, default=1, help="residual blocks per level")
    add("--groups", type=int, default=8, help="groups of the group norms")
    for name, value in asdict(Schooling()).items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(value), default=value)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[Teacher, Dataset]:
    """The teacher of a fresh classifier, and the test images.

    Raises CheckpointError, DataError or ConfigError for what cannot be used.
    """
    model = checkpoint.load(args.model)
    unet = model.unet.config
    train_set, test_set = load_splits(args.data, unet.sample_size, unet.in_channels, args.held_out)
    if len(model.class_names) != len(train_set.class_names):
        counts = f"{len(train_set.class_names)} classes, but the model has {len(model.class_names)}"
        raise DataError(f"{args.data}: {counts}")
    shape = {} if args.channels is None else {"block_out_channels": args.channels}
    config = EncoderConfig(
        unet.sample_size,
        unet.in_channels,
        len(model.class_names),
        layers_per_block=args.layers,
        norm_num_groups=args.groups,
        **shape,
    )
    schooling = Schooling(**{name: getattr(args, name) for name in asdict(Schooling())})
    torch.manual_seed(schooling.seed)
    return Teacher(NoiseClassifier(config), model.schedule, train_set, schooling), test_set


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0, or 3 when what is given cannot be used."""
    args = parse(argv)
    try:
        teacher, test_set = prepare(args)
        if teacher.resume(args.model):
            print(f"resumed at step {teacher.step_number}")
    except (CheckpointError, DataError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{sum(parameter.numel() for parameter in teacher.net.parameters()):,} parameters")

    # Both end the loop between two steps; a step cut in half could not be resumed exactly.
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: teacher.stop()) for number in signals]
    bar = tqdm(total=teacher.config.steps, initial=teacher.step_number, unit="step", mininterval=1)
    try:
        for loss in run(teacher, args.model):
            bar.update()
            if teacher.step_number % 20 == 0:
                bar.set_postfix(loss=f"{loss:.3f}")
    finally:
        bar.close()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if teacher.stopping:
        print(f"stopped and saved at step {teacher.step_number}")
        return 0
    last = teacher.schedule.timesteps - 1
    timesteps = [*range(0, last, max(1, (last + 1) // 10)), last]
    shares = accuracy(teacher.net.eval(), teacher.schedule, test_set, timesteps)
    print(f"\nRight on {len(test_set)} test images:\n\n{table(teacher.schedule, timesteps, shares)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
