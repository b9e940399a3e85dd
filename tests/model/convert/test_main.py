from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

from model import checkpoint
from model.convert.__main__ import main
from tests.model.conftest import randomise
from tests.model.convert.conftest import T, noisy, randomised
from tests.model.convert.references import HoNet, OpenAIEncoder, OpenAINet


@pytest.fixture
def improved() -> OpenAINet:
    net = OpenAINet(heads=2, classes=3, outputs=6).eval()
    randomise(net)
    return net


def run(path: Path, out: Path, *options: str) -> int:
    return main([str(path), str(out), *options])


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"heads": 2}, ("--num-heads", "2")),
        (
            {"resblock_updown": True, "head_channels": 32, "new_order": True, "multiples": (1, 1, 2)},
            ("--num-head-channels", "32", "--use-new-attention-order"),
        ),
    ],
)
def test_a_file_becomes_a_folder_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], given: tuple[str, ...]
) -> None:
    net = OpenAINet(classes=3, **options).eval()
    randomised(net, net.input_blocks[0])
    torch.save(net.state_dict(), tmp_path / "model010000.pt")
    out = tmp_path / "out"
    assert run(tmp_path / "model010000.pt", out, "--sample-size", "8", *given) == 0
    model = checkpoint.load(out)
    y = torch.tensor([0, 1, 2])
    with torch.inference_mode():
        expected = net(noisy(3), T, y)
        torch.testing.assert_close(model.unet(noisy(3), T, y), expected, atol=1e-4, rtol=0)
        theirs = UNet2DModel.from_pretrained(out, subfolder="unet").eval()
        torch.testing.assert_close(theirs(noisy(3), T, y).sample, expected, atol=1e-4, rtol=0)
    assert model.schedule.variance_type == "learned_range"
    assert (out / checkpoint.MANIFEST).exists()
    said = capsys.readouterr().out
    assert said.startswith("guided-diffusion, " if "resblock_updown" in options else "improved-diffusion, ")
    assert "no averaged (EMA) weights are in the file" in said
    assert "--beta-schedule linear (the default of " in said
    assert given[0] not in said
    assert f"python -m service --model {out}" in said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_a_classifier_goes_into_the_folder_of_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"head_channels": 32, "resblock_updown": True}
    for name, net in (
        ("model", OpenAINet(classes=5, **options)),
        ("classifier", OpenAIEncoder(8, 5, **options)),
        ("other", OpenAIEncoder(8, 4, **options)),
    ):
        randomise(net)
        torch.save(net.state_dict(), tmp_path / f"{name}.pt")
    out, heads = tmp_path / "out", ("--num-head-channels", "32")
    assert run(tmp_path / "classifier.pt", out, *heads) == 3
    assert "goes into a model folder: " in capsys.readouterr().err
    assert run(tmp_path / "model.pt", out, *heads, "--sample-size", "8") == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(tmp_path / "other.pt", out, *heads) == 3
    assert "is not one for this model: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert run(tmp_path / "classifier.pt", out, *heads) == 0
    loaded = checkpoint.load(out).classifier
    assert loaded is not None
    net = OpenAIEncoder(8, 5, **options).eval()
    net.load_state_dict(torch.load(tmp_path / "classifier.pt"))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(noisy(3), T), net(noisy(3), T), atol=1e-4, rtol=0)
    assert run(tmp_path / "classifier.pt", out, *heads) == 3
    assert "it is there already" in capsys.readouterr().err


def test_averaged_weights_are_taken_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, other = HoNet(), HoNet()
    states = [{f"module.{k}": v for k, v in other.state_dict().items()}, {}, 1, 2, net.state_dict()]
    torch.save(states, tmp_path / "ckpt.pth")
    assert run(tmp_path / "ckpt.pth", tmp_path / "out", "--sample-size", "8") == 0
    weights = load_file(tmp_path / "out" / "unet" / checkpoint.WEIGHTS)
    assert torch.equal(weights["conv_in.weight"], net.conv_in.weight)
    assert "taken: the averaged (EMA) weights, ema." in capsys.readouterr().out
    assert (
        run(tmp_path / "ckpt.pth", tmp_path / "plain", "--sample-size", "8", "--weights", "model.module") == 0
    )
    weights = load_file(tmp_path / "plain" / "unet" / checkpoint.WEIGHTS)
    assert torch.equal(weights["conv_in.weight"], other.conv_in.weight)


def test_averaged_weights_beside_the_file_are_named(
    improved: OpenAINet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model010000.pt", "ema_0.9999_010000.pt"):
        torch.save(improved.state_dict(), tmp_path / name)
    options = ("--sample-size", "8", "--num-heads", "2")
    assert run(tmp_path / "model010000.pt", tmp_path / "a", *options) == 0
    assert "lie beside it: ema_0.9999_010000.pt" in capsys.readouterr().out
    assert run(tmp_path / "ema_0.9999_010000.pt", tmp_path / "b", *options) == 0
    assert "averaged (EMA) weights by the file's name" in capsys.readouterr().out


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    torch.save(HoNet().half().state_dict(), tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "out", "--sample-size", "8x16") == 0
    weights = load_file(tmp_path / "out" / "unet" / checkpoint.WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert config["sample_size"] == [8, 16]


def test_a_diffusers_folder_runs_as_a_pipeline_afterwards(tmp_path: Path) -> None:
    torch.save(HoNet().state_dict(), tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "out", "--sample-size", "8") == 0
    assert run(tmp_path / "out", tmp_path / "again") == 0
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "again")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 8, 8, 3)


def test_a_refusal_is_one_line_and_leaves_nothing(
    improved: OpenAINet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(improved.state_dict(), tmp_path / "x.pt")
    cases: list[tuple[tuple[str, ...], str]] = [
        ((), "the size of its images is not in the file: give --sample-size"),
        (
            ("--sample-size", "8", "--norm-num-groups", "4"),
            "--norm-num-groups means nothing for a checkpoint",
        ),
        (("--sample-size", "8", "--weights", "ema"), "--weights ema: there are none; there are ''"),
    ]
    for options, reason in cases:
        assert run(tmp_path / "x.pt", tmp_path / "out", *options) == 3
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert said.err.startswith(f"{tmp_path / 'x.pt'}: ")
        assert reason in said.err
        assert said.out == ""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    assert run(tmp_path / "x.pt", tmp_path / "taken", "--sample-size", "8") == 3
    assert "it is there already" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "taken"}


def test_what_does_not_load_is_not_left(
    improved: OpenAINet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(improved.state_dict()) | {"out.0.weight": torch.zeros(64)}
    torch.save(state, tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "out", "--sample-size", "8") == 3
    assert "the result does not load: " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt"}


@pytest.mark.parametrize(
    "option", [("--sample-size", "0"), ("--num-heads", "-1"), ("--data-range", "1,0"), ("--data-range", "1")]
)
def test_a_malformed_option_is_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a", "b", *option])
    assert option[1] in capsys.readouterr().err


def test_averaged_weights_of_a_lightning_checkpoint_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, other = HoNet(), HoNet()
    table = {f"model.{name}": tensor for name, tensor in other.state_dict().items()}
    table |= {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": table, "epoch": 3}, tmp_path / "last.ckpt")
    assert run(tmp_path / "last.ckpt", tmp_path / "out", "--sample-size", "8") == 0
    weights = load_file(tmp_path / "out" / "unet" / checkpoint.WEIGHTS)
    assert torch.equal(weights["conv_in.weight"], net.conv_in.weight)
    assert "the averaged (EMA) weights, model_ema." in capsys.readouterr().out
