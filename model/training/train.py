"""Train a U-Net: `python -m model.training.train --data PATH --out FOLDER`.

Algorithm 1 of Ho et al. 2020: the network's output is regressed on ε with L_simple, and an exponential moving
average of the weights is kept. Options regress it on x₀, v or the posterior mean, minimise the variational
bound itself, or learn the variance by L_hybrid (Nichol & Dhariwal 2021). A stopped run resumes exactly where
it was (model/training/loop.py).

FOLDER is a model folder that the service loads. FOLDER/training holds what only training needs: the state to
resume from, the log, the loss curve and sample sheets. The sheets and the curve are drawn by
`model.evaluation.plots`, the one module of that package which training imports.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model import checkpoint, diffusion
from model.checkpoint import Checkpoint
from model.diffusion import OBJECTIVES, Objective
from model.evaluation import plots
from model.schedule import PREDICTION_TYPES, NoiseSchedule
from model.training import data, loop
from model.training.averaging import PowerAverages
from model.training.loop import ResumableTrainer, attended, batch_indices, learning_rate
from model.unet import ConfigError, UNet, UNetConfig
from model.unet_config import parse_size

LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Steps are optimizer steps; times are in seconds.

    low_resolution: for super-resolution, pixels on the longer side of what the network is given beside x.
    snapshot_steps: how often model/training/averaging.py gets averages to combine afterwards; 0 for never.
    """

    steps: int = 16_000
    batch_size: int = 64
    learning_rate: float = 8e-4
    warmup_steps: int = 500
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    snapshot_steps: int = 0
    low_resolution: int = 0
    objective: Objective = "simple"
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    checkpoint_s: float = 240.0
    sheet_s: float = 1800.0
    budget_s: float = math.inf


class Trainer(ResumableTrainer[TrainConfig]):
    """The network, its optimizer and its moving average, advanced one step at a time."""

    state_file = "state.safetensors"
    trains = "network"
    net: UNet

    def __init__(self, model: Checkpoint, dataset: data.Dataset, config: TrainConfig) -> None:
        self.model, self.dataset = model, dataset
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        net = deepcopy(model.unet).to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.ema = model.unet.to(self.device).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            net.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        super().__init__(net, optimizer, config)
        self.averages = PowerAverages(net) if config.snapshot_steps else None
        self.forward = torch.compile(net) if config.compile else net

    def step(self) -> float:
        """One optimizer step. Returns its loss; raises RuntimeError, changing nothing, if not finite."""
        config, schedule = self.config, self.model.schedule
        seed = self.step_seed()
        rng = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        index = batch_indices(config.seed, self.step_number, config.batch_size, len(self.dataset))
        x0 = torch.from_numpy(self.dataset.batch(index)).to(self.device)
        t = diffusion.stratified_timesteps(config.batch_size, schedule.timesteps, rng)
        eps = torch.randn(x0.shape, generator=rng, device=self.device)
        y = self._labels(index, rng)
        x = diffusion.q_sample(schedule, x0, t, eps).contiguous(memory_format=torch.channels_last)

        self.set_learning_rate()
        with torch.autocast(self.device, torch.bfloat16, enabled=config.bf16):
            out = self.forward(self._beside(x, self.dataset, index), t, y)
        loss = diffusion.objective(schedule, config.objective, x0, x, t, eps, out).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {self.step_number}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_norm)
        self.optimizer.step()

        # The average is short at first, to forget the random initial weights soon.
        decay = min(config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.step_number += 1
        if self.averages is not None:
            self.averages.update(self.net, self.step_number)
        return value

    def _beside(self, x: Tensor, dataset: data.Dataset, index: NDArray[np.int64]) -> Tensor:
        """Noisy images [B, C, H, W] with what the network takes beside them (SR3, Saharia et al. 2021)."""
        if not self.model.condition:
            return x
        low = data.low_resolution(dataset.images[index], self.config.low_resolution)
        return torch.cat((x, torch.from_numpy(data.scaled(low)).to(self.device)), 1)

    def _labels(self, index: NDArray[np.int64], rng: torch.Generator) -> Tensor | None:
        if not self.model.unet.config.conditional:
            return None
        y = torch.from_numpy(self.dataset.labels[index]).to(self.device)
        if self.model.null_class is not None:
            dropped = torch.rand(len(y), generator=rng, device=self.device) < self.config.label_dropout
            y = torch.where(dropped, self.model.null_class, y)
        return y

    @torch.no_grad()
    def validate(self, held_out: data.Dataset, rows: int = 1024) -> float:
        """L_simple of the averaged weights on fixed images, timesteps and noise outside training."""
        rng = torch.Generator(self.device).manual_seed(0)
        total = 0.0
        count = min(rows, len(held_out))
        for start in range(0, count, 128):
            index = np.arange(start, min(start + 128, count))
            x0 = torch.from_numpy(held_out.batch(index)).to(self.device)
            t = diffusion.stratified_timesteps(len(index), self.model.schedule.timesteps, rng)
            eps = torch.randn(x0.shape, generator=rng, device=self.device)
            conditional = self.model.unet.config.conditional
            y = torch.from_numpy(held_out.labels[index]).to(self.device) if conditional else None
            x = self._beside(diffusion.q_sample(self.model.schedule, x0, t, eps), held_out, index)
            out = self.ema(x, t, y)[:, : x0.shape[1]]
            target = diffusion.training_target(self.model.schedule, x0, t, eps)
            total += float(diffusion.l_simple(target, out).sum())
        return total / count

    def modules(self) -> Mapping[str, nn.Module]:
        """The network and its moving averages."""
        modules: dict[str, nn.Module] = {"net": self.net, "ema": self.ema}
        if self.averages is not None:
            modules |= {f"average-{std}": module for std, module in self.averages.modules.items()}
        return modules

    def export(self, folder: Path) -> None:
        """Write the model folder, with the averaged weights."""
        checkpoint.save(folder, self.model)


def run(trainer: Trainer, folder: Path, held_out: data.Dataset | None) -> Iterator[dict[str, float]]:
    """Train as `loop.train` does, yielding a record every 50 steps and writing sample sheets."""
    config = trainer.config
    last_sheet = time.monotonic()
    losses: list[float] = []
    with closing(loop.train(trainer, folder, config.budget_s)) as steps:
        for loss in steps:
            losses.append(loss)
            if trainer.averages is not None and trainer.step_number % config.snapshot_steps == 0:
                trainer.averages.write(folder / "training" / "averages", trainer.step_number)
            if trainer.step_number % 50 == 0:
                record = {
                    "step": trainer.step_number,
                    "images": trainer.step_number * config.batch_size,
                    "seconds": round(trainer.seconds, 1),
                    "loss": sum(losses) / len(losses),
                    "learning_rate": learning_rate(config, trainer.step_number),
                }
                losses = []
                if held_out is not None and trainer.step_number % 500 == 0:
                    record["held_out_loss"] = trainer.validate(held_out)
                yield record
            if time.monotonic() - last_sheet > config.sheet_s:
                _write_sheet(trainer, folder)
                last_sheet = time.monotonic()
    if not trainer.stopping:
        _write_sheet(trainer, folder)


def _write_sheet(trainer: Trainer, folder: Path) -> None:
    if trainer.model.condition:
        images = trainer.dataset.images[np.arange(8)]
        low = data.low_resolution(images, trainer.config.low_resolution)
        sheet = plots.super_resolution_sheet(trainer.model, low, images, steps=25)
    else:
        sheet = plots.class_sheet(trainer.model, per_class=8, steps=25)
    sheet.save(folder / "training" / f"sheet-{trainer.step_number:06d}.png")


def new_model(name: str, dataset: data.Dataset, args: argparse.Namespace) -> Checkpoint:
    """A new network of the given shape for this data, with a null class when labels are dropped."""
    channels = tuple(int(width) for width in args.channels.split(","))
    attend = [max(args.size) >> level in args.attention for level in range(len(channels))]
    count = 0 if args.low_resolution else len(dataset.class_names)
    null_class = count if count and args.label_dropout > 0 else None
    config = UNetConfig(
        sample_size=args.size,
        in_channels=args.image_channels * (2 if args.low_resolution else 1),
        out_channels=args.image_channels * (2 if args.learned_variance else 1),
        block_out_channels=channels,
        layers_per_block=args.layers,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attend),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
        attention_head_dim=None,
        norm_num_groups=args.groups,
        num_class_embeds=count + (null_class is not None) if count else None,
    )
    scheduler_config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": args.beta_schedule,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": True,
        "prediction_type": args.prediction_type,
        "timestep_spacing": "trailing",
        "variance_type": "learned_range" if args.learned_variance else "fixed_small",
    }
    torch.manual_seed(args.seed)
    return Checkpoint(
        name,
        UNet(config).eval(),
        NoiseSchedule.from_diffusers(scheduler_config),
        scheduler_config,
        dataset.class_names if count else (),
        null_class,
        condition=("image",) if args.low_resolution else (),
    )


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m model.training.train", description=(__doc__ or "").split("\n\n")[0]
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of IDX files or of pictures (sub-folder = class)")
    add("--out", type=Path, required=True, help="model folder to write, or to resume")
    add("--init", type=Path, help="start from the weights of this model folder instead of from noise")
    add("--held-out", default="t10k", help="split to report a validation loss on; empty for none")
    add("--size", type=parse_size, default=(32, 32), help="in pixels, as 32 or 64x128 (height x width)")
    add("--image-channels", type=int, default=1, choices=tuple(data.MODES))
    add("--channels", default="32,64,128", help="widths per level, highest resolution first")
    add("--layers", type=int, default=1, help="residual blocks per level")
    add("--attention", type=_integers, default=[16], help="longer sides to attend at, as 16 or 16,8")
    add("--groups", type=int, default=8, help="groups of the group norms")
    add("--beta-schedule", default="linear", choices=("linear", "scaled_linear", "squaredcos_cap_v2"))
    add("--prediction-type", default="epsilon", choices=PREDICTION_TYPES)
    add("--learned-variance", action="store_true", help="outputs for a variance too; L_hybrid as objective")
    defaults = TrainConfig()
    for name, value in asdict(defaults).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            add(flag, action=argparse.BooleanOptionalAction, default=value)
        elif name == "objective":
            add(
                flag,
                default=value,
                choices=OBJECTIVES,
                help="L_simple, weighted by min-SNR or debiased estimation, or the variational bound itself",
            )
        else:
            add(flag, type=type(value), default=value)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for unusable data, folders or options."""
    args = parse(argv)
    config = TrainConfig(**{name: getattr(args, name) for name in asdict(TrainConfig())})
    try:
        dataset = data.load(args.data, args.size, args.image_channels)
        held_out = _held_out(args)
        if args.init is not None:
            model = checkpoint.load(args.init)
        else:
            model = new_model(args.out.resolve().name, dataset, args)
        if model.condition != (("image",) if config.low_resolution else ()):
            raise ConfigError(
                f"--low-resolution {config.low_resolution} does not go with a network that takes"
                f" {' and '.join(model.condition) or 'nothing'} beside x"
            )
        trainer = Trainer(model, dataset, config)
        if trainer.resume(args.out):
            print(f"resumed at step {trainer.step_number}")
    except (data.DataError, checkpoint.CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 3
    log = loop.Log(args.out / "training" / LOG, trainer.step_number)
    with attended(trainer, smoothing=0.05, mininterval=5) as bar:
        for record in run(trainer, args.out, held_out):
            log.add(record)
            bar.update(int(record["step"]) - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}", images=int(record["images"]))
            if record["step"] % 500 == 0:
                plots.loss_curve(log.records).save(args.out / "training" / "loss.png")
    if trainer.stopping:
        print(f"stopped and saved at step {trainer.step_number}")
    return 0


def _held_out(args: argparse.Namespace) -> data.Dataset | None:
    if not args.held_out:
        return None
    try:
        return data.load(args.data, args.size, args.image_channels, args.held_out)
    except data.MissingSplitError as error:
        print(f"{error}: there will be no held-out loss")
        return None


if __name__ == "__main__":
    sys.exit(main())
