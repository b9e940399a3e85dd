"""diffusers' own `UNet2DModel`: folders whose weights are pickles, and state dicts beside their config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model import pipeline, weights
from model.condition import PARTS
from model.convert import source
from model.convert.conversion import (
    Choices,
    Conversion,
    ConversionError,
    State,
    sample_size,
    scheduler_config,
)
from model.folder import CheckpointError, read_json
from model.layout import CONFIG, INDEX, SCHEDULER_CONFIG
from model.unet_config import EMA_KEYS
from model.weights import PICKLES, Weights

FAMILY = "diffusers' UNet2DModel"
ANCHORS = ("time_embedding.linear_1.weight", "conv_in.weight", "conv_norm_out.weight")
WEIGHTS = "diffusion_pytorch_model"
SUFFIXES = (".safetensors", ".bin")


def convert(state: State, choices: Choices) -> Conversion:
    """A state dict of it, with `--config` for its shape."""
    path = choices.need("config", f"a state dict of {FAMILY} does not say its config")
    config, state = _with_classes(_config(path, choices), state, choices)
    return Conversion(FAMILY, config, state, _scheduler(choices, None, {}))


def convert_folder(folder: Path, choices: Choices) -> tuple[Conversion, str]:
    """A pipeline or model folder. Returns also what was taken of it, in words.

    Raises ConversionError for another pipeline than one of a `UNet2DModel` in pixels.
    """
    index = _read(folder / INDEX) if (folder / INDEX).exists() else {}
    try:
        parts = pipeline.components_of(index)
    except CheckpointError as error:
        raise ConversionError(f"{folder / INDEX}: {error}") from error
    names = (f"{parts.network}_ema", parts.network, "")
    place = next((folder / name for name in names if (folder / name / CONFIG).exists()), None)
    if place is None:
        raise ConversionError(f"{folder}: no {CONFIG} in it, in {parts.network}/ or in {parts.network}_ema/")
    schedulers = (folder / name / SCHEDULER_CONFIG for name in (parts.scheduler, "", place.name))
    config = _config(place / CONFIG, choices)
    scheduler = _scheduler(choices, next((path for path in schedulers if path.exists()), None), index)
    chosen = _weights(place)
    files = chosen.files
    state = {name: tensor for file in files for name, tensor in source.read(file).items()}
    config, state = _with_classes(config, state, choices)
    is_ema = chosen.is_ema or place.name.endswith("_ema")
    averaged = ", the averaged (EMA) weights" if is_ema else ""
    taken = f"{', '.join(str(file) for file in files)}{averaged}"
    condition = tuple(part for part in index.get("condition") or () if part in PARTS)
    return Conversion(FAMILY, config, state, scheduler, index.get("id2label"), condition), taken


def _config(path: Path, choices: Choices) -> dict[str, Any]:
    config = {name: value for name, value in _read(path).items() if name not in EMA_KEYS}
    try:
        pipeline.check_network(config)
    except CheckpointError as error:
        raise ConversionError(f"{path}: {error}") from error
    if (size := choices.given("sample_size")) is not None:
        config["sample_size"] = sample_size(size)
    elif config.get("sample_size") is None:
        raise ConversionError(f"{path}: it has no sample_size: give --sample-size")
    return config


def _with_classes(config: dict[str, Any], state: State, choices: Choices) -> tuple[dict[str, Any], State]:
    """A network that takes a class's vector (class_embed_type `identity`) as one that takes the class.

    It adds the vector to the embedding of the timestep, as others add a row of their table of classes: with
    the vectors it was trained with as that table, it is one of them. Raises ConversionError without them.
    """
    if config.get("class_embed_type") != "identity":
        return config, state
    path = choices.need("class_vectors", "class_embed_type=identity: it takes vectors, which are not in it")
    tables = list(source.read(path).values())
    if len(tables) != 1 or tables[0].ndim != 2:
        raise ConversionError(f"{path}: one tensor is expected, [classes, width]")
    config |= {"class_embed_type": None, "num_class_embeds": len(tables[0])}
    return config, {**state, "class_embedding.weight": tables[0]}


def _scheduler(choices: Choices, found: Path | None, index: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one that the command line names, or the one that lies in the folder, or diffusers' default."""
    if (path := choices.given("scheduler_config")) is not None:
        return _read(path)
    if found is not None:
        return pipeline.as_declared(index, _read(found))
    return scheduler_config(choices, "the default of diffusers' DDPMScheduler")


def _weights(place: Path) -> Weights:
    """The copy of the weights that is taken, by the rule of model/weights.py; of equals, no pickle.

    Raises ConversionError where there is none, or where the names do not say which of several.
    """
    try:
        safe, pickled = (
            [each for each in weights.copies(place, suffix) if each.variant is not None]
            for suffix in SUFFIXES
        )
        if found := pickled if pickled and not (safe and safe[0].rank <= pickled[0].rank) else safe:
            return weights.best_of(found, place)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    others = sorted(path for path in place.iterdir() if path.suffix in {".safetensors", *PICKLES})
    if len(others) == 1:  # under another name
        return Weights((others[0],), None)
    there = ", ".join(path.name for path in others) or "no weights"
    raise ConversionError(f"{place}: {WEIGHTS}.bin is missing; there are {there}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
