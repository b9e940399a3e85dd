"""The DDPM U-Net, laid out so that a diffusers `UNet2DModel` state dict loads without translation.

Residual blocks with group norm and SiLU, a sinusoidal time embedding added into each of them,
self-attention at chosen resolutions, and an optional class embedding (Ho et al. 2020, appendix B).
Module names and option names are those of diffusers; an option this network does not have is
refused by name, because a silently ignored one ruins samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DOWN_BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}


class ConfigError(ValueError):
    """A configuration names something this code does not do; the message says what."""


@dataclass(frozen=True)
class UNetConfig:
    """Options of `UNet2DModel`, with its names and its defaults.

    `block_out_channels` are the widths per resolution level, highest resolution first. For
    class-conditional models `num_class_embeds` counts the null class of classifier-free
    guidance too, when the model was trained with one.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ConfigError("down_block_types, up_block_types and block_out_channels differ in length")
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ConfigError(f"{name}: {kind!r} is not supported (known: {', '.join(known)})")
        for option, allowed in (
            ("mid_block_type", ("UNetMidBlock2D", None)),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
            ("downsample_padding", (0, 1)),
        ):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"{option}={getattr(self, option)!r} is not supported (known: {allowed})")
        size = self.sample_size
        if not isinstance(size, int) or size < 1 or size % 2 ** (levels - 1):
            raise ConfigError(f"sample_size={size!r} must be an integer that halves {levels - 1} times")
        for width in self.block_out_channels:
            if not self.norm_num_groups or width % self.norm_num_groups:
                raise ConfigError(f"norm_num_groups={self.norm_num_groups} does not divide width {width}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a diffusers `unet/config.json`. Raises ConfigError on an option not supported here."""
        fixed: dict[str, tuple[Any, ...]] = {
            "act_fn": ("silu", "swish"),
            "time_embedding_type": ("positional",),
            "downsample_type": ("conv",),
            "upsample_type": ("conv",),
            "class_embed_type": (None,),
            "num_train_timesteps": (None,),
        }
        names = {field.name for field in fields(cls)}
        options: dict[str, Any] = {}
        for name, value in config.items():
            if name.startswith("_"):  # diffusers' own bookkeeping: class name, version, path
                continue
            if name in fixed:
                if value not in fixed[name]:
                    raise ConfigError(f"{name}={value!r} is not supported (known: {fixed[name]})")
            elif name in names:
                options[name] = tuple(value) if isinstance(value, list) else value
            else:
                raise ConfigError(f"{name}={value!r} is not an option this network has")
        size = options.setdefault("sample_size", None)  # diffusers' default is None; ours would be wrong
        if isinstance(size, tuple) and len(set(size)) == 1:  # (height, width)
            options["sample_size"] = size[0]
        return cls(**options)

    def to_diffusers(self) -> dict[str, Any]:
        """The same as a `unet/config.json` that diffusers reads."""
        return {"_class_name": "UNet2DModel", "act_fn": "silu", **asdict(self)}


def timestep_embedding(t: Tensor, dim: int, freq_shift: int = 0, flip_sin_to_cos: bool = False) -> Tensor:
    """Transformer sinusoidal position embedding of the timestep (Vaswani et al. 2017, §3.5).

    t: [B], any real dtype. Returns [B, dim] float32: sines then cosines, or the reverse.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) * (
        -math.log(10_000) / (half - freq_shift)
    )
    angles = t.to(torch.float32)[:, None] * torch.exp(exponent)[None, :]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class TimeMLP(nn.Module):
    """Two linear layers between the sinusoids and the residual blocks."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, emb: Tensor) -> Tensor:
        """[B, in_channels] → [B, dim]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(emb)))
        return out


class ResBlock(nn.Module):
    """Norm, SiLU, conv, twice, with the time embedding added (or as scale and shift) in between."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, emb: int, scale: float = 1.0) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.scale = scale
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, 2 * outputs if self.scale_shift else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, inputs, H, W]; emb: [B, emb]. Returns [B, outputs, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = (self.conv_shortcut(x) + h) / self.scale
        return out


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, added to its input."""

    def __init__(
        self, config: UNetConfig, channels: int, norm_groups: int | None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.head_dim = channels if config.attention_head_dim is None else config.attention_head_dim
        self.heads = channels // self.head_dim
        if not self.heads:
            raise ConfigError(f"attention_head_dim={self.head_dim} is more than the {channels} channels")
        inner = self.heads * self.head_dim
        self.scale = scale
        self.group_norm = (
            nn.GroupNorm(norm_groups, channels, config.norm_eps) if norm_groups else nn.Identity()
        )
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        b, c, height, width = x.shape
        h = self.group_norm(x).reshape(b, c, height * width).transpose(1, 2)
        q, k, v = (
            to(h).view(b, height * width, self.heads, self.head_dim).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).reshape(b, height * width, self.heads * self.head_dim))
        out: Tensor = (h.transpose(1, 2).reshape(b, c, height, width) + x) / self.scale
        return out


class Downsample(nn.Module):
    """Strided convolution; `downsample_padding: 0` pads right and bottom only, as the original code did."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        out: Tensor = self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """One resolution, going down or up: residual blocks, attention after each or not, a resampler or none."""

    def __init__(
        self, config: UNetConfig, widths: list[tuple[int, int]], emb: int, attend: bool, resample: str | None
    ) -> None:
        super().__init__()
        outputs = widths[-1][1]
        self.resnets = nn.ModuleList(ResBlock(config, i, o, emb) for i, o in widths)
        if attend:
            self.attentions = nn.ModuleList(
                Attention(config, outputs, config.norm_num_groups) for _ in widths
            )
        self.attend = attend
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(outputs, config.downsample_padding)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(outputs)])
        self.resample = resample

    def down(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Go down, leaving every intermediate feature map on `skips`."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attend:
                x = self.attentions[i](x)
            skips.append(x)
        if self.resample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up, taking the feature maps back off `skips` in reverse."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips.pop()), dim=1), emb)
            if self.attend:
                x = self.attentions[i](x)
        return self.upsamplers[0](x) if self.resample else x


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, emb: int) -> None:
        super().__init__()
        width, scale = config.block_out_channels[-1], config.mid_block_scale_factor
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResBlock(config, width, width, emb, scale) for _ in range(2))
        self.attentions = nn.ModuleList(
            [Attention(config, width, groups, scale)] if config.add_attention else []
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, emb]. Returns [B, C, H, W]."""
        x = self.resnets[0](x, emb)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x, emb)
        return out


class UNet(nn.Module):
    """The network. Its state dict has the names and shapes of diffusers' `UNet2DModel`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        emb = config.time_embedding_dim or channels[0] * 4
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimeMLP(channels[0], emb)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, emb)

        # Down: remember the width of every skip connection.
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        width = channels[0]
        for i, kind in enumerate(config.down_block_types):
            widths = [(width if j == 0 else channels[i], channels[i]) for j in range(config.layers_per_block)]
            resample = "down" if i < len(channels) - 1 else None
            self.down_blocks.append(Level(config, widths, emb, DOWN_BLOCKS[kind], resample))
            width = channels[i]
            skips += [width] * (config.layers_per_block + (resample is not None))

        self.mid_block = MidBlock(config, emb) if config.mid_block_type else None

        # Up: one block more per level, each fed the next skip connection.
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            outputs = channels[-1 - i]
            widths = []
            for _ in range(config.layers_per_block + 1):
                widths.append((width + skips.pop(), outputs))
                width = outputs
            resample = "up" if i < len(channels) - 1 else None
            self.up_blocks.append(Level(config, widths, emb, UP_BLOCKS[kind], resample))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def embed(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The embedding of timestep and class that the blocks take: [B], [B] → [B, emb], after its SiLU."""
        config = self.config
        sinusoids = timestep_embedding(
            t, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos
        )
        emb: Tensor = self.time_embedding(sinusoids.to(dtype))
        if y is not None:
            emb = emb + self.class_embedding(y)
        return F.silu(emb)  # each block starts with it; once is enough

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict ε (or whatever the checkpoint's `prediction_type` says) for each row.

        x: [B, C, H, W] float in about [-1, 1] plus noise; t: [B] timesteps in [0, T), one per row;
        y: [B] int64 class indices, required exactly when the network has a class embedding.
        Returns [B, C_out, H, W].
        """
        if (y is None) == (self.config.num_class_embeds is not None):
            raise ValueError("class labels must be given exactly when the network is class-conditional")
        return self.after(x, self.embed(t, y, x.dtype))

    def after(self, x: Tensor, emb: Tensor) -> Tensor:
        """The network after its embedding. x: [B, C, H, W]; emb: [B, emb]. Returns [B, C_out, H, W]."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        for level in cast("Iterable[Level]", self.down_blocks):
            x = level.down(x, emb, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for level in cast("Iterable[Level]", self.up_blocks):
            x = level.up(x, emb, skips)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out
