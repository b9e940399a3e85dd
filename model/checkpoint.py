"""Model folders in diffusers' layout ⇄ a loaded model.

What model/layout.py finds is read; nested folders (`unet/`, `scheduler/`, `model_index.json`) are written.
Weights are safetensors, never pickles, which can run code when read. A `SHA256SUMS` beside them is checked
when there is one. Two things of ours may lie there too, which diffusers ignores: `typicality.json`,
statistics of the training images (model/typicality.py), and `classifier/`, for classifier guidance
(model/encoder.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from model import layout, memory, pipeline, self_test, typicality, weights
from model.condition import ConditionError, Part, channels_of, parts_of
from model.denoising_diffusion import CLASS_NAMES, DenoisingDiffusionConfig, DenoisingDiffusionUnet
from model.encoder import EncoderConfig, NoiseClassifier
from model.files import replace_text
from model.folder import MANIFEST, CheckpointError, check_manifest, is_there, manifest_of, read_json, sha256
from model.layout import CONFIG, SCHEDULER_CONFIG, Layout
from model.network import Network, NetworkConfig
from model.schedule import NoiseSchedule
from model.scheduler_config import DEFAULT_CLASS
from model.self_test import SelfTest
from model.typicality import Typicality, TypicalityError
from model.unet import ConfigError, UNet, UNetConfig
from model.unet_config import EMA_KEYS
from model.weights import WEIGHTS, Weights

__all__ = [
    "CLASSIFIER",
    "CLASSIFIER_WEIGHTS",
    "MANIFEST",
    "WEIGHTS",
    "Checkpoint",
    "CheckpointError",
    "check_manifest",
    "load",
    "save",
    "save_classifier",
    "weights_sha256",
    "write_manifest",
]

CLASSIFIER = "classifier"
CLASSIFIER_WEIGHTS = "model.safetensors"
Config = TypeVar("Config", UNetConfig, DenoisingDiffusionConfig)
MAX_NAME = 500
"""Characters of a class name. The longest of ImageNet has 122."""
CONFIGS = {layout.INDEX, CONFIG, SCHEDULER_CONFIG}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: the network in eval mode, its noise schedule, and its class names in index order.

    `null_class` is the label index of the unconditional branch, where the network was trained with one. A
    conditional network without class names takes any number as a label (`UNetConfig.labels`).
    `typicality` is there where the folder has such statistics.
    `classifier` is a noise-aware classifier of the same classes, where the folder has one.
    `condition` is what the network takes beside x, in order.
    `checksum` is the sha256 of the files that decide its results.
    `self_test` is one known result, where the folder has it.
    """

    name: str
    unet: Network
    schedule: NoiseSchedule
    scheduler_config: Mapping[str, Any]
    class_names: tuple[str, ...] = ()
    null_class: int | None = None
    typicality: Typicality | None = None
    classifier: NoiseClassifier | None = None
    condition: tuple[Part, ...] = ()
    checksum: str = ""
    self_test: SelfTest | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        inputs, height, width = self.unet.config.shape
        return channels_of(inputs, self.condition), height, width


def load(path: Path, *, sample_size: tuple[int, int] | None = None) -> Checkpoint:
    """Load the model that a path leads to. sample_size: (height, width), for one that does not say.

    Raises CheckpointError, in one line, when anything is wrong.
    """
    return read(layout.find(path), sample_size)


def read(found: Layout, sample_size: tuple[int, int] | None = None) -> Checkpoint:
    """Load a model whose files have been found. Raises CheckpointError when anything is wrong with them."""
    root = found.root
    _check_memory(found)
    check_manifest(
        root,
        [*_deciding(found), *filter(is_there, [root / self_test.FILE])],
        partial=layout.is_snapshot(root.resolve()),
    )
    scheduler_config = pipeline.as_declared(found.index, read_json(found.scheduler_config))
    content = read_json(found.config)
    try:
        pipeline.check_network(content)
        options = {name: value for name, value in content.items() if name not in EMA_KEYS}
        config = _config(options, sample_size)
        with torch.device("meta"):
            outline = _network(config)
    except (CheckpointError, ConfigError, TypeError) as error:
        raise CheckpointError(f"{found.config}: {error}") from error
    try:
        schedule = NoiseSchedule.from_diffusers(scheduler_config)
        config.check_timesteps(schedule.timesteps, schedule.timestep_scale)
    except (TypeError, ValueError, ArithmeticError) as error:  # a ScheduleError, or what is no number
        raise CheckpointError(f"{found.scheduler_config}: {error}") from error
    condition = _condition(config, schedule, found)
    unet = weights.build(outline, partial(_network, config), found.weights)
    names, null_class = _class_names(found.index, config, root)
    statistics = _load_typicality(found, schedule.timesteps)
    inputs, *size = config.shape
    shape = channels_of(inputs, condition), size[0], size[1]
    classifier = _load_classifier(root / CLASSIFIER, shape, len(names))
    return Checkpoint(
        found.name,
        unet.eval(),
        schedule,
        scheduler_config,
        names,
        null_class,
        statistics,
        classifier,
        condition,
        _checksum(found),
        _load_self_test(root, config),
    )


def _check_memory(found: Layout) -> None:
    """Raise CheckpointError for a network that would have the system end this process while it is loaded."""
    takes, left = memory.needed(found.weights.files), memory.available()
    if left is not None and takes > left:
        sizes = f"{takes / 1e9:.2f} GB of memory for its weights, and only {left / 1e9:.2f} GB are available"
        raise CheckpointError(f"{found.weights.path}: the network takes {sizes}")


def _checksum(found: Layout) -> str:
    """Of the files that decide a model's results. A manifest has them all read once more as well."""
    return sha256(*_deciding(found))


def _deciding(found: Layout) -> list[Path]:
    """The files that decide a model's results."""
    classifier = found.root / CLASSIFIER
    others = [found.root / layout.INDEX, classifier / CONFIG, classifier / CLASSIFIER_WEIGHTS]
    files = [*found.weights.files, found.config, found.scheduler_config]
    return [*files, *(path for path in others if path.is_file())]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that diffusers loads too, with a manifest of its checksums.

    Each file is replaced whole, and the manifest is removed first and written last, so that the folder loads
    even if this is interrupted. Statistics and self-test of the earlier weights are removed. Raises
    CheckpointError, and writes nothing, where the folder has weights that would be taken instead of these.
    """
    path = folder / "unet" / WEIGHTS
    for place in (folder / "unet_ema", folder / "unet"):
        if place.is_dir() and (others := [each for each in weights.copies(place) if each.files != (path,)]):
            raise CheckpointError(f"{others[0].path}: other weights of this model: choose another folder")
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    for about_earlier in (typicality.FILE, self_test.FILE):
        (folder / about_earlier).unlink(missing_ok=True)
    config = checkpoint.unet.config.to_diffusers()
    library, _, class_name = config["_class_name"].rpartition(".")
    index: dict[str, Any] = {
        "_class_name": "DDIMPipeline" if checkpoint.schedule.distilled else "DDPMPipeline",
        "unet": [library or "diffusers", class_name],
        "scheduler": ["diffusers", checkpoint.scheduler_config.get("_class_name", DEFAULT_CLASS)],
    }
    if checkpoint.class_names:
        index["id2label"] = {str(i): name for i, name in enumerate(checkpoint.class_names)}
    if checkpoint.condition:
        index["condition"] = list(checkpoint.condition)
    for file, content in (
        (folder / layout.INDEX, index),
        (folder / "unet" / CONFIG, config),
        (folder / "scheduler" / SCHEDULER_CONFIG, dict(checkpoint.scheduler_config)),
    ):
        replace_text(file, json.dumps(content, indent=2) + "\n")
    weights.save(path, checkpoint.unet)
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
    files = [
        path for path in found if path.suffix == ".safetensors" or path.name in {*CONFIGS, self_test.FILE}
    ]
    replace_text(folder / MANIFEST, manifest_of(folder, files))


def weights_sha256(path: Path) -> str:
    """The checksum of a model's weights, of all their files. Raises CheckpointError where there are none."""
    return sha256(*layout.find(path).weights.files)


def _config(config: Mapping[str, Any], size: tuple[int, int] | None) -> UNetConfig | DenoisingDiffusionConfig:
    """What a `unet/config.json` says, with this size. Raises ConfigError for what cannot be built here."""
    if config.get("_class_name") in CLASS_NAMES:
        return _sized(DenoisingDiffusionConfig.from_diffusers(config), size)
    return _sized(UNetConfig.from_diffusers(config), size)


def _network(config: UNetConfig | DenoisingDiffusionConfig) -> Network:
    if isinstance(config, DenoisingDiffusionConfig):
        return DenoisingDiffusionUnet(config)
    return UNet(config)


def _save_classifier(folder: Path, classifier: NoiseClassifier) -> None:
    part = folder / f"{CLASSIFIER}.part"  # both files or none: each is useless without the other
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    replace_text(part / CONFIG, json.dumps(classifier.config.to_dict(), indent=2) + "\n")
    weights.save(part / CLASSIFIER_WEIGHTS, classifier)
    shutil.rmtree(folder / CLASSIFIER, ignore_errors=True)
    part.rename(folder / CLASSIFIER)


def _sized(config: Config, size: tuple[int, int] | None) -> Config:
    """The network's options with this size. Raises ConfigError unless there is one size in the end."""
    if config.sample_size is None:
        if size is None:
            raise ConfigError("sample_size is missing: set DDPM_SAMPLE_SIZE, to 32 or 64x128 for example")
        return replace(config, sample_size=size)
    if size not in (None, config.sample_size):
        raise ConfigError(f"sample_size={config.sample_size}, where DDPM_SAMPLE_SIZE is {size}")
    return config


def _load_typicality(found: Layout, timesteps: int) -> Typicality | None:
    path = found.root / typicality.FILE
    if not is_there(path):
        return None
    try:
        statistics = typicality.load(path, timesteps)
    except TypicalityError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if statistics.weights_sha256 != sha256(*found.weights.files):
        raise CheckpointError(
            f"{path}: it is about other weights: remove it, and run python -m model.evaluation.anomaly again"
        )
    return statistics


def _load_self_test(root: Path, config: NetworkConfig) -> SelfTest | None:
    path = root / self_test.FILE
    if not is_there(path):
        return None
    _, height, width = config.shape
    found = self_test.load(path, config.out_channels * height * width)
    labels = range(config.labels or 1)
    if config.conditional != (found.label is not None) or (found.label or 0) not in labels:
        raise CheckpointError(f"{path}: its label is not one of this network")
    return found


def _load_classifier(place: Path, shape: tuple[int, int, int], classes: int) -> NoiseClassifier | None:
    """The classifier in `place`, or None where there is none. shape: (C, H, W) of the model's samples."""
    if not place.is_dir():
        return None
    path = place / CONFIG
    try:
        config = EncoderConfig.from_dict(read_json(path))
        with torch.device("meta"):
            outline = NoiseClassifier(config)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    found = config.in_channels, *config.sample_size, config.classes
    wanted = *shape, classes
    if found != wanted:
        raise CheckpointError(
            f"{path}: (channels, height, width, classes) are {found} where the network has {wanted}"
        )
    classifier = weights.build(
        outline, partial(NoiseClassifier, config), Weights((place / CLASSIFIER_WEIGHTS,))
    )
    return classifier.eval().requires_grad_(False)


def _condition(config: NetworkConfig, schedule: NoiseSchedule, found: Layout) -> tuple[Part, ...]:
    """What the network takes beside x. Raises CheckpointError where inputs and outputs do not fit."""
    inputs, outputs = config.in_channels, config.out_channels
    said = f"{found.config}: out_channels={outputs} with in_channels={inputs}"
    learned = schedule.learned_variance
    if learned and outputs % 2:
        raise CheckpointError(f"{said}; a learned variance needs an even number")
    # Twice as many outputs as inputs are a variance too, which a schedule may leave unused.
    channels = outputs // 2 if learned or outputs == 2 * inputs else outputs
    if channels > inputs:
        raise CheckpointError(f"{said}; the outputs are pictures, or pictures and variances, of the input")
    try:
        return parts_of(inputs - channels, channels, found.index.get("condition"))
    except ConditionError as error:
        raise CheckpointError(f"{said}: {error}") from error


def _class_names(
    index: Mapping[str, Any], config: NetworkConfig, folder: Path
) -> tuple[tuple[str, ...], int | None]:
    if not config.conditional:
        return (), None
    labels, embeds = index.get("id2label"), config.labels
    if labels is None:
        return tuple(str(i) for i in range(embeds or 0)), None
    try:
        names = tuple(str(labels[str(i)]) for i in range(len(labels)))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/model_index.json: id2label must count up from 0") from error
    if any(len(name) > MAX_NAME for name in names):
        raise CheckpointError(f"{folder}/model_index.json: a name longer than {MAX_NAME} characters")
    null_class = len(names) if embeds == config.num_class_embeds == len(names) + 1 else None
    if embeds is not None and null_class is None and embeds != len(names):
        raise CheckpointError(f"{folder}/model_index.json: {len(names)} names for {embeds} class embeddings")
    return names, null_class
