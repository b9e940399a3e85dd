"""What a conversion results in, and the tools that all families use for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.condition import Part

State = dict[str, Tensor]
EPSILON_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
}
"""The noise schedule of Ho et al. 2020, §4, and an ε prediction."""


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message is one line that says what it is and why not."""


@dataclass(frozen=True)
class Conversion:
    """A model in diffusers' terms.

    unet: a `unet/config.json`. weights: by `UNet2DModel`'s names. scheduler: a `scheduler_config.json`.
    labels: `id2label` of the `model_index.json`, where the class names are known. condition: what the network
    takes beside x, in order, where that has to be said (model/condition.py).
    """

    family: str
    unet: Mapping[str, Any]
    weights: State
    scheduler: Mapping[str, Any]
    labels: Mapping[str, str] | None = None
    condition: tuple[Part, ...] = ()


@dataclass(frozen=True)
class ClassifierConversion:
    """A noise-aware classifier for a model folder. config: a `classifier/config.json`."""

    family: str
    config: Mapping[str, Any]
    weights: State


def flag(option: str) -> str:
    """How an option is given on the command line."""
    return "--" + option.replace("_", "-")


def spelled(option: str, value: Any) -> str:
    """An option with its value, as the command line takes it."""
    if isinstance(value, bool):
        return flag(option if value else f"no_{option}")
    if isinstance(value, tuple):
        value = ("x" if option == "sample_size" else ",").join(map(str, value))
    return f"{flag(option)} {value}"


class Choices:
    """What a checkpoint does not say: taken from the command line, or assumed, which is recorded.

    assumed: for each option that was not given, how to give what was assumed, and the reason.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self._given = {name: value for name, value in (given or {}).items() if value is not None}
        self._asked: set[str] = set()
        self.assumed: dict[str, str] = {}

    def given(self, option: str) -> Any:
        """What the command line says, or None."""
        self._asked.add(option)
        return self._given.get(option)

    def choose(self, option: str, default: Any, why: str) -> Any:
        """What the command line says, or else the default."""
        value = self.given(option)
        if value is None:
            self.assumed[option] = f"{spelled(option, default)} ({why})"
            return default
        return value

    def need(self, option: str, why: str) -> Any:
        """What the command line says. Raises ConversionError where it says nothing."""
        value = self.given(option)
        if value is None:
            raise ConversionError(f"{why}: give {flag(option)}")
        return value

    def check_all_used(self, family: str) -> None:
        """Raises ConversionError for an option that the family has no use for."""
        for option in self._given.keys() - self._asked:
            raise ConversionError(f"{flag(option)} means nothing for a checkpoint of {family}")


class Renaming:
    """A state dict on its way from one project's names to diffusers'."""

    def __init__(self, state: Mapping[str, Tensor], family: str) -> None:
        self._left, self._family = dict(state), family
        self._moved: State = {}

    def has(self, name: str) -> bool:
        """Is there such a tensor that has not been taken?"""
        return name in self._left

    def take(self, name: str) -> Tensor:
        """Remove a tensor and return it. Raises ConversionError where there is none."""
        if name not in self._left:
            raise ConversionError(f"{name} is missing, which a checkpoint of {self._family} has")
        return self._left.pop(name)

    def put(self, name: str, tensor: Tensor) -> None:
        """Add a tensor to the result."""
        self._moved[name] = tensor

    def layer(self, source: str, target: str) -> None:
        """Move the weight and bias of a layer."""
        for kind in ("weight", "bias"):
            self.put(f"{target}.{kind}", self.take(f"{source}.{kind}"))

    def block(self, source: str, target: str, layers: Mapping[str, str]) -> None:
        """Move the layers of a residual block, and its shortcut where it has one."""
        for theirs, ours in layers.items():
            if ours != "conv_shortcut" or self.has(f"{source}.{theirs}.weight"):
                self.layer(f"{source}.{theirs}", f"{target}.{ours}")

    def finish(self) -> State:
        """The result. Raises ConversionError where a tensor is left: none is ignored."""
        for name in self._left:
            raise ConversionError(f"{name} is a weight that {self._family} is not known to have")
        return self._moved


def indices(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The numbers that stand in the names at the group of `pattern`, a regular expression; rising."""
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


def scheduler_config(choices: Choices, why: str, **defaults: Any) -> dict[str, Any]:
    """A `scheduler_config.json` from the command line, a family's defaults, and those of Ho et al.

    why: where the defaults come from.
    """
    config: dict[str, Any] = {"_class_name": "DDPMScheduler", "clip_sample": True}
    for name, default in (EPSILON_SCHEDULE | defaults).items():
        if name in ("beta_start", "beta_end") and config["beta_schedule"] == "squaredcos_cap_v2":
            continue  # which has no range
        config[name] = choices.choose(name, default, why)
    return config


def sample_size(size: tuple[int, int]) -> int | list[int]:
    """(height, width) as a config has it: one number where the image is square."""
    return size[0] if size[0] == size[1] else list(size)
