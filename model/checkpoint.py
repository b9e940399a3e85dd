"""Model folders in diffusers' layout ⇄ a loaded model.

Nested (`unet/`, `scheduler/`, `model_index.json`) and flat (config and weights at the root) folders
are read; nested ones are written. Weights are safetensors, never pickles, which can run code when
read. A `SHA256SUMS` beside them is checked when there is one. Two things of ours may lie there too, which
diffusers ignores: `typicality.json`, statistics of the training images (model/typicality.py), and
`classifier/`, for classifier guidance (model/encoder.py).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model import typicality
from model.encoder import EncoderConfig, NoiseClassifier
from model.files import replace_text, replacing
from model.schedule import SCHEDULERS, NoiseSchedule
from model.typicality import Typicality, TypicalityError
from model.unet import ConfigError, UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSIFIER = "classifier"
CLASSIFIER_WEIGHTS = "model.safetensors"
MANIFEST = "SHA256SUMS"
CONFIGS = {"model_index.json", "config.json", "scheduler_config.json"}
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class CheckpointError(ValueError):
    """A model folder cannot be loaded; the message is one line that names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: the network in eval mode, its noise schedule, and its class names in index order.

    `null_class` is the label index of the unconditional branch, where the network was trained with one.
    `typicality` is there where the folder has such statistics.
    `classifier` is a noise-aware classifier of the same classes, where the folder has one.
    """

    name: str
    unet: UNet
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    null_class: int | None = None
    typicality: Typicality | None = None
    classifier: NoiseClassifier | None = None


def load(folder: Path) -> Checkpoint:
    """Load a diffusers folder. Raises CheckpointError, with one clear line, when anything is wrong."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    check_manifest(folder)
    nested = (folder / "unet").is_dir()
    place = folder / "unet" if nested else folder
    index = _read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    scheduler_config = _read_json(scheduler_folder / "scheduler_config.json")
    try:
        config = UNetConfig.from_diffusers(_read_json(place / "config.json"))
        unet = UNet(config)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{place / 'config.json'}: {error}") from error
    try:
        schedule = NoiseSchedule.from_diffusers(scheduler_config)
    except (TypeError, ValueError) as error:  # a ScheduleError, or something that is not a number
        raise CheckpointError(f"{scheduler_folder / 'scheduler_config.json'}: {error}") from error
    learned = schedule.variance_type == "learned_range"
    if config.out_channels not in (config.in_channels, 2 * config.in_channels) or (
        learned and config.out_channels == config.in_channels
    ):
        wanted = "twice as many" if learned else "as many, or twice as many"
        found = f"out_channels={config.out_channels} with in_channels={config.in_channels}"
        raise CheckpointError(f"{place / 'config.json'}: {found}; there must be {wanted}")
    _load_weights(unet, place)
    names, null_class = _class_names(index, config.num_class_embeds, folder)
    name, statistics = folder.resolve().name, _load_typicality(folder)
    classifier = _load_classifier(folder / CLASSIFIER, config, len(names))
    return Checkpoint(
        name, unet.eval(), schedule, scheduler_config, names, null_class, statistics, classifier
    )


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that diffusers loads too, with a manifest of its checksums.

    Each file is replaced whole, and the manifest is removed first and written last, so that the folder loads
    even if this is interrupted. Statistics of the earlier weights are removed.
    """
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / typicality.FILE).unlink(missing_ok=True)
    index: dict[str, Any] = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", checkpoint.scheduler_config.get("_class_name", SCHEDULERS[0])],
    }
    if checkpoint.class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(checkpoint.class_names)}
    for path, content in (
        (folder / "model_index.json", index),
        (folder / "unet" / "config.json", checkpoint.unet.config.to_diffusers()),
        (folder / "scheduler" / "scheduler_config.json", dict(checkpoint.scheduler_config)),
    ):
        replace_text(path, json.dumps(content, indent=2) + "\n")
    _save_weights(folder / "unet" / WEIGHTS, checkpoint.unet)
    if checkpoint.classifier is not None:
        _save_classifier(folder, checkpoint.classifier)
    write_manifest(folder)


def save_classifier(folder: Path, classifier: NoiseClassifier) -> None:
    """Put a classifier into a model folder, replacing any other, as safely as `save` does."""
    (folder / MANIFEST).unlink(missing_ok=True)
    _save_classifier(folder, classifier)
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record the sha256 of the files that make up the model, as `sha256sum` prints it.

    Other files in the folder (a training state, an evaluation) are not part of it.
    """
    places = [folder, folder / "unet", folder / "scheduler", folder / CLASSIFIER]
    found = [path for place in places for path in place.glob("*")]
    files = sorted(path for path in found if path.suffix == ".safetensors" or path.name in CONFIGS)
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    replace_text(folder / MANIFEST, "".join(lines))


def weights_sha256(folder: Path) -> str:
    """The checksum of a model folder's weights file. Raises CheckpointError where there is none."""
    return _sha256(_weights_of(folder / "unet" if (folder / "unet").is_dir() else folder))


def check_manifest(folder: Path) -> None:
    """Compare the folder with its manifest, when it has one. Raises CheckpointError at a difference."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    for line in manifest.read_text().splitlines():
        expected, path = line[:64], folder / line[66:]  # two characters apart: "  ", or " *" for binary mode
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing")
        if _sha256(path) != expected:
            raise CheckpointError(f"{path}: its sha256 is not the one in {MANIFEST}")


def _save_weights(path: Path, module: nn.Module) -> None:
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    with replacing(path) as part:
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it private, and a service often runs as another user


def _save_classifier(folder: Path, classifier: NoiseClassifier) -> None:
    part = folder / f"{CLASSIFIER}.part"  # both files or none: each is useless without the other
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    replace_text(part / "config.json", json.dumps(classifier.config.to_dict(), indent=2) + "\n")
    _save_weights(part / CLASSIFIER_WEIGHTS, classifier)
    shutil.rmtree(folder / CLASSIFIER, ignore_errors=True)
    part.rename(folder / CLASSIFIER)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return content


def _load_typicality(folder: Path) -> Typicality | None:
    path = folder / typicality.FILE
    if not path.exists():
        return None
    try:
        found = typicality.load(path)
    except TypicalityError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if found.weights_sha256 != weights_sha256(folder):
        raise CheckpointError(
            f"{path}: it is about other weights: remove it, and run python -m model.evaluation.anomaly again"
        )
    return found


def _weights_of(place: Path) -> Path:
    path = place / WEIGHTS
    if path.exists():
        return path
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    pickles = sorted(p.name for p in place.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickles:
        raise CheckpointError(
            f"{place}: only a pickle ({pickles[0]}), which can run code when read; convert it once, if "
            "you trust it, with diffusers: UNet2DModel.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    raise CheckpointError(f"{path}: missing")


def _load_weights(unet: UNet, place: Path) -> None:
    path = _weights_of(place)
    _fill(unet, path)


def _load_classifier(place: Path, network: UNetConfig, classes: int) -> NoiseClassifier | None:
    """The classifier in `place`, or None where there is none."""
    if not place.is_dir():
        return None
    path = place / "config.json"
    try:
        config = EncoderConfig.from_dict(_read_json(path))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    found = config.in_channels, config.sample_size, config.classes
    wanted = network.in_channels, network.sample_size, classes
    if found != wanted:
        raise CheckpointError(
            f"{path}: (in_channels, sample_size, classes) are {found} where the network has {wanted}"
        )
    classifier = NoiseClassifier(config).eval().requires_grad_(False)
    _fill(classifier, place / CLASSIFIER_WEIGHTS)
    return classifier


def _fill(module: nn.Module, path: Path) -> None:
    """Read a network's weights. Raises CheckpointError unless they are exactly its own."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    legacy = re.compile(rf"\.({'|'.join(LEGACY_ATTENTION)})\.(weight|bias)$")
    state = {
        legacy.sub(lambda m: f".{LEGACY_ATTENTION[m[1]]}.{m[2]}", name): tensor.to(torch.float32)
        for name, tensor in state.items()
    }
    own = module.state_dict()
    for name in (*own, *state):
        if name not in state or name not in own:
            raise CheckpointError(f"{path}: {name} is {'missing' if name in own else 'not in the network'}")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} where the network has {tuple(own[name].shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}")
    module.load_state_dict(state)


def _class_names(
    index: Mapping[str, Any], embeds: int | None, folder: Path
) -> tuple[tuple[str, ...], int | None]:
    if embeds is None:
        return (), None
    labels = index.get("id2label")
    if labels is None:
        return tuple(str(i) for i in range(embeds)), None
    try:
        names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/model_index.json: id2label must count up from 0") from error
    if len(names) not in (embeds, embeds - 1):
        raise CheckpointError(f"{folder}/model_index.json: {len(names)} names for {embeds} class embeddings")
    return names, (embeds - 1 if len(names) == embeds - 1 else None)
