"""The U-Net of Ho et al. 2020 in PyTorch (ermongroup/ddim, pesser/pytorch_diffusion and what follows them).

It is the network that `UNet2DModel` was made after: one attention head, timesteps embedded as sines and then
cosines, and downsampling that pads right and bottom only. Its levels count from the highest resolution on
both sides, where diffusers counts the up blocks from the lowest.
"""

from __future__ import annotations

from typing import Any

from model.convert.conversion import (
    Choices,
    Conversion,
    ConversionError,
    Renaming,
    State,
    indices,
    sample_size,
    scheduler_config,
)

FAMILY = "DDPM (Ho et al. 2020)"
ANCHORS = ("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.norm1.weight", "mid.block_1.norm1.weight")
RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
SIZES = {(1, 2, 2, 2): 32, (1, 2, 2, 2, 4): 64, (1, 1, 2, 2, 4, 4): 256}
"""The image size for which its configurations choose these multiples of the width."""


def convert(state: State, choices: Choices) -> Conversion:
    """A state dict of it as a `UNet2DModel`. Raises ConversionError for one with other layers."""
    levels = len(indices(state, r"down\.(\d+)\."))
    layers = len(indices(state, r"down\.0\.block\.(\d+)\."))
    for level in range(levels - 1):
        if not any(f"down.{level}.downsample.{name}.weight" in state for name in ("conv", "op")):
            raise ConversionError(
                f"{FAMILY}: resamp_with_conv=False: it averages to downsample, which is no option"
            )
    widths = [len(state[f"down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    base, channels = state["conv_in.weight"].shape[:2]
    if base != widths[0]:
        raise ConversionError(
            f"{FAMILY}: its first convolution has {base} channels, its first level {widths[0]}"
        )
    multiples = tuple(width // base for width in widths)
    size = (
        choices.choose(
            "sample_size", (SIZES[multiples],) * 2, f"that of the models with widths × {multiples}"
        )
        if multiples in SIZES
        else choices.need("sample_size", "the size of its images is not in the file")
    )
    attends = [f"down.{level}.attn.0.q.weight" in state for level in range(levels)]
    unet: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size(size),
        "in_channels": channels,
        "out_channels": len(state["conv_out.weight"]),
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "time_embedding_dim": len(state["temb.dense.0.weight"]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "downsample_padding": 0,
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
    }
    # As the authors chose: the larger variance for CIFAR-10, the smaller one for LSUN and CelebA-HQ.
    variance = "fixed_large" if max(size) <= 32 else "fixed_small"
    scheduler = scheduler_config(choices, "the default of Ho et al. 2020", variance_type=variance)
    return Conversion(FAMILY, unet, _rename(state, levels, layers, attends), scheduler)


def _rename(state: State, levels: int, layers: int, attends: list[bool]) -> State:
    names = Renaming(state, FAMILY)
    for i in (0, 1):
        names.layer(f"temb.dense.{i}", f"time_embedding.linear_{i + 1}")
    names.layer("conv_in", "conv_in")
    for level, attend in enumerate(attends):
        sides = (("down", level, layers), ("up", levels - 1 - level, layers + 1))
        for side, place, count in sides:
            target = f"{side}_blocks.{place}"
            for j in range(count):
                names.block(f"{side}.{level}.block.{j}", f"{target}.resnets.{j}", RESIDUAL)
                if attend:
                    _move_attention(names, f"{side}.{level}.attn.{j}", f"{target}.attentions.{j}")
        if level < levels - 1:
            layer = "op" if f"down.{level}.downsample.op.weight" in state else "conv"
            names.layer(f"down.{level}.downsample.{layer}", f"down_blocks.{level}.downsamplers.0.conv")
        if level > 0:
            names.layer(f"up.{level}.upsample.conv", f"up_blocks.{levels - 1 - level}.upsamplers.0.conv")
    for i in (0, 1):
        names.block(f"mid.block_{i + 1}", f"mid_block.resnets.{i}", RESIDUAL)
    _move_attention(names, "mid.attn_1", "mid_block.attentions.0")
    names.layer("norm_out", "conv_norm_out")
    names.layer("conv_out", "conv_out")
    return names.finish()


def _move_attention(names: Renaming, source: str, target: str) -> None:
    names.layer(f"{source}.norm", f"{target}.group_norm")
    for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        # 1×1 convolutions there, linear layers here
        names.put(f"{target}.{ours}.weight", names.take(f"{source}.{theirs}.weight").flatten(1))
        names.put(f"{target}.{ours}.bias", names.take(f"{source}.{theirs}.bias"))
