from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder, DiffusionModelUNet
from torch import Tensor

from model import checkpoint
from model.convert import monai_classifier
from model.convert.__main__ import main
from model.convert.conversion import Choices, ConversionError
from model.encoder import EncoderConfig, NoiseClassifier
from tests.model.convert.conftest import T, noisy, randomised

TINY: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 5,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
    "input_shape": (8, 8),
}
GIVEN = {"num_head_channels": 8, "norm_num_groups": 4}


def reference(**options: Any) -> DiffusionModelEncoder:
    net = DiffusionModelEncoder(**(TINY | options)).eval()
    randomised(net, net.conv_in)
    return net


def convert(net: DiffusionModelEncoder, **given: Any) -> NoiseClassifier:
    choices = Choices(GIVEN | given)
    found = monai_classifier.convert(dict(net.state_dict()), choices)
    config = EncoderConfig.from_dict(found.config)
    assert EncoderConfig.from_dict(config.to_dict()) == config
    ours = NoiseClassifier(config).eval().requires_grad_(False)
    ours.load_state_dict(found.weights)
    return ours


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        ({"resblock_updown": True, "in_channels": 3}, {}),
        ({"channels": (8, 16, 16), "attention_levels": (True, False, True), "num_res_blocks": 2}, {}),
        ({"input_shape": (8, 4), "use_combined_linear": True}, {"sample_size": (8, 4)}),
        ({"include_fc": False}, {}),
    ],
)
def test_the_classifier_computes_the_same(options: dict[str, Any], given: dict[str, Any]) -> None:
    net = reference(**options)
    height, width = options.get("input_shape", (8, 8))
    ours, x = convert(net, **given), noisy(options.get("in_channels", 1))[:, :, :height, :width].clone()
    with torch.inference_mode():
        expected = net(x, T)
        assert expected.std() > 0.01, "a dead network would prove nothing"
        torch.testing.assert_close(ours(x, T), expected, atol=1e-4, rtol=1e-4)
    y = torch.tensor([0, 3, 4])
    x.requires_grad_()
    log_p = torch.log_softmax(net(x, T), dim=1).gather(1, y[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_p, x)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(ours.gradient(x.detach(), T, y), gradient, atol=1e-4, rtol=1e-3)


def test_it_goes_into_the_folder_of_its_model(tmp_path: Path) -> None:
    options = {name: value for name, value in TINY.items() if name not in ("input_shape", "out_channels")}
    model = DiffusionModelUNet(**options, out_channels=1, num_class_embeds=5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(reference().state_dict(), tmp_path / "classifier.pt")
    heads = ["--num-head-channels", "8", "--norm-num-groups", "4"]
    out = str(tmp_path / "out")
    assert main([str(tmp_path / "model.pt"), out, "--sample-size", "8", *heads]) == 0
    assert main([str(tmp_path / "classifier.pt"), out, *heads]) == 0
    found = checkpoint.load(tmp_path / "out").classifier
    assert found is not None
    assert (found.config.pool, found.config.sample_size, found.config.classes) == ("dense", (8, 8), 5)


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return dict(reference().state_dict()) | {name.replace("__", "."): each for name, each in tensors.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conv_in__conv__weight": torch.zeros(8, 1, 3, 3, 3)}, "one or three dimensions"),
        ({"down_blocks__0__attentions__0__transformer_blocks__0": torch.zeros(1)}, "with_conditioning=True"),
        ({"class_embedding__weight": torch.zeros(5, 32)}, "it is given a class, where it is to tell one"),
        ({"down_blocks__1__resnets__1__norm1__weight": torch.zeros(1)}, "one number for all levels"),
        ({"out__0__weight": torch.zeros(512, 32)}, "give --sample-size"),
        ({"other": torch.zeros(1)}, "other is a weight that"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        monai_classifier.convert(changed(**change), Choices(GIVEN))


def test_the_size_of_its_heads_is_asked_for() -> None:
    with pytest.raises(ConversionError, match="give --num-head-channels"):
        monai_classifier.convert(changed(), Choices())
