"""What both trainers share: batches by step, the learning rate, saved state, and the loop with its signals.

Every random draw of a step (images, timesteps, noise, dropped labels) is a function of the seed and the
step's number. So the step number is the whole state of the data and the generators, and a stopped run
resumes exactly where it was.
"""

from __future__ import annotations

import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from model.checkpoint import CheckpointError
from model.files import replace_text, replacing

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter."""


class LoopConfig(Protocol):
    """What the loop needs to know of a trainer's settings, which are a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""

    @property
    def learning_rate(self) -> float:
        """At its peak."""

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""

    @property
    def seed(self) -> int:
        """Of every random draw."""

    @property
    def checkpoint_s(self) -> float:
        """Seconds between two saves."""


Config = TypeVar("Config", bound=LoopConfig)


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero at `config.steps`."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images: a permutation of [0, length)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, epoch])).permutation(length)


def batch_indices(seed: int, step: int, batch: int, length: int) -> NDArray[np.int64]:
    """Which images step `step` sees: consecutive pieces of the epochs' orders. [batch] int64."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // length
    orders = {int(epoch): epoch_order(seed, int(epoch), length) for epoch in np.unique(epochs)}
    return np.array(
        [orders[int(e)][int(p % length)] for e, p in zip(epochs, positions, strict=True)], np.int64
    )


class ResumableTrainer(ABC, Generic[Config]):
    """A network and its optimizer, advanced one step at a time, saved and resumed exactly.

    state_file: the name of the saved state in FOLDER/training. trains: what is trained, for error messages.
    """

    state_file: ClassVar[str]
    trains: ClassVar[str]

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> None:
        self.net, self.optimizer, self.config = net, optimizer, config
        self.step_number = 0
        self.seconds = 0.0
        self.stopping = False

    @abstractmethod
    def step(self) -> float:
        """One optimizer step. Returns its loss."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what the service loads into the model folder."""

    def modules(self) -> Mapping[str, nn.Module]:
        """The modules whose tensors are part of the state, by the prefix of their names."""
        return {"net": self.net}

    def stop(self) -> None:
        """Ask the loop to end after the current step."""
        self.stopping = True

    def step_seed(self) -> int:
        """The seed of the current step's draws."""
        return self.config.seed * 1_000_003 + self.step_number

    def set_learning_rate(self) -> None:
        """Give the optimizer the learning rate of the current step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step_number)

    def save(self, folder: Path) -> None:
        """Write the state to resume from, then the model folder, each file completely or not at all."""
        tensors = {
            f"{prefix}.{name}": value
            for prefix, module in self.modules().items()
            for name, value in module.state_dict().items()
        }
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        meta = {
            "step": str(self.step_number),
            "seconds": str(self.seconds),
            "config": json.dumps(asdict(self.config)),
        }
        path = folder / "training" / self.state_file
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            # Tensors follow the parameters' channels-last layout; safetensors stores row-major order.
            save_file({name: value.contiguous() for name, value in tensors.items()}, part, meta)
        self.export(folder)

    def resume(self, folder: Path) -> bool:
        """Restore what `save` wrote. Returns whether there was anything.

        Raises CheckpointError when it is the state of another network.
        """
        path = folder / "training" / self.state_file
        if not path.exists():
            return False
        device = str(next(self.net.parameters()).device)
        with safe_open(path, "pt", device) as file:
            meta = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        for prefix, module in self.modules().items():
            start = f"{prefix}."
            part = {
                name.removeprefix(start): value for name, value in state.items() if name.startswith(start)
            }
            try:
                module.load_state_dict(part)
            except RuntimeError as error:
                raise CheckpointError(f"{path}: the state of another {self.trains}") from error
        for name, parameter in self.net.named_parameters():
            if f"optimizer.step.{name}" not in state:  # saved before the first step
                continue
            kept = {key: state[f"optimizer.{key}.{name}"] for key in OPTIMIZER_STATE}
            for key in OPTIMIZER_STATE[1:]:  # in the parameter's memory layout
                kept[key] = torch.empty_like(parameter).copy_(kept[key])
            self.optimizer.state[parameter] = kept
        self.step_number, self.seconds = int(meta["step"]), float(meta.get("seconds", 0.0))
        return True


AnyTrainer = ResumableTrainer[Any]


def train(trainer: AnyTrainer, folder: Path, budget_s: float = math.inf) -> Generator[float, None, None]:
    """Train to the last step, a stop, or the end of the time budget, yielding each step's loss.

    Saves every `checkpoint_s` seconds and at the end, however the end comes about.
    """
    started = last_save = time.monotonic()
    before = trainer.seconds
    try:
        while (
            trainer.step_number < trainer.config.steps
            and not trainer.stopping
            and time.monotonic() - started < budget_s
        ):
            loss = trainer.step()
            trainer.seconds = before + time.monotonic() - started
            yield loss
            if time.monotonic() - last_save > trainer.config.checkpoint_s:
                trainer.save(folder)
                last_save = time.monotonic()
    finally:
        trainer.save(folder)


class Log:
    """Records of a training, a line of JSON each; a run that resumes keeps those up to its step."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.records: list[dict[str, Any]] = [record for record in found if record["step"] <= step]
        replace_text(path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@contextmanager
def attended(trainer: AnyTrainer, **options: Any) -> Iterator[tqdm[Any]]:
    """A progress bar over the steps, during which SIGTERM and SIGINT stop the trainer between two steps.

    A step that is cut in half could not be resumed exactly. options: of the bar.
    """
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: trainer.stop()) for number in signals]
    try:
        with tqdm(total=trainer.config.steps, initial=trainer.step_number, unit="step", **options) as bar:
            yield bar
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
