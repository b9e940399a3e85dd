"""Read a checkpoint file: tensors only, never code.

A pickle is read by torch's weights-only reader, which makes tensors, containers and numbers and refuses
everything else, but for a `Namespace` of options, as Lightning saves. What a training script wrapped around
the weights is taken off: a checkpoint becomes one flat table from dotted names to tensors, and a family's
weights are those below the prefix where its layers lie.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.convert.conversion import ConversionError, State
from model.folder import CheckpointError, check_regular

DDIM_STATES = ("model", "optimizer", "epoch", "step", "ema")
"""What lies at which place of the list that ermongroup/ddim saves."""


def read(path: Path) -> State:
    """Every tensor of a `.safetensors` or pickle file by its dotted name. Raises ConversionError."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            head = file.read(64)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path}: a Git LFS pointer, not the weights: run git lfs pull")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of another pickle protocol: it is read, or refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: {_why_unreadable(str(error))}") from error
    except Exception as error:  # a reader of pickles raises whatever damaged ones lead it to
        raise ConversionError(f"{path}: not a checkpoint ({_first_line(error)})") from error
    try:
        table = dict(_flatten(content))
    except RecursionError as error:  # a container may hold itself
        raise ConversionError(f"{path}: its containers are nested without an end") from error
    for name, tensor in table.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ConversionError(f"{path}: {name} is not a plain tensor")
        if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), 1):
            raise ConversionError(f"{path}: {name} has more values than are stored")
    return table


def weights_at(table: Mapping[str, Tensor], prefix: str) -> State:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in table.items() if name.startswith(prefix)}


def prefixes(table: Mapping[str, Tensor], anchors: Iterable[str]) -> list[str]:
    """The prefixes under which all of `anchors` lie, names that tell a family."""
    first, *others = anchors
    found = [name[: -len(first)] for name in table if name == first or name.endswith("." + first)]
    return [prefix for prefix in found if all(prefix + name in table for name in others)]


def choose_prefix(found: list[str], wanted: str | None = None) -> str:
    """The prefix of the weights to take: `wanted`, or the averaged (EMA) ones where there are any.

    Raises ConversionError where that does not leave one.
    """
    named = ", ".join(repr(prefix) for prefix in found)
    if wanted is not None:
        if wanted not in found and f"{wanted}." not in found:
            raise ConversionError(f"--weights {wanted}: there are none; there are {named}")
        return wanted if wanted in found else f"{wanted}."
    averaged = [prefix for prefix in found if is_ema(prefix)]
    left = averaged or found
    if len(left) > 1:
        raise ConversionError(f"more than one set of weights: give one of {named} as --weights")
    return left[0]


def is_ema(prefix: str) -> bool:
    """Do averaged weights lie there, by its name?"""
    return bool(re.search(r"(^|[._])(ema|shadow|averaged?|swa)([._]|$)", prefix)) and "online" not in prefix


def lightning_ema(table: Mapping[str, Tensor], prefix: str) -> State | None:
    """The averaged weights as CompVis's `LitEma` keeps them, or None.

    It names a tensor of `model.` as one of `model_ema.`, without the dots in between.
    """
    root, _, inner = prefix.partition("model.")
    names = {name: f"{root}model_ema.{(inner + name).replace('.', '')}" for name in weights_at(table, prefix)}
    if not all(name in table for name in names.values()):
        return None
    return {name: table[kept] for name, kept in names.items()}


def _flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, argparse.Namespace):
        return
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(content, list | tuple):
        is_ddim = not prefix and [isinstance(part, Mapping) for part in content] == [1, 1, 0, 0, 1]
        names = DDIM_STATES if is_ddim else range(len(content))
        for key, value in zip(names, content, strict=True):
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _why_unreadable(message: str) -> str:
    code = re.search(r"GLOBAL (\S+)", message)
    if code is None:
        return "not a checkpoint that can be read without running code"
    return (
        f"holds more than tensors ({code[1]}), and to read that would run code: where it was trained, save "
        "the weights alone, torch.save(model.state_dict(), FILE)"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
