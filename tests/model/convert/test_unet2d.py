from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import save_file

from model import checkpoint
from model.convert import unet2d
from model.convert.__main__ import main
from model.convert.conversion import Choices, ConversionError
from model.unet_config import EMA_KEYS
from tests.model.conftest import TINY, randomise


@pytest.fixture
def net() -> UNet2DModel:
    net = UNet2DModel(**TINY).eval()
    randomise(net)
    return net


def pickled(net: UNet2DModel, folder: Path, part: str = "unet") -> Path:
    """A folder as diffusers wrote them before safetensors."""
    (folder / part).mkdir(parents=True)
    net.save_config(folder / part)
    torch.save(net.state_dict(), folder / part / "diffusion_pytorch_model.bin")
    DDPMScheduler(variance_type="fixed_large").save_config(folder / "scheduler")
    return folder


def test_a_folder_with_a_pickle(net: UNet2DModel, tmp_path: Path) -> None:
    pickled(net, tmp_path)
    labels = {str(i): name for i, name in enumerate("abcd")}
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "id2label": labels}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found, taken = unet2d.convert_folder(tmp_path, Choices())
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in net.state_dict().items())
    assert found.unet["block_out_channels"] == [8, 16]
    assert found.scheduler["variance_type"] == "fixed_large"
    assert found.labels == labels
    assert taken.endswith("unet/diffusion_pytorch_model.bin")


def test_a_flat_folder_without_a_scheduler(net: UNet2DModel, tmp_path: Path) -> None:
    net.save_config(tmp_path)
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    choices = Choices({"beta_schedule": "squaredcos_cap_v2"})
    found, _ = unet2d.convert_folder(tmp_path, choices)
    assert found.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert "num_train_timesteps" in choices.assumed


def test_averaged_weights_are_taken_first(net: UNet2DModel, tmp_path: Path) -> None:
    pickled(net, tmp_path)
    other = UNet2DModel(**TINY)
    (tmp_path / "unet_ema").mkdir()
    config = dict(other.config) | {"decay": 0.9999, "optimization_step": 7, "use_ema_warmup": False}
    (tmp_path / "unet_ema" / "config.json").write_text(json.dumps(config))
    save_file(other.state_dict(), tmp_path / "unet_ema" / "diffusion_pytorch_model.safetensors")
    found, taken = unet2d.convert_folder(tmp_path, Choices())
    assert torch.equal(found.weights["conv_in.weight"], other.conv_in.weight)
    assert not found.unet.keys() & EMA_KEYS
    assert "averaged (EMA)" in taken


def test_weights_in_several_files(net: UNet2DModel, tmp_path: Path) -> None:
    place = pickled(net, tmp_path) / "unet"
    state = torch.load(place / "diffusion_pytorch_model.bin")
    (place / "diffusion_pytorch_model.bin").unlink()
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, place / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (place / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps(index))
    found, taken = unet2d.convert_folder(tmp_path, Choices())
    assert found.weights.keys() == state.keys()
    assert taken.count(".bin") == 2


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["fp16.bin"], "fp16.bin"),
        (["bin", "fp16.bin"], "bin"),
        (["bin", "ema.bin", "non_ema.bin"], "ema.bin, the averaged (EMA) weights"),
        (["bin", "safetensors", "fp16.safetensors"], "safetensors"),
        (["bin", "fp16.safetensors"], "bin"),
        (["ema.bin", "safetensors"], "ema.bin, the averaged (EMA) weights"),
    ],
)
def test_the_best_copy_is_taken(net: UNet2DModel, tmp_path: Path, there: list[str], taken: str) -> None:
    place = pickled(net, tmp_path) / "unet"
    whole = (place / "diffusion_pytorch_model.bin").read_bytes()
    (place / "diffusion_pytorch_model.bin").unlink()
    (place / "optimizer.bin").write_bytes(b"")
    for name in there:
        path = place / f"diffusion_pytorch_model.{name}"
        if name.endswith("bin"):
            path.write_bytes(whole)
        else:
            save_file(net.state_dict(), path)
    found, said = unet2d.convert_folder(tmp_path, Choices())
    assert said == f"{place}/diffusion_pytorch_model.{taken}"
    assert torch.equal(found.weights["conv_in.weight"], net.conv_in.weight)


def test_names_that_do_not_say_are_refused(net: UNet2DModel, tmp_path: Path) -> None:
    place = pickled(net, tmp_path) / "unet"
    whole = place / "diffusion_pytorch_model.bin"
    whole.rename(place / "diffusion_pytorch_model.v2.bin")
    (place / "diffusion_pytorch_model.v3.bin").touch()
    with pytest.raises(ConversionError, match=r"several copies of the weights \(.*v2.bin, .*v3.bin\)"):
        unet2d.convert_folder(tmp_path, Choices())
    for path in place.glob("*.bin"):
        path.unlink()
    with pytest.raises(ConversionError, match=r"diffusion_pytorch_model.bin is missing; there are no weigh"):
        unet2d.convert_folder(tmp_path, Choices())
    (place / "last.ckpt").touch()
    (place / "first.ckpt").touch()
    with pytest.raises(ConversionError, match=r"there are first.ckpt, last.ckpt"):
        unet2d.convert_folder(tmp_path, Choices())


def test_a_state_dict_with_its_config(net: UNet2DModel, tmp_path: Path) -> None:
    net.save_config(tmp_path)
    state = dict(net.state_dict())
    found = unet2d.convert(state, Choices({"config": tmp_path / "config.json"}))
    assert found.weights == state
    assert found.unet["sample_size"] == 8
    DDPMScheduler(num_train_timesteps=400).save_config(tmp_path)
    paths = {"config": tmp_path / "config.json", "scheduler_config": tmp_path / "scheduler_config.json"}
    assert unet2d.convert(state, Choices(paths)).scheduler["num_train_timesteps"] == 400
    with pytest.raises(ConversionError, match="does not say its config: give --config"):
        unet2d.convert(state, Choices())


@pytest.mark.parametrize(
    ("config", "index", "reason"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            {},
            "config.json: a UNet2DConditionModel, which is conditioned on text",
        ),
        ({"sample_size": None}, {}, "it has no sample_size: give --sample-size"),
        (
            {},
            {"vqvae": ["diffusers", "VQModel"]},
            r"model_index.json: a pipeline with vqvae \(VQModel\), which decodes latents",
        ),
    ],
)
def test_another_pipeline_is_refused(
    net: UNet2DModel, tmp_path: Path, config: dict[str, Any], index: dict[str, Any], reason: str
) -> None:
    pickled(net, tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=reason):
        unet2d.convert_folder(tmp_path, Choices())
    with pytest.raises(ConversionError, match=r"no config.json in it"):
        unet2d.convert_folder(tmp_path / "scheduler", Choices())


def test_a_size_that_the_config_leaves_open_is_given(net: UNet2DModel, tmp_path: Path) -> None:
    pickled(net, tmp_path)
    found, _ = unet2d.convert_folder(tmp_path, Choices({"sample_size": (8, 16)}))
    assert found.unet["sample_size"] == [8, 16]


def test_vectors_of_classes_become_a_table_of_them(tmp_path: Path) -> None:
    net = UNet2DModel(**TINY | {"num_class_embeds": None, "class_embed_type": "identity"}).eval()
    randomise(net)
    folder = pickled(net, tmp_path / "model")
    width = net.config.block_out_channels[0] * 4
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    torch.save({"vectors": vectors}, tmp_path / "vectors.pt")
    save_file({"a": vectors, "b": vectors.clone()}, tmp_path / "two.safetensors")
    assert main([str(folder), str(tmp_path / "out")]) == 3
    assert (
        main([str(folder), str(tmp_path / "out"), "--class-vectors", str(tmp_path / "two.safetensors")]) == 3
    )
    assert not (tmp_path / "out").exists()
    assert main([str(folder), str(tmp_path / "out"), "--class-vectors", str(tmp_path / "vectors.pt")]) == 0
    model = checkpoint.load(tmp_path / "out")
    assert model.class_names == ("0", "1", "2")
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 400, 999])
    with torch.inference_mode():
        expected = net(x, t, class_labels=vectors).sample
        torch.testing.assert_close(model.unet(x, t, torch.tensor([0, 1, 2])), expected)
        assert (net(x, t, class_labels=vectors.flip(0)).sample - expected).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["in the folder", "on the command line"])
def test_what_goes_in_beside_x_is_kept(how: str, tmp_path: Path) -> None:
    options = TINY | {"in_channels": 3, "num_class_embeds": None}
    folder, condition = pickled(UNet2DModel(**options), tmp_path / "model"), ["mask", "masked_image"]
    index: dict[str, Any] = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    given = ["--condition", ",".join(condition)]
    if how == "in the folder":
        index["condition"], given = condition, []
    (folder / "model_index.json").write_text(json.dumps(index))
    assert main([str(folder), str(tmp_path / "out"), *given]) == 0
    assert checkpoint.load(tmp_path / "out").condition == ("mask", "masked_image")


def test_the_scheduler_is_the_one_that_the_pipeline_says(net: UNet2DModel, tmp_path: Path) -> None:
    folder = pickled(net, tmp_path)
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "PNDMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    found, _ = unet2d.convert_folder(folder, Choices())
    assert found.scheduler["_class_name"] == "PNDMScheduler"
