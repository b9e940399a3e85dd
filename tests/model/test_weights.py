"""Which copy of the weights is taken, and what of a file is read into a network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import weights
from model.folder import CheckpointError
from model.weights import WEIGHTS, Weights

NAMES = {
    "": WEIGHTS,
    "ema": "diffusion_pytorch_model.ema.safetensors",
    "non_ema": "diffusion_pytorch_model.non_ema.safetensors",
    "fp16": "diffusion_pytorch_model.fp16.safetensors",
    "bf16": "diffusion_pytorch_model.bf16.safetensors",
    "fp16.ema": "diffusion_pytorch_model.fp16.ema.safetensors",
    "v2": "diffusion_pytorch_model.v2.safetensors",
    "v3": "diffusion_pytorch_model.v3.safetensors",
}


def net() -> nn.Module:
    """A network of two tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU())


def shard(place: Path, index: str = f"{WEIGHTS}.index.json", stem: str = "diffusion_pytorch_model") -> None:
    """Write the network as two files and their index."""
    state = net().state_dict()
    listed = {}
    for number, name in enumerate(state, 1):
        listed[name] = f"{stem}-{number:05}-of-{len(state):05}.safetensors"
        save_file({name: state[name]}, place / listed[name])
    (place / index).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": listed}))


def loaded(path: Path) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    weights.fill(module, weights.named(path))
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


# ── Which copy ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("there", "taken", "is_ema"),
    [
        (["", "fp16"], "", None),
        (["fp16"], "fp16", None),
        (["bf16", "fp16"], "fp16", None),
        (["", "ema"], "ema", True),
        (["fp16.ema", "", "non_ema"], "fp16.ema", True),
        (["fp16.ema", "ema"], "ema", True),
        (["fp16", "non_ema"], "fp16", None),
        (["non_ema"], "non_ema", False),
        (["", "v2", "v3"], "", None),
    ],
)
def test_the_best_variant_is_taken(tmp_path: Path, there: list[str], taken: str, is_ema: bool | None) -> None:
    for variant in there:
        (tmp_path / NAMES[variant]).touch()
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    chosen = weights.choose(tmp_path, tmp_path)
    assert (chosen.variant, chosen.is_ema) == (taken, is_ema)
    assert len(weights.copies(tmp_path)) == len(there)


def test_names_that_do_not_say_are_refused(tmp_path: Path) -> None:
    for variant in ("v2", "v3"):
        (tmp_path / NAMES[variant]).touch()
    with pytest.raises(CheckpointError, match=r"several copies .*v2.*, .*v3.*: give the path of one"):
        weights.choose(tmp_path, tmp_path)


def test_one_file_of_any_name_will_do_but_not_beside_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert weights.choose(tmp_path, tmp_path).path.name == "model.safetensors"
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"best.safetensors, model.safetensors"):
        weights.choose(tmp_path, tmp_path)
    (tmp_path / WEIGHTS).touch()
    assert weights.choose(tmp_path, tmp_path).path.name == WEIGHTS


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "last.ckpt"])
def test_a_pickle_is_refused_with_what_to_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle.*python -m model.convert /a/model OUT"):
        weights.choose(tmp_path, Path("/a/model"))


# ── Shards ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("index", "stem", "variant"),
    [
        (f"{WEIGHTS}.index.json", "diffusion_pytorch_model", ""),
        (f"{WEIGHTS}.index.fp16.json", "diffusion_pytorch_model.fp16", "fp16"),
        (f"{WEIGHTS}.fp16.index.json", "diffusion_pytorch_model.fp16", "fp16"),
    ],
)
def test_shards_are_one_copy(tmp_path: Path, index: str, stem: str, variant: str) -> None:
    shard(tmp_path, index, stem)
    (found,) = weights.copies(tmp_path)
    assert (len(found.files), found.variant, found.path) == (2, variant, tmp_path)
    assert same(loaded(tmp_path / index), net())


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    shard(tmp_path)
    index = tmp_path / f"{WEIGHTS}.index.json"
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: listed in .* but missing"):
        weights.choose(tmp_path, tmp_path)
    index.write_text('{"weight_map": {"0.weight": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"'../elsewhere.safetensors' is not the name of a file"):
        weights.choose(tmp_path, tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index.json: it has no weight_map"):
        weights.choose(tmp_path, tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors: one of several shards, but the"):
        weights.choose(tmp_path, tmp_path)


# ── What is read ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_floating_point_type_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in net().state_dict().items()}
    save_file(stored, tmp_path / WEIGHTS)
    found = loaded(tmp_path / WEIGHTS).state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], stored[name].to(torch.float32)) for name in stored)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_leave_the_names(tmp_path: Path, prefix: str) -> None:
    save_file({prefix + name: tensor for name, tensor in net().state_dict().items()}, tmp_path / WEIGHTS)
    assert same(loaded(tmp_path / WEIGHTS), net())


def test_a_compiled_part_of_a_network_loads(tmp_path: Path) -> None:
    state = net().state_dict()
    save_file({name.replace("0.", "0._orig_mod."): state[name] for name in state}, tmp_path / WEIGHTS)
    assert same(loaded(tmp_path / WEIGHTS), net())


def double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {f"module.{name}": tensor + 1 for name, tensor in state.items()}


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"0.weight": state["0.weight"].to(torch.int8)}


def spoil(
    value: float, dtype: torch.dtype = torch.float32
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = state["0.weight"].to(dtype)
        weight[1, 1] = value
        return state | {"0.weight": weight}

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (double, r"0.bias is there more than once \(also as module.0.bias\)"),
        (quantise, r"0.weight is torch.int8, not a floating-point number"),
        (spoil(float("nan")), r"0.weight has values that are not finite"),
        (spoil(float("-inf")), r"0.weight has values that are not finite"),
        (spoil(1e300, torch.float64), r"0.weight has values that are not finite .*in float32"),
        (lambda state: {"0.bias": state["0.bias"]}, "0.weight is missing"),
        (lambda state: state | {"1.bias": torch.zeros(3)}, "1.bias is not in the network"),
    ],
)
def test_weights_that_would_be_wrong_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], named: str
) -> None:
    save_file(change(net().state_dict()), tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: {named}"):
        loaded(tmp_path / WEIGHTS)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"", "not a readable safetensors file"),
        (b"PK\x03\x04 a zip file, as torch.save writes it", "not a readable safetensors file"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as refused:
        loaded(tmp_path / WEIGHTS)
    assert "\n" not in str(refused.value)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    weights.save(tmp_path / WEIGHTS, net())
    assert load_file(tmp_path / WEIGHTS).keys() == net().state_dict().keys()
    assert same(loaded(tmp_path / WEIGHTS), net())
    assert weights.choose(tmp_path, tmp_path) == Weights((tmp_path / WEIGHTS,))
