"""Train a U-Net: `python -m model.training.train --data PATH --out FOLDER`.

Algorithm 1 of Ho et al. 2020: the network's output is regressed on ε with L_simple (or on x₀, v or
the posterior mean, or with the bound itself; and with --learned-variance by L_hybrid, Nichol & Dhariwal
2021), and an exponential moving average of the weights is what is kept. Every random draw of a step (images,
timesteps, noise, dropped labels) is a function of the seed and the step's number, so the step number is the
whole state of the data and the generators, and a run that was stopped goes on exactly where it was.

FOLDER is a model folder the service loads. FOLDER/training holds what only training needs: the state
to resume from, the log, the loss curve and sample sheets.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model import checkpoint, diffusion
from model.checkpoint import Checkpoint
from model.diffusion import OBJECTIVES, Objective
from model.evaluation import plots
from model.schedule import PREDICTION_TYPES, NoiseSchedule
from model.training import data
from model.unet import ConfigError, UNet, UNetConfig

STATE = "state.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Steps are optimizer steps; times are in seconds."""

    steps: int = 16_000
    batch_size: int = 64
    learning_rate: float = 8e-4
    warmup_steps: int = 500
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    objective: Objective = "simple"
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    checkpoint_s: float = 240.0
    sheet_s: float = 1800.0
    budget_s: float = math.inf


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order in which an epoch visits the images: a permutation of [0, length)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch])).permutation(length)


def batch_indices(seed: int, step: int, batch: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Which images step `step` sees: consecutive pieces of the epochs' orders. [batch] int64."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // length
    orders = {int(epoch): epoch_order(seed, int(epoch), length) for epoch in np.unique(epochs)}
    return np.array(
        [orders[int(e)][int(p % length)] for e, p in zip(epochs, positions, strict=True)], np.int64
    )


class Trainer:
    """The network, its optimizer and its moving average, advanced one step at a time."""

    def __init__(self, model: Checkpoint, dataset: data.Dataset, config: TrainConfig) -> None:
        self.config, self.model, self.dataset = config, model, dataset
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = deepcopy(model.unet).to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.ema = model.unet.to(self.device).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.forward = torch.compile(self.net) if config.compile else self.net
        self.step_number = 0
        self.seconds = 0.0
        self.stopping = False

    def stop(self) -> None:
        """Ask `run` to end after the step it is in."""
        self.stopping = True

    def step(self) -> float:
        """One optimizer step. Returns its loss; raises RuntimeError, changing nothing, if not finite."""
        config, schedule = self.config, self.model.schedule
        seed = config.seed * 1_000_003 + self.step_number
        rng = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        index = batch_indices(config.seed, self.step_number, config.batch_size, len(self.dataset))
        x0 = torch.from_numpy(self.dataset.batch(index)).to(self.device)
        t = diffusion.spread_timesteps(config.batch_size, schedule.timesteps, rng)
        eps = torch.randn(x0.shape, generator=rng, device=self.device)
        y = self._labels(index, rng)
        x = diffusion.q_sample(schedule, x0, t, eps).contiguous(memory_format=torch.channels_last)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step_number)
        with torch.autocast(self.device, torch.bfloat16, enabled=config.bf16):
            out = self.forward(x, t, y)
        loss = diffusion.objective(schedule, config.objective, x0, x, t, eps, out).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RuntimeError(f"the loss is {value} at step {self.step_number}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_norm)
        self.optimizer.step()

        # The average starts short, so that the random initial weights are soon forgotten.
        decay = min(config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.step_number += 1
        return value

    def _labels(self, index: np.ndarray[Any, np.dtype[np.int64]], rng: torch.Generator) -> Tensor | None:
        if self.model.unet.config.num_class_embeds is None:
            return None
        y = torch.from_numpy(self.dataset.labels[index]).to(self.device)
        if self.model.null_class is not None:
            dropped = torch.rand(len(y), generator=rng, device=self.device) < self.config.label_dropout
            y = torch.where(dropped, self.model.null_class, y)
        return y

    @torch.no_grad()
    def validate(self, held_out: data.Dataset, rows: int = 1024) -> float:
        """L_simple of the averaged weights on fixed images, timesteps and noise that training never sees."""
        rng = torch.Generator(self.device).manual_seed(0)
        total = 0.0
        count = min(rows, len(held_out))
        for start in range(0, count, 128):
            index = np.arange(start, min(start + 128, count))
            x0 = torch.from_numpy(held_out.batch(index)).to(self.device)
            t = diffusion.spread_timesteps(len(index), self.model.schedule.timesteps, rng)
            eps = torch.randn(x0.shape, generator=rng, device=self.device)
            conditional = self.model.unet.config.num_class_embeds is not None
            y = torch.from_numpy(held_out.labels[index]).to(self.device) if conditional else None
            out = self.ema(diffusion.q_sample(self.model.schedule, x0, t, eps), t, y)[:, : x0.shape[1]]
            target = diffusion.training_target(self.model.schedule, x0, t, eps)
            total += float(diffusion.l_simple(target, out).sum())
        return total / count

    def save(self, folder: Path) -> None:
        """Write the state to resume from and the model folder, each complete or not at all."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        meta = {
            "step": str(self.step_number),
            "seconds": str(self.seconds),
            "config": json.dumps(asdict(self.config)),
        }
        path = folder / "training" / STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        # Gradients follow the parameters' channels-last layout; safetensors stores plain row-major order.
        save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".part"), meta)
        path.with_suffix(".part").replace(path)
        checkpoint.save(folder, self.model)

    def resume(self, folder: Path) -> bool:
        """Go on from what `save` wrote. Returns whether there was anything.

        Raises CheckpointError when that is the state of another network.
        """
        path = folder / "training" / STATE
        if not path.exists():
            return False
        with safe_open(path, "pt", self.device) as file:
            meta = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for prefix, module in (("net.", self.net), ("ema.", self.ema)):
            part = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise checkpoint.CheckpointError(f"{path}: the state of another network") from error
        for name, parameter in self.net.named_parameters():
            if f"optimizer.step.{name}" not in state:  # saved before the first step
                continue
            self.optimizer.state[parameter] = {
                key: state[f"optimizer.{key}.{name}"].clone(memory_format=torch.preserve_format)
                if key == "step"
                else torch.empty_like(parameter).copy_(state[f"optimizer.{key}.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.step_number, self.seconds = int(meta["step"]), float(meta["seconds"])
        return True


def run(trainer: Trainer, folder: Path, held_out: data.Dataset | None) -> Iterator[dict[str, float]]:
    """Train to the last step, a stop, or the end of the time budget, yielding a record every 50 steps."""
    config = trainer.config
    started, last_save, last_sheet = time.monotonic(), time.monotonic(), time.monotonic()
    before = trainer.seconds
    losses: list[float] = []
    try:
        while (
            trainer.step_number < config.steps
            and not trainer.stopping
            and time.monotonic() - started < config.budget_s
        ):
            losses.append(trainer.step())
            now = time.monotonic()
            trainer.seconds = before + now - started
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
            if now - last_save > config.checkpoint_s:
                trainer.save(folder)
                last_save = time.monotonic()
            if now - last_sheet > config.sheet_s:
                _write_sheet(trainer, folder)
                last_sheet = time.monotonic()
    finally:
        trainer.save(folder)
    if not trainer.stopping:
        _write_sheet(trainer, folder)


def _write_sheet(trainer: Trainer, folder: Path) -> None:
    sheet = plots.class_sheet(trainer.model, per_class=8, steps=25)
    sheet.save(folder / "training" / f"sheet-{trainer.step_number:06d}.png")


def new_model(name: str, dataset: data.Dataset, args: argparse.Namespace) -> Checkpoint:
    """A fresh network of the asked-for shape for this data, with a null class when labels get dropped."""
    channels = tuple(int(width) for width in args.channels.split(","))
    attend = [args.size >> level in args.attention for level in range(len(channels))]
    count = len(dataset.class_names)
    null_class = count if count and args.label_dropout > 0 else None
    config = UNetConfig(
        sample_size=args.size,
        in_channels=args.image_channels,
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
        dataset.class_names,
        null_class,
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
    add("--out", type=Path, required=True, help="model folder to write, or to go on with")
    add("--init", type=Path, help="start from the weights of this model folder instead of from noise")
    add("--held-out", default="t10k", help="split to report a validation loss on; empty for none")
    add("--size", type=int, default=32, help="pixels per side; smaller images are padded")
    add("--image-channels", type=int, default=1, choices=(1, 3))
    add("--channels", default="32,64,128", help="widths per level, highest resolution first")
    add("--layers", type=int, default=1, help="residual blocks per level")
    add("--attention", type=_integers, default=[16], help="resolutions to attend at, as 16 or 16,8")
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
            add(flag, default=value, choices=OBJECTIVES, help="L_simple, or the variational bound itself")
        else:
            add(flag, type=type(value), default=value)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says. Returns the exit code: 0, or 3 when data or folder are not usable."""
    args = parse(argv)
    config = TrainConfig(**{name: getattr(args, name) for name in asdict(TrainConfig())})
    try:
        dataset = data.load(args.data, args.size, args.image_channels)
        held_out = _held_out(args)
        if args.init is not None:
            model = checkpoint.load(args.init)
        else:
            model = new_model(args.out.resolve().name, dataset, args)
        trainer = Trainer(model, dataset, config)
        if trainer.resume(args.out):
            print(f"resumed at step {trainer.step_number}")
    except (data.DataError, checkpoint.CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 3
    log = args.out / "training" / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    records = [record for record in records if record["step"] <= trainer.step_number]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))

    # Both end the loop between two steps; a step cut in half could not be resumed exactly.
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: trainer.stop()) for number in signals]
    bar = tqdm(total=config.steps, initial=trainer.step_number, unit="step", smoothing=0.05, mininterval=5)
    try:
        for record in run(trainer, args.out, held_out):
            records.append(record)
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.update(int(record["step"]) - bar.n)
            bar.set_postfix(loss=f"{record['loss']:.4f}", images=int(record["images"]))
            if record["step"] % 500 == 0:
                plots.loss_curve(records).save(log.with_name("loss.png"))
    finally:
        bar.close()
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
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
