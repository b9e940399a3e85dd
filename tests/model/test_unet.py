from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from model.blocks import timestep_embedding
from model.unet import ConfigError, UNet, UNetConfig
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
RESNET_SAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet"}
RESNET_BLOCKS = {
    "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
    "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
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
    "not square": SMALL | {"sample_size": [8, 16]},
    "more channels out than in": SMALL | {"out_channels": 2},
    "an odd first width": SMALL
    | {"block_out_channels": [9, 12], "norm_num_groups": 3, "freq_shift": 1, "flip_sin_to_cos": False},
    "attention, resampling by residual blocks": SMALL
    | RESNET_SAMPLING
    | {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2},
    "the same without attention, which changes nothing": SMALL
    | RESNET_SAMPLING
    | {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
    "levels of residual blocks alone": SMALL | RESNET_BLOCKS,
    "as guided-diffusion's": SMALL
    | RESNET_BLOCKS
    | {
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "block_out_channels": [8, 16, 16],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "attention_head_dim": 8,
        "out_channels": 2,
        "num_class_embeds": 3,
        "sample_size": [8, 16],
    },
    **{f"act_fn {name}": SMALL | {"act_fn": name} for name in ("swish", "mish", "gelu", "relu")},
    "relu and residual resampling": SMALL | RESNET_BLOCKS | {"act_fn": "relu"},
    "fourier": SMALL | {"time_embedding_type": "fourier"},
    "fourier, gelu, classes": TINY | {"time_embedding_type": "fourier", "act_fn": "gelu"},
    "learned": SMALL | {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "classes that are numbers": SMALL | {"class_embed_type": "timestep"},
    "classes that are numbers, embedded as learned timesteps": SMALL
    | {"class_embed_type": "timestep", "time_embedding_type": "learned", "num_train_timesteps": 1000},
    "num_class_embeds beside classes that are numbers": TINY | {"class_embed_type": "timestep"},
    "dropout": SMALL | {"dropout": 0.5},
    "num_train_timesteps that nothing is learned for": SMALL | {"num_train_timesteps": 50},
    "two channels": SMALL | {"in_channels": 2, "out_channels": 2},
    "RGBA, not square": SMALL | {"in_channels": 4, "out_channels": 4, "sample_size": [16, 8]},
    "six channels": SMALL | {"in_channels": 6, "out_channels": 6},
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
    if config.time_embedding_type == "fourier":
        ours.time_proj.weight.data.mul_(50)  # type: ignore[operator]  # frequencies as they are drawn
    theirs.load_state_dict(ours.state_dict(), strict=True)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, *config.shape, generator=rng)
    t = torch.tensor([1 if config.time_embedding_type == "fourier" else 0, 437, 999])
    y = torch.tensor([0, 1, (config.labels or 1000) - 1]) if config.conditional else None

    with torch.inference_mode():
        out, expected = ours(x, t, y), theirs(x, t, y).sample

    assert expected.std() > 0.05, "a dead network would prove nothing"
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_option_in_the_comparison_changes_the_output() -> None:
    # Otherwise an option that both networks ignored would pass for a supported one.
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])

    def output(**options: Any) -> torch.Tensor:
        net = UNet(UNetConfig.from_diffusers(SMALL | options)).eval()
        randomise(net)
        with torch.inference_mode():
            out: torch.Tensor = net(x, t)
        return out

    plain = output()
    attention = {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}
    attention["up_block_types"] = ["UpBlock2D", "AttnUpBlock2D"]
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
        {"act_fn": "gelu"},
        {"act_fn": "mish"},
        {"act_fn": "relu"},
        {"downsample_type": "resnet"} | attention,
        {"upsample_type": "resnet"} | attention,
        RESNET_BLOCKS,
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
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
    assert UNetConfig.from_diffusers(theirs) == UNetConfig()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"act_fn": "tanh"}, "act_fn='tanh'"),
        ({"time_embedding_type": "sinusoidal"}, "time_embedding_type='sinusoidal'"),
        ({"time_embedding_type": "learned"}, "needs num_train_timesteps"),
        ({"downsample_type": "fir"}, "downsample_type='fir'"),
        ({"upsample_type": "fir"}, "upsample_type='fir'"),
        ({"class_embed_type": "identity"}, "class_embed_type='identity' .* a vector"),
        ({"class_embed_type": "projection"}, "class_embed_type='projection'"),
        ({"class_embed_type": "timestep", "time_embedding_type": "fourier"}, "label 0 has no logarithm"),
        ({"cross_attention_dim": 768}, "cross_attention_dim=768"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel'"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "SkipDownBlock2D"),
        ({"down_block_types": ["KDownBlock2D"] * 2}, "KDownBlock2D"),
        ({"up_block_types": ["AttnSkipUpBlock2D"] * 2}, "AttnSkipUpBlock2D"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"dropout": None}, "dropout=None must be a number"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' must be a number"),
        ({"add_attention": "false"}, "add_attention='false' must be true or false"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"layers_per_block": 2.0}, "layers_per_block=2.0"),
        ({"num_class_embeds": 0}, "num_class_embeds=0"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups=5 does not divide width 16"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "UNetMidBlock2DCrossAttn"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
        ({"downsample_padding": 2}, "downsample_padding=2"),
        ({"block_out_channels": [8, 16, 16]}, "block_out_channels"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups=4 does not divide width 18"),
        ({"norm_num_groups": None}, "norm_num_groups=None"),
        ({"attention_head_dim": 32}, "attention_head_dim=32"),
        ({"sample_size": 7}, "sample_size=7"),
        ({"sample_size": 0}, "sample_size=0"),
        ({"sample_size": True}, "sample_size=True"),
        ({"sample_size": "8"}, "sample_size='8'"),
        ({"sample_size": [8, 15]}, r"sample_size=\(8, 15\)"),
        ({"sample_size": [8, 8, 8]}, r"sample_size=\(8, 8, 8\)"),
        ({"sample_size": []}, r"sample_size=\(\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        UNet(UNetConfig.from_diffusers(SMALL | options))


def test_keys_without_an_effect_are_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bookkeeping = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "_name_or_path": "x"}
    plain = UNetConfig.from_diffusers(SMALL)
    assert UNetConfig.from_diffusers(SMALL | bookkeeping) == plain
    assert not caplog.records
    ema = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 5, "update_after_step": 0}
    ema |= {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
    assert UNetConfig.from_diffusers(SMALL | ema | {"torch_dtype": "float16", "_mine": 1}) == plain
    (record,) = caplog.records
    assert (record.levelname, set(ema) - set(record.getMessage().replace(",", "").split())) == (
        "WARNING",
        set(),
    )
    assert "_mine" in record.getMessage()
    assert "torch_dtype" in record.getMessage()


def test_older_spellings_are_read() -> None:
    older = {
        "down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"],
        "up_block_types": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"],
        "act_fn": "SiLU",
        "downsample_type": None,
        "upsample_type": None,
    }
    assert UNetConfig.from_diffusers(SMALL | older) == UNetConfig.from_diffusers(SMALL)
    assert UNet2DModel(**SMALL | older).state_dict().keys() == UNet(UNetConfig(**SMALL)).state_dict().keys()


def test_what_diffusers_fails_on_is_refused() -> None:
    options = SMALL | {"sample_size": 7}
    with pytest.raises(RuntimeError, match="must match"):
        UNet2DModel(**options)(torch.zeros(1, 1, 7, 7), 0)
    with pytest.raises(ConfigError, match=r"sample_size=7 .* halved 1 times"):
        UNetConfig.from_diffusers(options)


def test_learned_embeddings_have_to_be_enough_for_the_chain(caplog: pytest.LogCaptureFixture) -> None:
    learned = {"time_embedding_type": "learned", "num_train_timesteps": 100}
    config = UNetConfig.from_diffusers(SMALL | learned)
    config.check_timesteps(100)
    with pytest.raises(ConfigError, match=r"num_train_timesteps=100 .* 1000 timesteps"):
        config.check_timesteps(1000)
    UNetConfig.from_diffusers(SMALL | {"num_train_timesteps": 100}).check_timesteps(1000)  # positional
    with pytest.raises(ConfigError, match=r"timestep_scale=0\.5"):
        config.check_timesteps(100, 0.5)
    assert not caplog.records
    fourier = UNetConfig.from_diffusers(SMALL | {"time_embedding_type": "fourier"})
    assert (fourier.lowest_timestep, config.lowest_timestep) == (1, 0)
    fourier.check_timesteps(1000)
    assert "no value at timestep 0" in caplog.text


def test_fourier_features_have_no_value_at_zero() -> None:
    options = SMALL | {"time_embedding_type": "fourier"}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    for net in (UNet(UNetConfig.from_diffusers(options)), UNet2DModel(**options)):
        out = net(x, t)
        found = (out if isinstance(out, torch.Tensor) else out.sample).isfinite()
        assert (found[0].any().item(), found[1].all().item()) == (False, True)


def test_fourier_frequencies_stay_float32() -> None:
    net = UNet(UNetConfig.from_diffusers(SMALL | {"time_embedding_type": "fourier"})).eval()
    randomise(net)
    net.requires_grad_(False)
    before = net.time_proj.weight.data.mul_(50).clone()  # type: ignore[operator]
    expected = net(x := torch.randn(2, 1, 8, 8), t := torch.tensor([3, 900]))
    half = net.to(torch.bfloat16)
    assert (half.time_proj.weight.dtype, half.conv_in.weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(half.time_proj.weight, before)  # type: ignore[arg-type]
    out = half(x.to(torch.bfloat16), t)
    errors = (out.float() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.max() < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_class_embeds": None},
        {"time_embedding_type": "fourier"},
        {"num_class_embeds": None, "class_embed_type": "timestep"},
    ],
    ids=str,
)
def test_the_parts_are_the_whole(options: dict[str, Any]) -> None:
    net = UNet(UNetConfig.from_diffusers(TINY | options)).eval()
    x = torch.randn(3, *net.config.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([1, 9, 999]), torch.tensor([0, 2, 1]) if net.config.conditional else None
    features, body, scaled = net.split()
    found = features(t, y)
    assert found[0].ndim == 2
    assert torch.equal(scaled(body(x, *found), t), net(x, t, y))


def test_a_missing_sample_size_is_not_guessed() -> None:
    config = UNetConfig.from_diffusers({name: SMALL[name] for name in SMALL.keys() - {"sample_size"}})
    assert config.sample_size is None
    with pytest.raises(ConfigError, match="sample_size is missing"):
        config.shape  # noqa: B018
    assert config.to_diffusers()["sample_size"] is None


@pytest.mark.parametrize(
    ("given", "pair", "kept"), [(8, (8, 8), 8), ([8, 8], (8, 8), 8), ([8, 16], (8, 16), (8, 16))]
)
def test_a_sample_size_is_a_height_and_a_width(given: Any, pair: tuple[int, int], kept: Any) -> None:
    config = UNetConfig.from_diffusers(SMALL | {"sample_size": given})
    assert config.sample_size == pair
    assert config.shape == (1, *pair)
    assert config.to_diffusers()["sample_size"] == kept


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
