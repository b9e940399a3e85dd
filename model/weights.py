"""A network's weights on disk: which of the copies in a folder, read into the network, and written.

Weights are safetensors, never pickles, which can run code when read. A folder may hold several copies:
diffusers names a variant of a file (`diffusion_pytorch_model.fp16.safetensors`) and cuts a large one into
shards, which an index lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.files import replacing
from model.folder import CheckpointError, check_regular, read_json, refuse_pointer

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
Module = TypeVar("Module", bound=nn.Module)
PRECISIONS = ("fp64", "fp32", "", "fp16", "bf16", "fp8")
"""What a variant may say of its precision, the best first."""

_NAME = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>.+))?\.(?:safetensors|bin)")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}(?P<suffix>\.safetensors|\.bin)")
_INDEX = re.compile(
    r".+?(?P<suffix>\.safetensors|\.bin)(?:\.(?P<before>.+))?\.index(?:\.(?P<after>.+))?\.json"
)
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


def copies(place: Path, suffix: str = ".safetensors") -> list[Weights]:
    """All copies of the weights in a folder, the best first. suffix: or `.bin`, of pickles, for a converter.

    Raises CheckpointError for a broken index.
    """
    found = []
    for path in sorted(place.iterdir()):
        index = _INDEX.fullmatch(path.name)
        if index["suffix"] == suffix if index else path.suffix == suffix and not _SHARD.fullmatch(path.name):
            found.append(named(path))
    return sorted(found, key=lambda each: each.rank)


def choose(place: Path, source: Path) -> Weights:
    """The copy of the weights in a folder that is to be taken. source: the model folder that it is part of.

    Raises CheckpointError where there is none, or where the names do not say which of several.
    """
    found = copies(place)
    if not found:
        raise _none(place, source)
    return best_of(found, place)


def best_of(found: Sequence[Weights], place: Path) -> Weights:
    """The best of the copies in a folder, as `copies` returns them.

    Raises CheckpointError where the names do not say which that is.
    """
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


def build(outline: Module, make: Callable[[], Module], weights: Weights) -> Module:
    """Make a network and read its weights. Raises CheckpointError as `fill` does, or for too little memory.

    outline: the same network on the device "meta", where it takes no memory: the files are compared with it
    first, so that what a config says alone has nothing allocated. Only what lies on the disk too is.
    """
    check(outline, weights)
    try:
        module = make()
        fill(module, weights)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        count = sum(parameter.numel() for parameter in outline.parameters())
        raise CheckpointError(f"{weights.path}: too little memory for {count:,} parameters") from error
    return module


def check(module: nn.Module, weights: Weights) -> None:
    """Raises CheckpointError unless the headers of the files have just a network's names and shapes."""
    own = module.state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weights.files:
        with _opened(path) as file:
            for stored in file.keys():  # noqa: SIM118  # no mapping, but a method of this name
                name = stored if stored in own else _current(stored)
                if name in shapes:
                    raise CheckpointError(f"{path}: {name} is there more than once (also as {stored})")
                shapes[name] = tuple(file.get_slice(stored).get_shape())
    for name in (*own, *shapes):
        if name not in shapes or name not in own:
            problem = "missing" if name in own else "not in the network"
            raise CheckpointError(f"{weights.path}: {name} is {problem}")
        if (expected := tuple(own[name].shape)) != shapes[name]:
            raise CheckpointError(
                f"{weights.path}: {name} is {shapes[name]} where the network has {expected}"
            )


def fill(module: nn.Module, weights: Weights) -> None:
    """Read a network's weights. Raises CheckpointError unless they are exactly its own, and finite."""
    check(module, weights)
    own = module.state_dict()
    for path in weights.files:
        with _opened(path) as file:
            for stored in file.keys():  # noqa: SIM118
                name = stored if stored in own else _current(stored)
                own[name].copy_(_as_float32(path, stored, file.get_tensor(stored)))


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
    for name in listed.values():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it")
    names = sorted(set(listed.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: listed in {index.name} but missing")
    return tuple(index.parent / name for name in names)


def _none(place: Path, source: Path) -> CheckpointError:
    paths = sorted(place.iterdir())
    if shards := [path for path in paths if path.suffix not in PICKLES and _SHARD.fullmatch(path.name)]:
        return CheckpointError(
            f"{shards[0]}: one of several shards, but the index that lists them is missing"
        )
    if pickles := [path for path in paths if path.suffix in PICKLES]:
        return pickle_error(pickles[0], source)
    return CheckpointError(f"{place / WEIGHTS}: missing")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. Raises CheckpointError where it cannot be read, then or later.

    Opening it checks that its header describes just what follows.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except CheckpointError:
        raise
    # A RuntimeError is of what cannot be mapped, an AttributeError of a dtype that torch lacks.
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError) as error:
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
