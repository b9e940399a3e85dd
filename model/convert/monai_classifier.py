"""MONAI's noisy classifier, `DiffusionModelEncoder` in two dimensions, as one of ours (model/encoder.py).

It is the way down of MONAI's U-Net, halved once more at the end, and two dense layers over what is left.
"""

from __future__ import annotations

import math

from model.convert.classifier import move_time
from model.convert.conversion import (
    Choices,
    ClassifierConversion,
    ConversionError,
    Renaming,
    State,
    indices,
    sample_size,
)
from model.convert.monai import RESIDUAL, current_names, move_attention

FAMILY = "MONAI's DiffusionModelEncoder"
ANCHORS = (
    "time_embed.0.weight",
    "conv_in.conv.weight",
    "down_blocks.0.resnets.0.norm1.weight",
    "out.3.weight",
)


def convert(state: State, choices: Choices) -> ClassifierConversion:
    """A state dict of it as a `NoiseClassifier`.

    Raises ConversionError for one in three dimensions, with cross-attention, that is given a class itself, or
    of unequal depth by level.
    """
    if state["conv_in.conv.weight"].ndim != 4:
        raise ConversionError(f"{FAMILY}: a network of one or three dimensions, not of pictures")
    if any("transformer_blocks" in name for name in state):
        raise ConversionError(f"{FAMILY}: with_conditioning=True: cross-attention is not supported")
    if "class_embedding.weight" in state:
        raise ConversionError(f"{FAMILY}: num_class_embeds: it is given a class, where it is to tell one")
    levels = len(indices(state, r"down_blocks\.(\d+)\."))
    depths = {len(indices(state, rf"down_blocks\.{level}\.resnets\.(\d+)\.")) for level in range(levels)}
    if len(depths) > 1:
        raise ConversionError(f"{FAMILY}: num_res_blocks: one number for all levels is supported")
    widths = [len(state[f"down_blocks.{level}.resnets.0.norm2.weight"]) for level in range(levels)]
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in state for level in range(levels)]
    updown = "down_blocks.0.downsampler.norm1.weight" in state
    head_dim = None
    if any(attends):
        head_dim = choices.need("num_head_channels", "the size of its attention heads is not in the file")
    plain = "ResnetDownsampleBlock2D" if updown else "DownBlock2D"
    config = {
        "sample_size": sample_size(_size(state, levels, widths[-1], choices)),
        "in_channels": state["conv_in.conv.weight"].shape[1],
        "classes": len(state["out.3.weight"]),
        "block_out_channels": widths,
        "layers_per_block": depths.pop(),
        "norm_num_groups": choices.choose("norm_num_groups", 32, "MONAI's default"),
        "norm_eps": 1e-6,
        "stem": False,
        "down_block_types": ["AttnDownBlock2D" if attend else plain for attend in attends],
        "downsample_type": "resnet" if updown else "conv",
        "attention_head_dim": head_dim,
        "resnet_time_scale_shift": "default",
        "pool": "dense",
        "hidden_width": len(state["out.0.weight"]),
    }
    return ClassifierConversion(FAMILY, config, _rename(state, widths, attends, updown))


def _size(state: State, levels: int, width: int, choices: Choices) -> tuple[int, int]:
    """(height, width) of its images: the dense layer sees that many positions, if they are square."""
    positions = state["out.0.weight"].shape[1] // width
    side = math.isqrt(positions)
    if side**2 != positions:
        size: tuple[int, int] = choices.need(
            "sample_size", "the proportions of its images are not in the file"
        )
        return size
    given: tuple[int, int] = choices.choose(
        "sample_size", (side * 2**levels,) * 2, "if its images are square"
    )
    return given


def _rename(state: State, widths: list[int], attends: list[bool], updown: bool) -> State:
    names = Renaming(current_names(state), FAMILY)
    move_time(names, widths[0])
    names.layer("conv_in.conv", "conv_in")
    layers = len(indices(state, r"down_blocks\.0\.resnets\.(\d+)\."))
    for level, (width, attend) in enumerate(zip(widths, attends, strict=True)):
        source, target = f"down_blocks.{level}", f"levels.{level}"
        for j in range(layers):
            names.block(f"{source}.resnets.{j}", f"{target}.resnets.{j}", RESIDUAL)
            if attend:
                move_attention(names, f"{source}.attentions.{j}", f"{target}.attentions.{j}", width)
        down = f"{target}.downsamplers.0"
        if updown:
            names.block(f"{source}.downsampler", down, RESIDUAL)
        else:
            names.layer(f"{source}.downsampler.op.conv", f"{down}.conv")
    names.layer("out.0", "hidden")
    names.layer("out.3", "head")
    return names.finish()
