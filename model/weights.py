"""A network's weights on disk: which of the copies in a folder, read into the network, and written.

Weights are safetensors, never pickles, which can run code when read. A folder may hold several copies:
diffusers names a variant of a file (`diffusion_pytorch_model.fp16.safetensors`) and cuts a large one into
shards, which an index lists.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.files import replacing
from model.folder import CheckpointError, read_json, refuse_pointer

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PRECISIONS = ("fp64", "fp32", "", "fp16", "bf16", "fp8")
"""What a variant may say of its precision, the best first."""

_NAME = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>.+))?\.safetensors")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r".+?\.safetensors(?:\.(?P<before>.+))?\.index(?:\.(?P<after>.+))?\.json")
_LEGACY = re.compile(rf"\.({'|'.join(LEGACY_ATTENTION)})\.(weight|bias)$")
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # of torch.compile, of DataParallel


@dataclass(frozen=True)
class Weights:
    """The files that together hold a network's weights.

    variant: what the name says beside that they are weights ("ema", "fp16"); None for a name of another kind.
    """

    files: tuple[Path, ...]
    variant: str | None = ""

    @property
    def path(self) -> Path:
        """What messages call them: the file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    @property
    def is_ema(self) -> bool | None:
        """Whether they are moving averages, as far as the variant says."""
        parts = self._parts
        return True if "ema" in parts else False if "non_ema" in parts else None

    @property
    def rank(self) -> tuple[int, ...]:
        """The lower, the better: moving averages, then what has no variant, then other precisions."""
        if self.variant is None:
            return (4,)
        parts = self._parts
        precision = next((part for part in parts if part in PRECISIONS), "")
        others = parts - {"ema", "non_ema", precision, ""}
        sort = 0 if self.is_ema else 2 if self.is_ema is False else 1
        return sort, bool(others), PRECISIONS.index(precision), len(self.files) == 1

    @property
    def _parts(self) -> set[str]:
        return set((self.variant or "").lower().replace("-", "_").split("."))


def copies(place: Path) -> list[Weights]:
    """All copies of the weights in a folder, the best first. Raises CheckpointError for a broken index."""
    found = []
    for path in sorted(place.iterdir()):
        if _INDEX.fullmatch(path.name) or (path.suffix == ".safetensors" and not _SHARD.fullmatch(path.name)):
            found.append(named(path))
    return sorted(found, key=lambda each: each.rank)


def choose(place: Path, source: Path) -> Weights:
    """The copy of the weights in a folder that is to be taken. source: the model folder that it is part of.

    Raises CheckpointError where there is none, or where the names do not say which of several.
    """
    found = copies(place)
    if not found:
        raise _none(place, source)
    best = [each for each in found if each.rank == found[0].rank]
    if len(best) > 1:
        names = ", ".join(each.files[0].name for each in best)
        raise CheckpointError(f"{place}: several copies of the weights ({names}): give the path of one")
    return found[0]


def named(path: Path) -> Weights:
    """The weights that a file holds, or lists as an index. Raises CheckpointError for a broken index."""
    if index := _INDEX.fullmatch(path.name):
        return Weights(_shards(path), index["before"] or index["after"] or "")
    name = _NAME.fullmatch(path.name)
    return Weights((path,), (name["variant"] or "") if name else None)


def fill(module: nn.Module, weights: Weights) -> None:
    """Read a network's weights. Raises CheckpointError unless they are exactly its own, and finite."""
    own = module.state_dict()
    state: dict[str, Tensor] = {}
    for path in weights.files:
        for stored, tensor in _read(path).items():
            name = stored if stored in own else _current(stored)
            if name in state:
                raise CheckpointError(f"{path}: {name} is there more than once (also as {stored})")
            state[name] = _as_float32(path, stored, tensor)
    for name in (*own, *state):
        if name not in state or name not in own:
            problem = "missing" if name in own else "not in the network"
            raise CheckpointError(f"{weights.path}: {name} is {problem}")
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} where the network has {tuple(own[name].shape)}"
            raise CheckpointError(f"{weights.path}: {name} is {shapes}")
    module.load_state_dict(state)


def save(path: Path, module: nn.Module) -> None:
    """Write a network's weights, completely or not at all."""
    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    with replacing(path) as part:
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors makes it private, and a service often runs as another user


def pickle_error(path: Path, source: Path) -> CheckpointError:
    """What is raised for a pickle. source: what to convert, the file or the model folder that it is in."""
    return CheckpointError(
        f"{path}: a pickle, which can run code when read; convert it once, if you trust it: "
        f"python -m model.convert {source} OUT"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    """The files that an index lists, each once."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{index}: it has no weight_map")
    names = sorted(set(listed.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: listed in {index.name} but missing")
    return tuple(index.parent / name for name in names)


def _none(place: Path, source: Path) -> CheckpointError:
    paths = sorted(place.iterdir())
    if shards := [path for path in paths if _SHARD.fullmatch(path.name)]:
        return CheckpointError(
            f"{shards[0]}: one of several shards, but the index that lists them is missing"
        )
    if pickles := [path for path in paths if path.suffix in PICKLES]:
        return pickle_error(pickles[0], source)
    return CheckpointError(f"{place / WEIGHTS}: missing")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, AttributeError) as error:  # the last: a dtype torch lacks
        refuse_pointer(path)
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _current(name: str) -> str:
    """A tensor's name in today's network: without wrappers, and as attention's layers are called now."""
    name = _WRAPPER.sub("", name)
    return _LEGACY.sub(lambda m: f".{LEGACY_ATTENTION[m[1]]}.{m[2]}", name)


def _as_float32(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Raises CheckpointError for integers, whose scale would be elsewhere, and for what is not finite."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{path}: {name} is {tensor.dtype}, not a floating-point number")
    tensor = tensor.to(torch.float32)
    # The extremes of a tensor with a NaN are NaN, so that one pass finds infinities and NaN alike.
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        raise CheckpointError(f"{path}: {name} has values that are not finite (NaN or infinity in float32)")
    return tensor
