"""What a pipeline folder says that it is: `model_index.json`, and the class in a network's `config.json`.

A folder whose parts could be read is still refused where they are not the whole of the model: the U-Net of
a latent diffusion model has the same files as one of pixels, and would be served as noise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from model import denoising_diffusion
from model.folder import CheckpointError

logger = logging.getLogger(__name__)

NETWORKS = ("UNet2DModel", *denoising_diffusion.CLASS_NAMES)
REASONS = {
    "UNet2DConditionModel": "is conditioned on text or other embeddings",
    "UNet1DModel": "works on sound or trajectories, not on pictures",
    "UNet3D*": "makes video",
    "UNetMotion*": "makes video",
    "UNetSpatioTemporal*": "makes video",
    "*Transformer*": "is a transformer, not a U-Net",
    "UVit*": "is a transformer, not a U-Net",
    "Autoencoder*": "decodes latents: this is latent diffusion, which does not work on pixels",
    "VQModel": "decodes latents: this is latent diffusion, which does not work on pixels",
    "Mel": "turns sound into spectrograms and back",
    "AudioDiffusion*": "turns sound into spectrograms and back",
    "*Tokenizer*": "reads text: the network is conditioned on it",
    "CLIP*": "reads text or pictures: the network is conditioned on it",
    "T5*": "reads text: the network is conditioned on it",
    "ControlNet*": "is a second network, which steers the first",
    "*Adapter*": "is a second network, which steers the first",
}
"""Why a component of this class is refused, by its class's name."""


OURS = {"id2label", "condition"}
"""Keys of `model_index.json` that name no component: class names, and what the network takes beside x."""


OWN_SCHEDULERS = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
"""Pipelines that run by this scheduler, whichever they are given."""


class Components(NamedTuple):
    """The folders, by name, of a pipeline's network and of its scheduler."""

    network: str = "unet"
    scheduler: str = "scheduler"


def components_of(index: Mapping[str, Any]) -> Components:
    """The components of a pipeline of one pixel-space U-Net and one scheduler, from its `model_index.json`.

    Raises CheckpointError, without the file's name, for every other kind of pipeline.
    """
    found = _classes(index)
    kind = index.get("_class_name", "pipeline")
    networks = [name for name, class_name in found.items() if class_name in NETWORKS]
    schedulers = [name for name, class_name in found.items() if class_name.endswith("Scheduler")]
    for name, class_name in found.items():
        if name not in (*networks, *schedulers):
            why = reason(class_name) or "is nothing that can be served here"
            raise CheckpointError(f"a {kind} with {name} ({class_name}), which {why}")
    for name in (*networks, *schedulers):
        if Path(name).name != name or name == ".." or "\0" in name:
            raise CheckpointError(f"a {kind} with {name!r}, which is not the name of a folder")
    for many, what in ((networks, "networks"), (schedulers, "schedulers")):
        if len(many) > 1:
            raise CheckpointError(f"a {kind} with {len(many)} {what} ({', '.join(many)}): one can be served")
    if found and not networks:
        raise CheckpointError(f"a {kind} without a {NETWORKS[0]}")
    default = Components()
    return Components(
        networks[0] if networks else default.network, schedulers[0] if schedulers else default.scheduler
    )


def as_declared(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as diffusers reads it: by the class that `model_index.json` says.

    The class in the config itself is only who wrote it. The two differ where a scheduler was exchanged by
    hand, and decide, for example, whether x₀ is clipped.
    """
    kind = index.get("_class_name")
    own = OWN_SCHEDULERS.get(kind) if isinstance(kind, str) else None
    declared = own or next((name for name in _classes(index).values() if name.endswith("Scheduler")), None)
    written = config.get("_class_name")
    if declared in (None, written) or not isinstance(written, str | None):
        return dict(config)
    if written is not None:
        logger.warning(
            "the scheduler is a %s, as the pipeline says, although its config was written by a %s",
            declared,
            written,
        )
    return {**config, "_class_name": declared}


def check_network(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError, without the file's name, unless a network's config is of one of NETWORKS."""
    kind = config.get("_class_name", NETWORKS[0])
    if kind not in NETWORKS:
        why = reason(str(kind)) or "is another network"
        raise CheckpointError(f"a {kind}, which {why} (served here: {', '.join(NETWORKS)})")


def _classes(index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each component, by the component's name."""
    found: dict[str, str] = {}
    for name, value in index.items():
        match value:
            case [library, str(class_name)] if not name.startswith("_") and name not in OURS:
                whole = f"{library}.{class_name}"
                found[name] = whole if whole in NETWORKS else class_name
    return found


def reason(class_name: str) -> str | None:
    """Why a model with a component of this class cannot be served, where that is known."""
    return next((why for pattern, why in REASONS.items() if fnmatchcase(class_name, pattern)), None)
