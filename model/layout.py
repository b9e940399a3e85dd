"""Where things lie in what a model's path leads to, and which of several copies is taken.

A path may lead to a pipeline folder (`unet/`, `scheduler/`, `model_index.json`), to a flat one (config and
weights side by side), to the network of a pipeline (`…/unet`), to one file of weights in any of these, or
to the folder that huggingface_hub caches a repository in. Moving averages are preferred wherever there are
any: `unet_ema/`, as diffusers' EMAModel writes it, to `unet/`, and the variant `ema` of a file to others. A
network or a file that the path itself names is taken, whatever else there is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import pipeline, weights
from model.folder import CheckpointError, is_there, read_json, read_small
from model.unet_config import EMA_KEYS
from model.weights import Weights

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"


@dataclass(frozen=True)
class Layout:
    """The files of a model. root: the folder of all of it. network: that of its config, and of its weights.

    index: the content of `model_index.json`, empty where there is none. is_ema: whether the weights are
    moving averages; None where nothing says so.
    """

    root: Path
    network: Path
    weights: Weights
    scheduler_config: Path
    index: Mapping[str, Any]
    is_ema: bool | None

    @property
    def config(self) -> Path:
        """The network's config."""
        return self.network / CONFIG

    @property
    def name(self) -> str:
        """What the model is called: as its folder, or as its repository on the Hub."""
        root = self.root.resolve()
        if is_snapshot(root):
            return root.parent.parent.name.rpartition("--")[2]
        return root.name


def is_snapshot(root: Path) -> bool:
    """Whether a folder is what huggingface_hub has downloaded of a repository, which may not be all of it."""
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def find(path: Path) -> Layout:
    """Find a model's files. Raises CheckpointError where there is no model that could be served."""
    try:
        path.stat()
        return _find(_named(path))
    except RuntimeError as error:  # pathlib, of a loop of symbolic links
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "no such folder" if missing else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{error.filename or path}: {problem}") from error


def _find(path: Path) -> Layout:
    if not path.is_dir():
        file = _weights_file(path)
        return _of_network(_named(path.parent), file)
    if (path / "snapshots").is_dir() and (path / "refs").is_dir():
        path = _latest_snapshot(path)
    if _is_component(path):
        return _of_network(path, weights.choose(path, path))
    index, components = _read_index(path)
    network, chosen = _choose_network(path, components.network)
    return _layout(path, network, chosen, index, components)


def _named(folder: Path) -> Path:
    """The same folder, by a path that says what it is in."""
    return folder.resolve() if folder.name in ("", "..") else folder


def _weights_file(path: Path) -> Weights:
    if path.suffix in weights.PICKLES:
        raise weights.pickle_error(path, path)
    if path.suffix == ".dduf":
        folder = path.with_suffix("")
        raise CheckpointError(f"{path}: unpack it (unzip {path.name} -d {folder.name}) and give that folder")
    if path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(f"{path}: neither a model folder nor a safetensors file")
    if not (path.parent / CONFIG).exists():
        raise CheckpointError(
            f"{path}: the network's {CONFIG} must lie beside it, and {SCHEDULER_CONFIG} or ../scheduler"
        )
    return weights.named(path)


def _of_network(network: Path, chosen: Weights) -> Layout:
    """The layout around a network that was asked for in particular."""
    root = network.parent if _is_component(network) else network
    index, components = _read_index(root)
    return _layout(root, network, chosen, index, components)


def _is_component(folder: Path) -> bool:
    """Whether a folder is the network of a pipeline, whose other parts lie above it."""
    if (folder / INDEX).exists() or (folder / SCHEDULER_CONFIG).exists() or not (folder / CONFIG).exists():
        return False
    above = folder.absolute().parent
    return (above / INDEX).exists() or (above / "scheduler" / SCHEDULER_CONFIG).exists()


def _read_index(root: Path) -> tuple[Mapping[str, Any], pipeline.Components]:
    """What `model_index.json` says: a checkpoint of a training run is of the pipeline in the folder above."""
    path = root / INDEX
    if not path.exists() and not any((root / place).exists() for place in ("scheduler", SCHEDULER_CONFIG)):
        path = root.absolute().parent / INDEX
    index = read_json(path) if is_there(path) else {}
    try:
        return index, pipeline.components_of(index)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _choose_network(root: Path, name: str) -> tuple[Path, Weights]:
    """The folder of the network, and its weights: moving averages if there are any that can be read."""
    places = [root / f"{name}_ema", root / name, root]
    found = [place for place in places if (place / CONFIG).exists()]
    if not found:
        raise _no_network(root, name)
    readable = [place for place in found if weights.copies(place)]
    network = (readable or found)[0]
    chosen = weights.choose(network, root)
    for place in found[: found.index(network)]:
        logger.warning(
            "%s: not taken, since its weights are not safetensors (python -m model.convert)", place
        )
    passed_over = [
        *(place for place in readable if place != network),
        *(each.path for each in weights.copies(network) if each != chosen),
    ]
    if passed_over:
        logger.info("taken: %s; not: %s", chosen.path, ", ".join(map(str, passed_over)))
    return network, chosen


def _no_network(root: Path, name: str) -> CheckpointError:
    if (root / name).is_dir():
        return CheckpointError(f"{root / name / CONFIG}: missing")
    below = [child.name for child in sorted(root.iterdir()) if _has_network(child, name)]
    if below:
        return CheckpointError(f"{root / CONFIG}: missing; there are models in {', '.join(below)}: give one")
    pickles = [path for path in sorted(root.iterdir()) if path.suffix in weights.PICKLES]
    if pickles:
        return weights.pickle_error(pickles[0], pickles[0])
    return CheckpointError(f"{root / CONFIG}: missing")


def _has_network(folder: Path, name: str) -> bool:
    return any((folder / place / CONFIG).exists() for place in (name, f"{name}_ema"))


def _layout(
    root: Path,
    network: Path,
    chosen: Weights,
    index: Mapping[str, Any],
    components: pipeline.Components,
) -> Layout:
    is_ema = chosen.is_ema
    if is_ema is None and (network.name.endswith("_ema") or EMA_KEYS & read_json(network / CONFIG).keys()):
        is_ema = True
    if is_ema is False or (is_ema is None and (root / f"{network.name}_ema").is_dir()):
        is_ema = False
        logger.warning("%s: not moving averages of the weights, which give better pictures", chosen.path)
    return Layout(root, network, chosen, _scheduler_config(root, network, components), index, is_ema)


def _scheduler_config(root: Path, network: Path, components: pipeline.Components) -> Path:
    """Where the noise schedule is described. Raises CheckpointError where it is not."""
    usual = root / components.scheduler / SCHEDULER_CONFIG
    places = [usual, root / SCHEDULER_CONFIG, network / SCHEDULER_CONFIG]
    if found := next((place for place in places if place.exists()), None):
        return found
    above = root.absolute().parent / components.scheduler / SCHEDULER_CONFIG
    if above.exists():  # a checkpoint of a training run, whose final model lies above it
        logger.info("the noise schedule is that of %s", above)
        return above
    missing = usual if usual.parent.is_dir() else root / SCHEDULER_CONFIG
    raise CheckpointError(f"{missing}: missing: it says what noise the network was trained with")


def _latest_snapshot(repository: Path) -> Path:
    """The snapshot of a cached repository that its main branch was at, or else the only one."""
    main = repository / "refs" / "main"
    if main.is_file():
        commit = read_small(main).decode(errors="replace").strip()
        if not commit.isalnum():
            raise CheckpointError(f"{main}: {commit!r} is not the name of a commit")
        return repository / "snapshots" / commit
    snapshots = sorted((repository / "snapshots").iterdir())
    if len(snapshots) != 1:
        raise CheckpointError(f"{repository}: {len(snapshots)} snapshots: give the path of one")
    return snapshots[0]
