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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import checkpoint, diffusion
from model.checkpoint import CheckpointError
from model.encoder import EncoderConfig, NoiseClassifier
from model.schedule import DATA_RANGE, NoiseSchedule
from model.training.data import DataError, Dataset, load_splits
from model.training.loop import ResumableTrainer, attended, batch_indices, train
from model.unet import ConfigError


@dataclass(frozen=True)
class ClassifierTrainingConfig:
    """How to train. Steps are optimizer steps; times are in seconds."""

    steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    checkpoint_s: float = 60.0


class ClassifierTrainer(ResumableTrainer[ClassifierTrainingConfig]):
    """The classifier and its optimizer, advanced one step at a time."""

    state_file = "noise-classifier.safetensors"
    trains = "classifier"
    net: NoiseClassifier

    def __init__(
        self,
        net: NoiseClassifier,
        schedule: NoiseSchedule,
        dataset: Dataset,
        config: ClassifierTrainingConfig,
    ) -> None:
        self.schedule, self.dataset = schedule, dataset
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        net = net.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=config.weight_decay, fused=True)
        super().__init__(net, optimizer, config)

    def step(self) -> float:
        """One optimizer step. Returns its cross-entropy in nats."""
        config = self.config
        rng = torch.Generator(self.device).manual_seed(self.step_seed())
        index = batch_indices(config.seed, self.step_number, config.batch_size, len(self.dataset))
        x0 = torch.from_numpy(self.dataset.batch(index)).to(self.device)
        y = torch.from_numpy(self.dataset.labels[index]).to(self.device)
        t = diffusion.stratified_timesteps(len(index), self.schedule.timesteps, rng)
        eps = torch.randn(x0.shape, generator=rng, device=self.device)
        x = diffusion.q_sample(self.schedule, x0, t, eps)

        self.set_learning_rate()
        loss = F.cross_entropy(self.net(x, diffusion.network_timesteps(self.schedule, t)), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step_number += 1
        return float(loss.detach())

    def export(self, folder: Path) -> None:
        """Write the classifier into the model folder."""
        checkpoint.save_classifier(folder, self.net)


@torch.no_grad()
def accuracy(
    net: NoiseClassifier, schedule: NoiseSchedule, dataset: Dataset, timesteps: Sequence[int], seed: int = 0
) -> list[float]:
    """The accuracy on the images under the noise of each timestep, in [0, 1]."""
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
                x = diffusion.q_sample(schedule, x0, t, eps)
                found = net(x, diffusion.network_timesteps(schedule, t)).argmax(1)
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
    for name, value in asdict(ClassifierTrainingConfig()).items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(value), default=value)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[ClassifierTrainer, Dataset]:
    """The trainer of a new classifier, and the test images.

    Raises CheckpointError, DataError or ConfigError for what cannot be used.
    """
    model = checkpoint.load(args.model)
    unet = model.unet.config
    train_set, test_set = load_splits(args.data, unet.shape[1:], unet.in_channels, args.held_out)
    if len(model.class_names) != len(train_set.class_names):
        counts = f"{len(train_set.class_names)} classes, but the model has {len(model.class_names)}"
        raise DataError(f"{args.data}: {counts}")
    if model.schedule.data_range != DATA_RANGE:
        reason = f"the model's data_range is {list(model.schedule.data_range)}"
        raise DataError(f"{args.model}: {reason}, and training images are in {list(DATA_RANGE)}")
    shape = {} if args.channels is None else {"block_out_channels": args.channels}
    config = EncoderConfig(
        unet.shape[1:],
        unet.in_channels,
        len(model.class_names),
        layers_per_block=args.layers,
        norm_num_groups=args.groups,
        **shape,
    )
    names = asdict(ClassifierTrainingConfig())
    training = ClassifierTrainingConfig(**{name: getattr(args, name) for name in names})
    torch.manual_seed(training.seed)
    return ClassifierTrainer(NoiseClassifier(config), model.schedule, train_set, training), test_set


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for unusable input."""
    args = parse(argv)
    try:
        trainer, test_set = prepare(args)
        if trainer.resume(args.model):
            print(f"resumed at step {trainer.step_number}")
    except (CheckpointError, DataError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{sum(parameter.numel() for parameter in trainer.net.parameters()):,} parameters")

    with attended(trainer, mininterval=1) as bar:
        for loss in train(trainer, args.model):
            bar.update()
            if trainer.step_number % 20 == 0:
                bar.set_postfix(loss=f"{loss:.3f}")
    if trainer.stopping:
        print(f"stopped and saved at step {trainer.step_number}")
        return 0
    last = trainer.schedule.timesteps - 1
    timesteps = [*range(0, last, max(1, (last + 1) // 10)), last]
    shares = accuracy(trainer.net.eval(), trainer.schedule, test_set, timesteps)
    print(f"\nRight on {len(test_set)} test images:\n\n{table(trainer.schedule, timesteps, shares)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
