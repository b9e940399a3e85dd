"""MONAI's `DiffusionModelUNet` in two dimensions, of MONAI 1.4 and later or of MONAI Generative before it.

It follows `UNet2DModel` under other names. MONAI's transforms scale images to [0, 1], where diffusers has
[-1, 1], so the scheduler config says `data_range`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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

FAMILY = "MONAI's DiffusionModelUNet"
ANCHORS = ("time_embed.0.weight", "conv_in.conv.weight", "down_blocks.0.resnets.0.conv1.conv.weight")
RESIDUAL = {
    "norm1": "norm1",
    "conv1.conv": "conv1",
    "time_emb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2.conv": "conv2",
    "skip_connection.conv": "conv_shortcut",
}
SCHEDULES = ("linear", "scaled_linear", "sigmoid")


def convert(state: State, choices: Choices) -> Conversion:
    """A state dict of it as a `UNet2DModel`.

    Raises ConversionError for one in three dimensions, with cross-attention, or of unequal depth by level.
    """
    if state["conv_in.conv.weight"].ndim != 4:
        raise ConversionError(f"{FAMILY}: a network of one or three dimensions, not of pictures")
    if any("transformer_blocks" in name for name in state):
        raise ConversionError(
            f"{FAMILY}: with_conditioning=True: cross-attention to a context is not supported"
        )
    levels = len(indices(state, r"down_blocks\.(\d+)\."))
    depths = [len(indices(state, rf"down_blocks\.{level}\.resnets\.(\d+)\.")) for level in range(levels)]
    if len(set(depths)) > 1:
        raise ConversionError(
            f"{FAMILY}: num_res_blocks={tuple(depths)}: UNet2DModel has one number for all levels"
        )
    widths = [len(state[f"down_blocks.{level}.resnets.0.norm2.weight"]) for level in range(levels)]
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in state for level in range(levels)]
    resblock_updown = "down_blocks.0.downsampler.norm1.weight" in state
    head_dim = choices.need(
        "num_head_channels",
        "the size of its attention heads is not in the file (MONAI has 8 "
        "unless told otherwise; its tutorials have 256)",
    )
    if any(width % head_dim for width, attend in zip(widths, [*attends[:-1], True], strict=True) if attend):
        raise ConversionError(f"{FAMILY}: heads of {head_dim} channels do not divide widths of {widths}")
    label = state.get("class_embedding.weight")
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if resblock_updown
        else ("DownBlock2D", "UpBlock2D")
    )
    resample = "resnet" if resblock_updown else "conv"
    size = choices.need("sample_size", "the size of its images is not in the file")
    groups = choices.choose("norm_num_groups", 32, "MONAI's default")
    unet: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size(size),
        "in_channels": state["conv_in.conv.weight"].shape[1],
        "out_channels": len(state["out.2.conv.weight"]),
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "block_out_channels": widths,
        "layers_per_block": depths[0],
        "down_block_types": ["AttnDownBlock2D" if attend else down for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else up for attend in reversed(attends)],
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "attention_head_dim": head_dim,
        "norm_num_groups": groups,
        "norm_eps": 1e-6,
        "num_class_embeds": None if label is None else len(label),
    }
    if choices.given("beta_schedule") not in (None, *SCHEDULES):
        # MONAI's cosine begins with ᾱ = 1, so its timesteps are one behind those of Nichol & Dhariwal.
        raise ConversionError(f"{FAMILY}: --beta-schedule must be one of {', '.join(SCHEDULES)}")
    scheduler = scheduler_config(choices, "MONAI's default")
    low, high = choices.choose("data_range", (0.0, 1.0), "as MONAI's transforms scale images")
    scheduler["data_range"] = [low, high]
    return Conversion(FAMILY, unet, _rename(state, widths, depths[0], attends, resblock_updown), scheduler)


def _rename(
    state: State, widths: list[int], layers: int, attends: list[bool], resblock_updown: bool
) -> State:
    names = Renaming(current_names(state), FAMILY)
    names.layer("time_embed.0", "time_embedding.linear_1")
    names.layer("time_embed.2", "time_embedding.linear_2")
    if "class_embedding.weight" in state:
        names.put("class_embedding.weight", names.take("class_embedding.weight"))
    names.layer("conv_in.conv", "conv_in")
    levels = len(widths)
    for side, count, conv in (("down", layers, "op.conv"), ("up", layers + 1, "postconv.conv")):
        for i in range(levels):
            level, place = i if side == "down" else levels - 1 - i, f"{side}_blocks.{i}"
            for j in range(count):
                names.block(f"{place}.resnets.{j}", f"{place}.resnets.{j}", RESIDUAL)
                if attends[level]:
                    attention = f"{place}.attentions.{j}"
                    move_attention(names, attention, attention, widths[level])
            if i == levels - 1:
                continue
            source, target = f"{place}.{side}sampler", f"{place}.{side}samplers.0"
            if resblock_updown:
                names.block(source, target, RESIDUAL)
            else:
                names.layer(f"{source}.{conv}", f"{target}.conv")
    for i in (0, 1):
        names.block(f"middle_block.resnet_{i + 1}", f"mid_block.resnets.{i}", RESIDUAL)
    move_attention(names, "middle_block.attention", "mid_block.attentions.0", widths[-1])
    names.layer("out.0", "conv_norm_out")
    names.layer("out.2.conv", "conv_out")
    return names.finish()


def current_names(state: Mapping[str, Tensor]) -> State:
    """Those of MONAI Generative as MONAI has them since."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[-2] in ("to_q", "to_k", "to_v", "proj_attn") and parts[-3] != "attn":
            parts[-2:-1] = ["attn", parts[-2].replace("proj_attn", "out_proj")]
        elif parts[-4:-1] == ["upsampler", "conv", "conv"]:
            parts[-3] = "postconv"
        renamed[".".join(parts)] = tensor
    return renamed


def move_attention(names: Renaming, source: str, target: str, width: int) -> None:
    """An attention block, whose queries, keys and values may be one layer there, or its last layer none."""
    names.layer(f"{source}.norm", f"{target}.group_norm")
    if names.has(f"{source}.attn.qkv.weight"):  # use_combined_linear: queries, keys and values in one layer
        for kind in ("weight", "bias"):
            parts = names.take(f"{source}.attn.qkv.{kind}").chunk(3)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                names.put(f"{target}.{name}.{kind}", part)
    else:
        for name in ("to_q", "to_k", "to_v"):
            names.layer(f"{source}.attn.{name}", f"{target}.{name}")
    if names.has(f"{source}.attn.out_proj.weight"):
        names.layer(f"{source}.attn.out_proj", f"{target}.to_out.0")
    else:  # include_fc=False: what attention gives is added as it is
        names.put(f"{target}.to_out.0.weight", torch.eye(width))
        names.put(f"{target}.to_out.0.bias", torch.zeros(width))
