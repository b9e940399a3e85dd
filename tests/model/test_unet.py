from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from model.unet import ConfigError, UNet, UNetConfig, timestep_embedding
from tests.model.conftest import TINY, randomise

SMALL: dict[str, Any] = TINY | {"num_class_embeds": None}

# google/ddpm-cifar10-32 and google/ddpm-celebahq-256 as published, but for the widths and the second's size.
PUBLISHED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "time_embedding_type": "positional",
}
CIFAR10 = PUBLISHED | {
    "sample_size": 32,
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
CELEBAHQ = PUBLISHED | {
    "sample_size": 64,
    "block_out_channels": [8, 8, 16, 16, 32, 32],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
OURS = SMALL | {
    "sample_size": 32,
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "num_class_embeds": 11,
}
# The same attention everywhere, and head counts other than one, as diffusers' own defaults have them.
ATTENTION = {
    "sample_size": 16,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "norm_eps": 0.05,
}
CONFIGS = {
    "cifar10-32": CIFAR10,
    "celebahq-256": CELEBAHQ,
    "ours": OURS,
    "class-conditional": TINY,
    "attention at every level": ATTENTION,
    "scale_shift": SMALL | {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift, norm in the mid attention": SMALL
    | {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "attn_norm_num_groups": SMALL | {"attn_norm_num_groups": 2},
    "mid_block_scale_factor": SMALL | {"mid_block_scale_factor": 2**0.5, "attention_head_dim": 8},
    "no attention in the middle": SMALL | {"mid_block_scale_factor": 3, "add_attention": False},
    "no middle": SMALL | {"mid_block_type": None},
    "center_input_sample": SMALL | {"center_input_sample": True},
    "heads that do not fill the width": SMALL | {"attention_head_dim": 5},
    "time_embedding_dim": SMALL | {"time_embedding_dim": 24},
    "more channels out than in": SMALL | {"out_channels": 2},
    "an odd first width": SMALL
    | {"block_out_channels": [9, 12], "norm_num_groups": 3, "freq_shift": 1, "flip_sin_to_cos": False},
    "no resampling": SMALL
    | {
        "block_out_channels": [8],
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_equal_those_of_diffusers(name: str) -> None:
    config = UNetConfig.from_diffusers(CONFIGS[name])
    ours, theirs = UNet(config).eval(), UNet2DModel(**CONFIGS[name]).eval()
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, config.sample_size, config.sample_size, generator=rng)
    t = torch.tensor([0, 437, 999])
    y = None if config.num_class_embeds is None else torch.tensor([0, 1, config.num_class_embeds - 1])

    with torch.inference_mode():
        out, expected = ours(x, t, y), theirs(x, t, y).sample

    assert expected.std() > 0.05, "a dead network would prove nothing"
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_option_in_the_comparison_changes_the_output() -> None:
    # Otherwise an option that both networks ignored would pass for a supported one.
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])

    def output(**options: Any) -> torch.Tensor:
        net = UNet(UNetConfig(**(SMALL | options))).eval()
        randomise(net)
        with torch.inference_mode():
            out: torch.Tensor = net(x, t)
        return out

    plain = output()
    for options in (
        {"freq_shift": 1},
        {"flip_sin_to_cos": False},
        {"downsample_padding": 0},
        {"norm_eps": 1e-2},
        {"norm_num_groups": 2},
        {"attn_norm_num_groups": 2},
        {"attention_head_dim": 4},
        {"mid_block_scale_factor": 2.0},
        {"center_input_sample": True},
    ):
        assert not torch.allclose(output(**options), plain, atol=1e-3), options


def test_a_config_survives_the_way_through_diffusers() -> None:
    for options in CONFIGS.values():
        config = UNetConfig.from_diffusers(options)
        assert UNetConfig.from_diffusers(config.to_diffusers()) == config
        assert UNetConfig.from_diffusers(dict(UNet2DModel(**config.to_diffusers()).config)) == config


def test_defaults_are_those_of_diffusers() -> None:
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(UNet2DModel.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert UNetConfig.from_diffusers(theirs | {"sample_size": 32}) == UNetConfig()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
        ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"num_train_timesteps": 1000}, "num_train_timesteps=1000"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "SkipDownBlock2D"),
        ({"up_block_types": ["ResnetUpsampleBlock2D"] * 2}, "ResnetUpsampleBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "UNetMidBlock2DCrossAttn"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"block_out_channels": [8, 16, 16]}, "block_out_channels"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups=4 does not divide width 18"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"attention_head_dim": 32}, "attention_head_dim=32"),
        ({"sample_size": None}, "sample_size=None"),
        ({"sample_size": 7}, "sample_size=7"),
        ({"sample_size": 0}, "sample_size=0"),
        ({"sample_size": [8, 16]}, r"sample_size=\(8, 16\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        UNet(UNetConfig.from_diffusers(SMALL | options))


def test_a_missing_sample_size_is_not_guessed() -> None:
    with pytest.raises(ConfigError, match="sample_size=None"):
        UNetConfig.from_diffusers({name: value for name, value in SMALL.items() if name != "sample_size"})


def test_a_square_sample_size_is_one_number() -> None:
    assert UNetConfig.from_diffusers(SMALL | {"sample_size": [8, 8]}).sample_size == 8


def test_labels_are_given_exactly_to_conditional_networks() -> None:
    x, t = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="class labels"):
        UNet(UNetConfig(**TINY))(x, t)
    with pytest.raises(ValueError, match="class labels"):
        UNet(UNetConfig(**SMALL))(x, t, t)


def test_timestep_embedding_as_in_the_paper() -> None:
    t, dim = torch.tensor([3.0]), 8
    angles = torch.tensor([3 / 10_000 ** (i / 4) for i in range(4)])
    torch.testing.assert_close(timestep_embedding(t, dim)[0], torch.cat((angles.sin(), angles.cos())))
    flipped = timestep_embedding(t, dim, flip_sin_to_cos=True)[0]
    torch.testing.assert_close(flipped, torch.cat((angles.cos(), angles.sin())))
    # freq_shift 1 makes the last frequency exactly 1/10000.
    assert timestep_embedding(t, dim, freq_shift=1)[0, 3] == pytest.approx(3e-4, rel=1e-4)
