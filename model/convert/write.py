"""Write a conversion as a model folder, and make sure that it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import checkpoint
from model.checkpoint import CLASSIFIER, WEIGHTS, CheckpointError
from model.convert.conversion import ClassifierConversion, Conversion, ConversionError
from model.encoder import EncoderConfig, NoiseClassifier
from model.unet_config import ConfigError


def write(folder: Path, conversion: Conversion) -> None:
    """Write a new folder in diffusers' layout, in float32, with a manifest of its checksums.

    It takes its name once `model.checkpoint` has loaded it, so all of its weights are those of its network.
    Raises ConversionError where it does not load, or where the folder holds something already.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConversionError(f"{folder}: it is there already; name a new folder")
    part = folder.absolute().with_name(folder.absolute().name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(part, conversion)
        checkpoint.load(part)
        part.rename(folder)
    except CheckpointError as error:
        reason = str(error).replace(str(part), str(folder))
        raise ConversionError(f"{conversion.family}: the result does not load: {reason}") from error
    except OSError as error:
        raise ConversionError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_classifier(folder: Path, conversion: ClassifierConversion) -> None:
    """Put a classifier into a model folder that has none.

    Raises ConversionError, and leaves the folder as it was, where it is not one for that model.
    """
    if (folder / CLASSIFIER).exists():
        raise ConversionError(f"{folder / CLASSIFIER}: it is there already; remove it first")
    try:
        checkpoint.load(folder)
        config = EncoderConfig.from_dict(conversion.config)
        classifier = NoiseClassifier(config)
        classifier.load_state_dict(conversion.weights)
    except CheckpointError as error:
        raise ConversionError(f"{conversion.family} goes into a model folder: {error}") from error
    except (ConfigError, RuntimeError) as error:
        raise ConversionError(f"{conversion.family}: {' '.join(str(error).split())}") from error
    checkpoint.save_classifier(folder, classifier)
    try:
        checkpoint.load(folder)
    except CheckpointError as error:
        shutil.rmtree(folder / CLASSIFIER)
        checkpoint.write_manifest(folder)
        raise ConversionError(f"{conversion.family} is not one for this model: {error}") from error


def _write(folder: Path, conversion: Conversion) -> None:
    scheduler_class = conversion.scheduler.get("_class_name", "DDPMScheduler")
    library, _, class_name = conversion.unet["_class_name"].rpartition(".")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": [library or "diffusers", class_name],
        "scheduler": ["diffusers", scheduler_class],
        **({} if conversion.labels is None else {"id2label": conversion.labels}),
        **({"condition": list(conversion.condition)} if conversion.condition else {}),
    }
    for path, content in (
        (folder / "model_index.json", index),
        (folder / "unet" / "config.json", conversion.unet),
        (folder / "scheduler" / "scheduler_config.json", conversion.scheduler),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    # Copies of their own: what lies in one memory, as two parts of a tensor do, safetensors does not store.
    weights = {
        name: tensor.detach().to(torch.float32, copy=True).contiguous()
        for name, tensor in conversion.weights.items()
    }
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    (folder / "unet" / WEIGHTS).chmod(0o644)  # safetensors makes it private, a service is often another user
    checkpoint.write_manifest(folder)
