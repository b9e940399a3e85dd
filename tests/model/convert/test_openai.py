from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.convert import openai
from model.convert.conversion import Choices, Conversion, ConversionError
from model.convert.openai import RELEASES, Shape
from tests.model.convert.conftest import T, converted, diffusers_net, noisy, randomised
from tests.model.convert.references import OpenAINet


def reference(**options: Any) -> OpenAINet:
    net = OpenAINet(**options).eval()
    randomised(net, net.input_blocks[0])
    return net


def convert(net: nn.Module, **given: Any) -> Conversion:
    return converted(openai.convert, net, **given)


def difference(net: OpenAINet, found: Conversion, y: Tensor | None = None) -> float:
    x = noisy(3)
    with torch.inference_mode():
        return float((net(x, T, y) - diffusers_net(found)(x, T, y).sample).abs().max())


@pytest.mark.parametrize(
    ("options", "given"),
    [
        # guided-diffusion: 64 with the new order; 256 with classes, and without; LSUN
        (
            {"resblock_updown": True, "head_channels": 32, "new_order": True, "multiples": (1, 2, 3)},
            {"num_head_channels": 32, "use_new_attention_order": True},
        ),
        ({"resblock_updown": True, "head_channels": 32, "classes": 5}, {"num_head_channels": 32}),
        ({"resblock_updown": True, "head_channels": 32, "multiples": (1, 1, 2)}, {"num_head_channels": 32}),
        ({"resblock_updown": True, "heads": 4, "multiples": (1, 8)}, {}),
        # improved-diffusion: CIFAR-10, LSUN, and with classes
        ({"heads": 4, "multiples": (1, 2, 2), "attention": (1, 2), "layers": 2}, {}),
        ({"heads": 1, "scale_shift": False, "multiples": (1, 1, 2, 4), "attention": (2,)}, {"num_heads": 1}),
        ({"heads": 4, "classes": 5, "outputs": 3}, {}),
        ({"heads": 2, "new_order": True, "attention": ()}, {"num_heads": 2, "use_new_attention_order": True}),
    ],
)
def test_the_network_computes_the_same(options: dict[str, Any], given: dict[str, Any]) -> None:
    net = reference(**options)
    y = torch.tensor([0, 3, 4]) if options.get("classes") else None
    assert difference(net, convert(net, **given), y) < 1e-4


@pytest.mark.parametrize(
    ("channels", "outputs", "condition", "learned"),
    [(6, 3, ("image",), False), (6, 6, ("image",), True), (7, 3, ("mask", "masked_image"), False)],
)
def test_a_picture_may_go_in_beside_x(
    channels: int, outputs: int, condition: tuple[str, ...], learned: bool
) -> None:
    net = reference(heads=4, channels=channels, outputs=outputs)
    found = convert(net, condition=condition)
    x = noisy(channels)
    with torch.inference_mode():
        torch.testing.assert_close(diffusers_net(found)(x, T).sample, net(x, T), atol=1e-4, rtol=0)
    assert (found.unet["in_channels"], found.unet["out_channels"]) == (channels, outputs)
    assert found.scheduler["variance_type"] == ("learned_range" if learned else "fixed_large")
    with pytest.raises(ConversionError, match="--condition"):
        convert(net)


def test_the_order_of_queries_keys_and_values_matters() -> None:
    net = reference(heads=4, multiples=(1, 2, 2), attention=(1, 2))
    assert difference(net, convert(net, use_new_attention_order=True)) > 1e-2
    assert difference(net, convert(net, num_heads=2)) > 1e-3


def test_the_schedule_of_a_learned_variance() -> None:
    found = convert(reference(heads=4))
    assert found.scheduler == {
        "_class_name": "DDPMScheduler",
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": pytest.approx(1e-4),
        "beta_end": pytest.approx(0.02),
        "prediction_type": "epsilon",
        "variance_type": "learned_range",
    }
    assert (found.family, found.unet["out_channels"]) == ("improved-diffusion", 6)


def test_timesteps_are_rescaled_where_the_project_does_so() -> None:
    net = reference(heads=4, outputs=3)
    found = convert(net, num_train_timesteps=4000)
    assert found.scheduler["timestep_scale"] == 0.25
    assert found.scheduler["beta_end"] == pytest.approx(0.005)  # their linear schedule follows T
    assert found.scheduler["variance_type"] == "fixed_large"
    assert "timestep_scale" not in convert(net, num_train_timesteps=4000, rescale_timesteps=False).scheduler
    guided = reference(resblock_updown=True, head_channels=64)
    found = convert(guided, num_train_timesteps=4000, num_head_channels=64)
    assert "timestep_scale" not in found.scheduler
    cosine = convert(net, beta_schedule="squaredcos_cap_v2").scheduler
    assert "beta_start" not in cosine


def shapes_of(release: Shape, outputs: int = 6) -> dict[str, Tensor]:
    """The state dict of a published model, without memory for its values."""
    width = release.widths[0]
    with torch.device("meta"):
        net = OpenAINet(
            width=width,
            multiples=[value // width for value in release.widths],
            layers=release.layers,
            attention=release.attention,
            classes=release.classes,
            outputs=outputs,
            heads=1,
            scale_shift=release.scale_shift,
            resblock_updown=release.resblock_updown,
        )
    return dict(net.state_dict())


def converted_release(release: Shape, **given: Any) -> tuple[Conversion, Choices]:
    choices = Choices(given)
    return openai.convert(shapes_of(release), choices), choices


def test_published_models_need_no_options() -> None:
    guided64, guided128, *guided256, ffhq, cifar, lsun = RELEASES
    found, choices = converted_release(guided64.shape)
    assert (found.unet["sample_size"], found.unet["attention_head_dim"]) == (64, 64)
    assert found.scheduler["beta_schedule"] == "squaredcos_cap_v2"
    assert choices.assumed["use_new_attention_order"].startswith(
        "--use-new-attention-order (as of 64x64_diffusion.pt"
    )
    assert choices.assumed["sample_size"].startswith("--sample-size 64x64 (for which guided-diffusion")

    found, _ = converted_release(cifar.shape)
    assert (found.unet["sample_size"], found.unet["attention_head_dim"]) == (32, 64)
    assert found.scheduler["num_train_timesteps"] == 4000
    assert found.scheduler["timestep_scale"] == 0.25

    found, _ = converted_release(lsun.shape)
    assert (found.unet["sample_size"], found.unet["attention_head_dim"]) == (256, None)
    assert found.unet["resnet_time_scale_shift"] == "default"

    assert converted_release(ffhq.shape)[0].unet["attention_head_dim"] == 64

    for release, classes in zip(guided256, (1000, None), strict=True):
        found, _ = converted_release(release.shape)
        assert (found.unet["sample_size"], found.unet["attention_head_dim"]) == (256, 64)
        assert found.unet["down_block_types"] == ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3
        assert found.unet["up_block_types"] == ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3
        assert found.unet["num_class_embeds"] == classes
        assert found.scheduler["beta_schedule"] == "linear"

    with pytest.raises(ConversionError, match=r"4 heads on widths \[512, 768, 1024\]"):
        converted_release(guided128.shape)
    improved64 = Shape((128, 256, 384, 512), 3, (2, 3), False, True, None)
    with pytest.raises(ConversionError, match=r"improved-diffusion: 4 heads on widths \[384, 512\]"):
        converted_release(improved64)
    assert converted_release(improved64, num_head_channels=64)[0].unet["attention_head_dim"] == 64


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s | {"encoder_kv.weight": torch.zeros(1)}, "encoder_kv.weight is a weight that"),
        (lambda s: without(s, "middle_block.1.norm.bias"), "middle_block.1.norm.bias is missing"),
        (lambda s: without(s, "input_blocks.2.0.op"), "conv_resample=False"),
        (lambda s: s | {"time_embed.0.weight": torch.zeros(128, 64)}, "timestep embedding 64"),
        (lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "an upsampler"),
        (
            lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)},
            "4 channels in and 6 out: what goes",
        ),
        (lambda s: s | {"input_blocks.0.0.weight": torch.zeros(32, 3, 3)}, "one or three dimensions"),
        (lambda s: s | {"middle_block.1.qkv.weight": torch.zeros(192, 64, 1, 1)}, "consistency model"),
        (lambda s: without(s, "output_blocks.3"), "not those of a U-Net"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: Any, reason: str) -> None:
    state = dict(reference(heads=4).state_dict())
    openai.convert(dict(state), Choices({"sample_size": (8, 8)}))
    with pytest.raises(ConversionError, match=reason):
        openai.convert(change(state), Choices({"sample_size": (8, 8)}))


def test_an_image_size_that_nothing_says_is_asked_for() -> None:
    with pytest.raises(ConversionError, match="give --sample-size"):
        openai.convert(dict(reference(heads=4).state_dict()), Choices())


def test_heads_of_a_network_that_nobody_published_are_asked_for() -> None:
    net = reference(resblock_updown=True, head_channels=64)
    with pytest.raises(ConversionError, match=r"heads are not in the file: give --num-head-channels \(64 in"):
        convert(net)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConversionError, match="heads of 48 channels do not divide"):
        convert(reference(heads=4), num_head_channels=48)
