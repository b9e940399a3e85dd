from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.convert import source
from model.convert.conversion import ConversionError

W = torch.arange(3.0)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Sneaky:
    """Runs code when a pickle of it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("read!",))


def test_tensors_are_found_by_their_dotted_names(tmp_path: Path) -> None:
    content = {
        "state_dict": {"net.a": W, "net.b": W + 1},
        "hyper_parameters": argparse.Namespace(lr=1e-4),
        "optimizer": [{"exp_avg": W + 2}, 7],
        "epoch": 3,
    }
    table = source.read(saved(tmp_path / "last.ckpt", content))
    assert table.keys() == {"state_dict.net.a", "state_dict.net.b", "optimizer.0.exp_avg"}
    assert torch.equal(table["state_dict.net.b"], W + 1)


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    save_file({"a": W}, tmp_path / "x.safetensors")
    assert torch.equal(source.read(tmp_path / "x.safetensors")["a"], W)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "x.pt", {"a": W, "sneaky": Sneaky()})
    with pytest.raises(ConversionError, match=r"x.pt: holds more than tensors \(\S*print\)"):
        source.read(path)
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"sneaky": Sneaky()}))
    with pytest.raises(ConversionError, match=r"y.pt: "):
        source.read(tmp_path / "y.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_what_is_no_checkpoint_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversionError, match=rf"{name}: cannot be read \(No such file"):
        source.read(tmp_path / name)
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(ConversionError, match=rf"{name}: a Git LFS pointer"):
        source.read(tmp_path / name)
    for content in (b"", b"<html>not found</html>", bytes(100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=rf"{name}: not a checkpoint[^\n]*$"):
            source.read(tmp_path / name)


def test_weights_lie_below_a_prefix() -> None:
    table = {
        "model.a": W,
        "model.b": W,
        "ema.ema_model.a": W + 1,
        "ema.ema_model.b": W,
        "ema.online_model.a": W,
    }
    table |= {"ema.online_model.b": W, "opt.a": W}
    found = source.prefixes(table, ("a", "b"))
    assert found == ["model.", "ema.ema_model.", "ema.online_model."]
    assert source.choose_prefix(found) == "ema.ema_model."
    assert source.choose_prefix(found, "model") == "model."
    assert source.weights_at(table, "ema.ema_model.").keys() == {"a", "b"}
    with pytest.raises(ConversionError, match=r"--weights other: there are none; there are 'model.'"):
        source.choose_prefix(found, "other")
    with pytest.raises(ConversionError, match=r"more than one set of weights: give one of 'a.', 'b.'"):
        source.choose_prefix(["a.", "b."])


@pytest.mark.parametrize("prefix", ["ema.", "state_dict.ema_model.", "params_ema.", "module.shadow."])
def test_averaged_weights_are_known_by_their_prefix(prefix: str) -> None:
    assert source.choose_prefix(["model.", prefix]) == prefix


def test_the_list_that_ddim_saves(tmp_path: Path) -> None:
    states = [{"module.a": W}, {"state": {0: {"exp_avg": W}}}, 5, 1000, {"a": W + 1}]
    table = source.read(saved(tmp_path / "ckpt.pth", states))
    assert source.choose_prefix(source.prefixes(table, ("a",))) == "ema."
    assert torch.equal(table["ema.a"], W + 1)


def test_averaged_weights_as_lightning_projects_keep_them() -> None:
    table = {"state_dict.model.diffusion_model.in.0.weight": W}
    prefix = "state_dict.model.diffusion_model."
    assert source.lightning_ema(table, prefix) is None
    table["state_dict.model_ema.diffusion_modelin0weight"] = W + 1
    found = source.lightning_ema(table, prefix)
    assert found is not None
    assert torch.equal(found["in.0.weight"], W + 1)


# ── Files made to do harm ──────────────────────────────────────────────────────────────────────


def test_more_values_than_are_stored_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"a\.pt: a has more values than are stored"):
        source.read(tmp_path / "a.pt")


@pytest.mark.parametrize("tensor", [torch.zeros(2, 2).to_sparse(), torch.empty(10**12, device="meta")])
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"a\.pt: a is not a plain tensor"):
        source.read(tmp_path / "a.pt")


def test_a_container_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.zeros(1)}
    content["again"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match=r"a\.pt: its containers are nested without an end"):
        source.read(tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConversionError, match="not a regular file"):
        source.read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {"a": torch.zeros(4)}
    save_file(content, path) if name.endswith("s") else torch.save(
        content, path, _use_new_zipfile_serialization=False
    )
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + b"\x80" + whole[place + 1 :])
        try:
            source.read(path)
        except ConversionError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1  # noqa: PT017
    assert refused
