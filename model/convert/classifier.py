"""The noisy classifier of guided-diffusion, `EncoderUNetModel`, as one of ours (model/encoder.py).

It is the way down and the middle of its U-Net, and a pooling (Dhariwal & Nichol 2021, §4.1). A file does not
say how many residual blocks make a level where blocks downsample too; widths and attention do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from model.convert.conversion import (
    Choices,
    ClassifierConversion,
    ConversionError,
    Renaming,
    State,
    indices,
    sample_size,
)
from model.convert.openai import GROUPS, RESIDUAL, move_attention, split_qkv

FAMILY = "guided-diffusion's noisy classifier"
ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight")


def convert(state: State, choices: Choices) -> ClassifierConversion:
    """A state dict of it as a `NoiseClassifier`. Raises ConversionError for one that pools otherwise."""
    if "out.3.weight" not in state and "out.2.positional_embedding" not in state:
        raise ConversionError(
            f"{FAMILY}: classifier_pool=spatial is not supported; adaptive and attention are"
        )
    layers = _layers_per_block(state, choices)
    levels = len(indices(state, r"input_blocks\.(\d+)\.")) // (layers + 1)
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = [len(state[f"input_blocks.{n}.0.out_layers.0.weight"]) for n in first]
    conv_in = state["input_blocks.0.0.weight"]
    if not len(conv_in) == widths[0] == state["time_embed.0.weight"].shape[1]:
        raise ConversionError(f"{FAMILY}: its first convolution and its first level differ in width")
    attention = [f"input_blocks.{n}.1.qkv.weight" in state for n in first]
    updown = levels > 1 and f"input_blocks.{layers + 1}.0.in_layers.0.weight" in state
    pools = "out.2.positional_embedding" in state
    if pools:
        side = math.isqrt(state["out.2.positional_embedding"].shape[1] - 1)
        size = (side * 2 ** (levels - 1),) * 2
    else:
        size = choices.need("sample_size", "the size of its images is not in the file")
    head_dim = choices.choose("num_head_channels", 64, "as guided-diffusion makes its classifiers")
    emb = state["input_blocks.1.0.emb_layers.1.weight"]
    plain = "ResnetDownsampleBlock2D" if updown else "DownBlock2D"
    config = {
        "sample_size": sample_size(size),
        "in_channels": conv_in.shape[1],
        "classes": len(state["out.2.c_proj.weight" if pools else "out.3.weight"]),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": GROUPS,
        "stem": False,
        "down_block_types": ["AttnDownBlock2D" if attend else plain for attend in attention],
        "downsample_type": "resnet" if updown else "conv",
        "attention_head_dim": head_dim,
        "resnet_time_scale_shift": "scale_shift" if len(emb) == 2 * widths[0] else "default",
        "mid_block": True,
        "pool": "attention" if pools else "mean",
    }
    names = Renaming(state, FAMILY)
    move_time(names, widths[0])
    names.layer("input_blocks.0.0", "conv_in")
    for level in range(levels):
        target = f"levels.{level}"
        for j in range(layers):
            source = f"input_blocks.{first[level] + j}"
            names.block(f"{source}.0", f"{target}.resnets.{j}", RESIDUAL)
            if attention[level]:
                move_attention(names, f"{source}.1", f"{target}.attentions.{j}", head_dim, new_order=False)
        if level < levels - 1:
            source, target = f"input_blocks.{first[level] + layers}.0", f"{target}.downsamplers.0"
            if updown:
                names.block(source, target, RESIDUAL)
            else:
                names.layer(f"{source}.op", f"{target}.conv")
    names.block("middle_block.0", "mid_block.resnets.0", RESIDUAL)
    move_attention(names, "middle_block.1", "mid_block.attentions.0", head_dim, new_order=False)
    names.block("middle_block.2", "mid_block.resnets.1", RESIDUAL)
    names.layer("out.0", "norm_out")
    if pools:
        names.put("pool.positional_embedding", names.take("out.2.positional_embedding"))
        for kind in ("weight", "bias"):  # in the new order, unlike the attention before it
            parts = split_qkv(names.take(f"out.2.qkv_proj.{kind}"), None, new_order=True)
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                names.put(f"pool.{name}.{kind}", part if kind == "weight" else part.flatten())
    head = "out.2.c_proj" if pools else "out.3"
    names.put("head.weight", names.take(f"{head}.weight").flatten(1))
    names.put("head.bias", names.take(f"{head}.bias"))
    return ClassifierConversion(FAMILY, config, names.finish())


def move_time(names: Renaming, width: int) -> None:
    """Our embedding has four times as many frequencies, of which every fourth is one of theirs."""
    theirs = names.take("time_embed.0.weight")  # for [cosines, sines]; ours is for [sines, cosines]
    weight = theirs.new_zeros(len(theirs), 4 * width)
    cosines, sines = theirs.chunk(2, dim=1)
    weight[:, : 2 * width : 4], weight[:, 2 * width :: 4] = sines, cosines
    names.put("time_embedding.linear_1.weight", weight)
    names.put("time_embedding.linear_1.bias", names.take("time_embed.0.bias"))
    names.layer("time_embed.2", "time_embedding.linear_2")


def _layers_per_block(state: Mapping[str, Tensor], choices: Choices) -> int:
    """The number of residual blocks per level with which widths and attention change between levels only."""
    inputs = indices(state, r"input_blocks\.(\d+)\.")
    if inputs != list(range(len(inputs))):
        raise ConversionError(
            f"{FAMILY}: conv_resample=False: it averages to downsample, which is not supported"
        )
    strided = [n for n in inputs if f"input_blocks.{n}.0.op.weight" in state]
    widens = [n for n in inputs if f"input_blocks.{n}.0.skip_connection.weight" in state]
    attends = {n for n in inputs if f"input_blocks.{n}.1.qkv.weight" in state}

    def fits(period: int) -> bool:
        downs = range(period, len(inputs), period)
        levels = [set(range(start + 1, start + period)) for start in range(0, len(inputs), period)]
        return (
            strided in ([], list(downs))
            and all(n % period == 1 for n in widens)
            and attends == {n for level in levels if level & attends for n in level}
        )

    found = [n for n in range(1, len(inputs)) if len(inputs) % (n + 1) == 0 and fits(n + 1)]
    wanted = choices.given("layers_per_block")
    if wanted is None and len(found) == 1:
        return found[0]
    if wanted is None and found:
        counts = ", ".join(map(str, found))
        raise ConversionError(
            f"{FAMILY}: {counts} residual blocks per level are possible: give --layers-per-block"
        )
    if wanted not in found:
        raise ConversionError(
            f"{FAMILY}: no number of residual blocks per level makes these {len(inputs)} blocks"
        )
    return int(wanted)
