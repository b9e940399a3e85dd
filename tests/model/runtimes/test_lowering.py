from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model.blocks import Attention, ResBlock, Upsample
from model.runtimes.lowering import REWRITES, ChannelNorm, TransposedUpsample, lowered, to_graph
from tests.model.conftest import randomise, tiny_unet


def both(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network of these options and its lowered twin make of the same batch, in float64."""
    unet = tiny_unet(**options).double()
    twin = lowered(unet)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        return unet(x, t, y), twin(x, t, y)


RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
}
ATTENTION = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"attention_head_dim": 4},
        {"add_attention": False},
        {"attn_norm_num_groups": 2},
        {"mid_block_scale_factor": 1.5},
        {"layers_per_block": 2, "downsample_padding": 0},
        RESNET_BLOCKS,
        RESNET_BLOCKS | {"resnet_time_scale_shift": "scale_shift", "act_fn": "mish"},
        {"downsample_type": "resnet", "upsample_type": "resnet"} | ATTENTION,
        {"act_fn": "gelu"},
        {"act_fn": "relu"},
    ],
    ids=str,
)
def test_it_computes_the_same(options: dict[str, Any]) -> None:
    original, twin = both(**options)
    assert original.std() > 0.01
    torch.testing.assert_close(twin, original, rtol=1e-9, atol=1e-9)


def test_every_layer_that_has_a_rewrite_is_rewritten() -> None:
    unet = tiny_unet()
    kinds = {type(module) for module in unet.modules()}
    assert set(REWRITES) <= kinds  # so the comparison above means something
    names = {name for name, _ in lowered(unet).named_modules()}
    assert not any(
        isinstance(module, (Upsample, nn.GroupNorm)) and ".block." not in name
        for name, module in lowered(unet).named_modules()
        if not name.endswith("attention.group_norm")
    )
    assert {"mid_block.resnets.0.norm1", "mid_block.attentions.0.norm"} <= names


def test_without_rewrites_it_is_a_copy() -> None:
    unet = tiny_unet()
    copy = lowered(unet, {})
    assert [type(module) for module in copy.modules()] == [type(module) for module in unet.modules()]
    assert copy.conv_in.weight.data_ptr() != unet.conv_in.weight.data_ptr()


def test_the_given_network_is_left_alone() -> None:
    unet = tiny_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    kinds = [type(module) for module in unet.modules()]
    twin = lowered(unet)
    for parameter in twin.parameters():
        parameter.zero_()
    assert [type(module) for module in unet.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert isinstance(unet.mid_block.resnets[0], ResBlock)  # type: ignore[union-attr]
    assert isinstance(unet.mid_block.attentions[0], Attention)  # type: ignore[union-attr]


def test_a_norm_of_channels_far_from_zero() -> None:
    """The variance is a difference of means here; float32 has to stand that."""
    norm = nn.GroupNorm(2, 4)
    randomise(norm)
    x = 30 + torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ChannelNorm(norm)(x), norm(x), rtol=0, atol=2e-3)


def test_a_norm_of_a_constant() -> None:
    norm = nn.GroupNorm(1, 2)
    x = torch.full((1, 2, 4, 4), 1 / 3)
    assert ChannelNorm(norm)(x).isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_an_upsampling_has_the_same_edges(size: tuple[int, int]) -> None:
    upsample = Upsample(3).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TransposedUpsample(upsample.conv).double()(x), upsample(x))


def test_tracing_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        to_graph(nn.Identity(), [torch.zeros(1, 2)])
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
