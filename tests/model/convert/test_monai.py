from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor

from model.convert import monai
from model.convert.conversion import Choices, ConversionError
from tests.model.convert.conftest import T, converted, diffusers_net, noisy, randomised

TINY: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 4,
}
GIVEN = {"num_head_channels": 8, "norm_num_groups": 4}


def reference(**options: Any) -> DiffusionModelUNet:
    net = DiffusionModelUNet(**(TINY | options)).eval()
    randomised(net, net.conv_in)
    return net


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As MONAI Generative had them."""
    old = {}
    for name, tensor in state.items():
        name = name.replace(".attn.out_proj.", ".proj_attn.").replace(".attn.to_", ".to_")
        old[name.replace("upsampler.postconv.", "upsampler.conv.")] = tensor
    return old


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_class_embeds": 5},
        {"resblock_updown": True},
        {"use_combined_linear": True, "in_channels": 3, "out_channels": 3},
        {"include_fc": False},
        {"channels": (8, 16, 16), "attention_levels": (False, True, False), "num_res_blocks": 2},
    ],
)
def test_the_network_computes_the_same(options: dict[str, Any]) -> None:
    net = reference(**options)
    found = converted(monai.convert, net, **GIVEN)
    x = noisy(options.get("in_channels", 1))
    y = torch.tensor([0, 3, 4]) if "num_class_embeds" in options else None
    with torch.inference_mode():
        expected = net(x, T, class_labels=y)
        torch.testing.assert_close(diffusers_net(found)(x, T, y).sample, expected, atol=1e-4, rtol=0)
        other = converted(monai.convert, net, **(GIVEN | {"num_head_channels": 4}))
        assert (diffusers_net(other)(x, T, y).sample - expected).abs().max() > 1e-3  # heads matter


def test_names_of_monai_generative_are_known() -> None:
    state = dict(reference().state_dict())
    old = old_names(state)
    assert old.keys() != state.keys()
    new, found = (
        monai.convert(names, Choices({"sample_size": (8, 8)} | GIVEN)).weights for names in (state, old)
    )
    assert new.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in new.items())


def test_its_images_are_from_0_to_1() -> None:
    choices = Choices({"sample_size": (8, 8)} | GIVEN)
    assert monai.convert(dict(reference().state_dict()), choices).scheduler["data_range"] == [0.0, 1.0]
    assert choices.assumed["data_range"].startswith("--data-range 0.0,1.0 (as MONAI's")
    found = converted(monai.convert, reference(), **GIVEN, data_range=(-1.0, 1.0))
    assert found.scheduler["data_range"] == [-1.0, 1.0]


def test_what_the_file_does_not_say_is_asked_for() -> None:
    state = dict(reference().state_dict())
    with pytest.raises(ConversionError, match="give --num-head-channels"):
        monai.convert(state, Choices({"sample_size": (8, 8)}))
    with pytest.raises(ConversionError, match="give --sample-size"):
        monai.convert(state, Choices(GIVEN))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spatial_dims": 3}, "one or three dimensions"),
        ({"with_conditioning": True, "cross_attention_dim": 4}, "cross-attention"),
        ({"num_res_blocks": (1, 2)}, r"num_res_blocks=\(1, 2\)"),
    ],
)
def test_what_cannot_be_represented_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        converted(monai.convert, reference(**options), **GIVEN)


def test_its_cosine_schedule_is_refused() -> None:
    with pytest.raises(ConversionError, match="--beta-schedule must be one of"):
        converted(monai.convert, reference(), **GIVEN, beta_schedule="squaredcos_cap_v2")


def test_a_name_of_another_kind_is_refused() -> None:
    state = dict(reference().state_dict()) | {"other": torch.zeros(1)}
    with pytest.raises(ConversionError, match="other is a weight that"):
        monai.convert(state, Choices({"sample_size": (8, 8)} | GIVEN))
