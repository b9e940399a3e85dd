"""The U-Net of improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021).

Both projects call its layers the same. What a checkpoint does not say, since no shape shows it: the number
of attention heads, in which order queries, keys and values lie, the size of the image and the schedule.
These follow from the published models' own settings where the shapes are theirs, else from the projects'
defaults; the command line has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from model.condition import channels_of
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

ANCHORS = ("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight")
GUIDED, IMPROVED = "guided-diffusion", "improved-diffusion"
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
GROUPS = 32
"""Of every group norm of theirs."""

SIZES = {(1, 2, 2, 2): 32, (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
"""The image size for which their scripts choose these multiples of the width."""


@dataclass(frozen=True)
class Shape:
    """What names and shapes say of a network; levels count from the highest resolution."""

    widths: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    resblock_updown: bool
    scale_shift: bool
    classes: int | None


@dataclass(frozen=True)
class Release:
    """A published model: its shape, and what its authors ran it with where that is not the default."""

    name: str
    shape: Shape
    options: Mapping[str, Any] = field(default_factory=dict)


_WIDE = (256, 256, 512, 512, 1024, 1024)
RELEASES = (
    Release(
        "64x64_diffusion.pt",
        Shape((192, 384, 576, 768), 3, (1, 2, 3), True, True, 1000),
        {"num_head_channels": 64, "use_new_attention_order": True, "beta_schedule": "squaredcos_cap_v2"},
    ),
    Release(
        "128x128_diffusion.pt",
        Shape((256, 256, 512, 768, 1024), 2, (2, 3, 4), True, True, 1000),
        {"num_heads": 4},
    ),
    Release("256x256_diffusion.pt", Shape(_WIDE, 2, (3, 4, 5), True, True, 1000), {"num_head_channels": 64}),
    Release(
        "256x256_diffusion_uncond.pt and lsun_*.pt",
        Shape(_WIDE, 2, (3, 4, 5), True, True, None),
        {"num_head_channels": 64},
    ),
    Release(  # Choi et al. 2022, and Chung et al. 2023 after it
        "ffhq_10m.pt",
        Shape((128, 128, 256, 256, 512, 512), 1, (4,), True, True, None),
        {"num_head_channels": 64},
    ),
    Release(
        "cifar10_uncond_50M_500K.pt",
        Shape((128, 256, 256, 256), 3, (1, 2), False, True, None),
        {"num_train_timesteps": 4000, "beta_schedule": "squaredcos_cap_v2"},
    ),
    Release(
        "lsun_uncond_100M_1200K_bs128.pt",
        Shape((128, 128, 256, 256, 512, 512), 2, (4,), False, False, None),
        {"num_heads": 1, "rescale_timesteps": False},
    ),
)


def convert(state: State, choices: Choices) -> Conversion:
    """A state dict of theirs as a `UNet2DModel`.

    Raises ConversionError for a network that is none: an upsampler, one whose heads differ in size by level,
    one that is as wide at the start as no level is.
    """
    shape = shape_of(state)
    family = GUIDED if shape.resblock_updown else IMPROVED
    release = next((known for known in RELEASES if known.shape == shape), None)
    defaults: dict[str, Any] = {"use_new_attention_order": False, "rescale_timesteps": family == IMPROVED}
    if family == IMPROVED:
        defaults["num_heads"] = 4
    why = f"the default of {family}"
    if release is not None:
        defaults |= release.options
        why = f"as of {release.name} of {family}, whose shapes these are"

    inputs, outputs, picture = _channels(state, shape, choices, family)
    multiples = tuple(value // shape.widths[0] for value in shape.widths)
    size = (
        choices.choose("sample_size", (SIZES[multiples],) * 2, f"for which {family} has widths × {multiples}")
        if multiples in SIZES
        else choices.need("sample_size", "the size of its images is not in the file")
    )
    head_dim = attention_head_dim(shape, choices, defaults, f"{family}: ", why)
    new_order = choices.choose("use_new_attention_order", defaults["use_new_attention_order"], why)
    down, up, resample = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D", "resnet")
        if shape.resblock_updown
        else ("DownBlock2D", "UpBlock2D", "conv")
    )
    attends = [level in shape.attention for level in range(len(shape.widths))]
    unet: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size(size),
        "in_channels": inputs,
        "out_channels": outputs,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "time_embedding_dim": len(state["time_embed.0.weight"]),
        "block_out_channels": list(shape.widths),
        "layers_per_block": shape.layers,
        "down_block_types": ["AttnDownBlock2D" if attend else down for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else up for attend in reversed(attends)],
        "downsample_type": resample,
        "upsample_type": resample,
        "downsample_padding": 1,
        "attention_head_dim": head_dim,
        "norm_num_groups": GROUPS,
        "attn_norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if shape.scale_shift else "default",
        "num_class_embeds": shape.classes,
    }
    scheduler = _scheduler(choices, defaults, why, learned=outputs == 2 * picture)
    return Conversion(family, unet, rename(state, shape, head_dim, new_order, family), scheduler)


def _channels(
    state: Mapping[str, Tensor], shape: Shape, choices: Choices, family: str
) -> tuple[int, int, int]:
    """The channels of input, output and picture.

    Raises ConversionError where these ends are not a `UNet2DModel`'s.
    """
    conv_in = state["input_blocks.0.0.weight"]
    if conv_in.ndim != 4:
        raise ConversionError(f"{family}: a network of one or three dimensions, not of pictures")
    width, inputs = conv_in.shape[:2]
    outputs = len(state["out.2.weight"])
    condition = choices.given("condition") or ()
    picture = channels_of(inputs, condition)
    if inputs == outputs == 6 and not condition and choices.given("variance_type") is None:
        raise ConversionError(
            f"{family}: 6 channels in and 6 out, so an upsampler, which takes a smaller picture as well: give"
            " --condition image; or if its pictures have 6 channels, --variance-type fixed_large"
        )
    if outputs not in (picture, 2 * picture):
        raise ConversionError(
            f"{family}: {inputs} channels in and {outputs} out: what goes in beside a picture has to be said"
            " by --condition"
        )
    base = state["time_embed.0.weight"].shape[1]
    if not width == shape.widths[0] == base:
        raise ConversionError(
            f"{family}: its first convolution has {width} channels, its first level {shape.widths[0]}, its "
            f"timestep embedding {base}; UNet2DModel has one width for the three"
        )
    return inputs, outputs, picture


def _scheduler(choices: Choices, defaults: Mapping[str, Any], why: str, learned: bool) -> dict[str, Any]:
    steps = choices.choose("num_train_timesteps", defaults.get("num_train_timesteps", 1000), why)
    variance = {"variance_type": "learned_range" if learned else "fixed_large"}
    config = scheduler_config(
        choices,
        why,
        # Their linear schedule is that of Ho et al. at T = 1000, and steeper or flatter at another T.
        beta_start=0.1 / steps,
        beta_end=20 / steps,
        **variance,
        **{name: defaults[name] for name in ("num_train_timesteps", "beta_schedule") if name in defaults},
    )
    if learned:
        choices.assumed.pop("variance_type", None)  # the shapes say so
    choices.given("rescale_timesteps")  # without effect at T = 1000
    if steps != 1000 and choices.choose("rescale_timesteps", defaults["rescale_timesteps"], why):
        config["timestep_scale"] = 1000 / steps  # the network sees t · 1000/T
    return config


def shape_of(state: Mapping[str, Tensor]) -> Shape:
    """Read the network off the names and shapes. Raises ConversionError where they contradict each other."""
    inputs, outputs = (indices(state, rf"{side}_blocks\.(\d+)\.") for side in ("input", "output"))
    if inputs != list(range(len(inputs))):
        raise ConversionError("conv_resample=False: it averages to downsample, which UNet2DModel does not")
    resamples = [n for n in outputs if any(f"output_blocks.{n}.{k}.conv.weight" in state for k in (1, 2))]
    residual = [
        n for n in outputs if any(f"output_blocks.{n}.{k}.in_layers.0.weight" in state for k in (1, 2))
    ]
    levels = len(resamples or residual) + 1
    layers = len(outputs) // levels - 1
    if len(inputs) != len(outputs) or len(outputs) != levels * (layers + 1) or layers < 1:
        counts = f"{len(inputs)} input blocks and {len(outputs)} output blocks with {levels - 1} upsamplers"
        raise ConversionError(f"{counts} are not those of a U-Net of equal depth at every level")
    first = [1 + level * (layers + 1) for level in range(levels)]
    label = state.get("label_emb.weight")
    width = len(state["input_blocks.1.0.out_layers.0.weight"])
    return Shape(
        widths=tuple(len(state[f"input_blocks.{n}.0.out_layers.0.weight"]) for n in first),
        layers=layers,
        attention=tuple(level for level, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in state),
        resblock_updown=bool(residual),
        scale_shift=len(state["input_blocks.1.0.emb_layers.1.weight"]) == 2 * width,
        classes=None if label is None else len(label),
    )


def attention_head_dim(
    shape: Shape, choices: Choices, defaults: Mapping[str, Any], who: str, why: str
) -> int | None:
    """Channels per attention head; None is one head at every level.

    Raises ConversionError where the heads do not come out at one size.
    """
    widths = sorted({shape.widths[level] for level in shape.attention} | {shape.widths[-1]})
    head, heads = choices.given("num_head_channels"), choices.given("num_heads")
    if head is None and heads is None:
        if "num_heads" in defaults:
            heads = choices.choose("num_heads", defaults["num_heads"], why)
        elif "num_head_channels" in defaults or widths == [256]:  # of which 4 heads have 64 each
            head = choices.choose("num_head_channels", 64, why)
        else:
            raise ConversionError(
                f"{who}its attention heads are not in the file: give --num-head-channels (64 in the "
                "published models) or --num-heads (4 unless told otherwise), as it was trained"
            )
    if heads == 1 and head is None:
        return None
    found = [head] if head is not None else sorted({width // heads for width in widths})
    options = "give --num-head-channels or --num-heads if it was trained with others"
    if len(found) > 1:
        raise ConversionError(
            f"{who}{heads} heads on widths {widths} have {found} channels, and UNet2DModel has one number "
            f"for all levels; {options}"
        )
    if any(width % found[0] for width in widths):
        raise ConversionError(
            f"{who}heads of {found[0]} channels do not divide widths of {widths}; {options}"
        )
    return int(found[0])


def split_qkv(tensor: Tensor, head_dim: int | None, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[3C, …] → queries, keys and values, [C, …] each.

    The new order has all queries first, then the keys, then the values; the legacy order has the three in
    turn for each head.
    """
    width = len(tensor) // 3
    heads = 1 if new_order or head_dim is None else width // head_dim
    q, k, v = tensor.reshape(heads, 3, width // heads, *tensor.shape[1:]).unbind(1)
    return q.reshape(width, -1), k.reshape(width, -1), v.reshape(width, -1)


def move_attention(names: Renaming, source: str, target: str, head_dim: int | None, new_order: bool) -> None:
    """An attention block, whose layers are 1×1 convolutions there and linear here."""
    names.layer(f"{source}.norm", f"{target}.group_norm")
    weight, bias = names.take(f"{source}.qkv.weight"), names.take(f"{source}.qkv.bias")
    if weight.ndim != 3:
        raise ConversionError(
            f"{source}.qkv.weight is that of a consistency model (openai/consistency_models): it is "
            "preconditioned as in Karras et al. 2022, which UNet2DModel and DDPM are not"
        )
    weights, biases = (split_qkv(tensor, head_dim, new_order) for tensor in (weight, bias))
    for name, w, b in zip(("to_q", "to_k", "to_v"), weights, biases, strict=True):
        names.put(f"{target}.{name}.weight", w)
        names.put(f"{target}.{name}.bias", b.flatten())
    names.put(f"{target}.to_out.0.weight", names.take(f"{source}.proj_out.weight").squeeze(-1))
    names.put(f"{target}.to_out.0.bias", names.take(f"{source}.proj_out.bias"))


def rename(state: State, shape: Shape, head_dim: int | None, new_order: bool, family: str) -> State:
    """The weights by `UNet2DModel`'s names."""
    names = Renaming(state, family)
    names.layer("time_embed.0", "time_embedding.linear_1")
    names.layer("time_embed.2", "time_embedding.linear_2")
    if shape.classes is not None:
        names.put("class_embedding.weight", names.take("label_emb.weight"))
    names.layer("input_blocks.0.0", "conv_in")
    levels, per_level = len(shape.widths), shape.layers + 1

    for level in range(levels):
        attend, down = level in shape.attention, f"down_blocks.{level}"
        for j in range(shape.layers):
            source = f"input_blocks.{1 + level * per_level + j}"
            names.block(f"{source}.0", f"{down}.resnets.{j}", RESIDUAL)
            if attend:
                move_attention(names, f"{source}.1", f"{down}.attentions.{j}", head_dim, new_order)
        if level < levels - 1:
            source, target = f"input_blocks.{(level + 1) * per_level}.0", f"{down}.downsamplers.0"
            if shape.resblock_updown:
                names.block(source, target, RESIDUAL)
            else:
                names.layer(f"{source}.op", f"{target}.conv")

    names.block("middle_block.0", "mid_block.resnets.0", RESIDUAL)
    move_attention(names, "middle_block.1", "mid_block.attentions.0", head_dim, new_order)
    names.block("middle_block.2", "mid_block.resnets.1", RESIDUAL)

    for i in range(levels):
        attend, up = levels - 1 - i in shape.attention, f"up_blocks.{i}"
        for j in range(per_level):
            source = f"output_blocks.{i * per_level + j}"
            names.block(f"{source}.0", f"{up}.resnets.{j}", RESIDUAL)
            if attend:
                move_attention(names, f"{source}.1", f"{up}.attentions.{j}", head_dim, new_order)
        if i < levels - 1:
            source, target = f"{source}.{2 if attend else 1}", f"{up}.upsamplers.0"
            if shape.resblock_updown:
                names.block(source, target, RESIDUAL)
            else:
                names.layer(f"{source}.conv", f"{target}.conv")

    names.layer("out.0", "conv_norm_out")
    names.layer("out.2", "conv_out")
    return names.finish()
