"""A classifier of noisy images: the encoder half of the U-Net, for guidance by its gradient.

∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t), so a classifier of noisy images that knows the timestep
guides a chain towards a class (Dhariwal & Nichol 2021, §4). It runs in every step that it guides, so ours are
small: they halve the image first, and their residual blocks follow at that size. They are trained by
`model/training/noise_classifier.py`. The other options are those of other projects' classifiers, which
`model/convert` converts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import Downsample, Level, MidBlock, TimeMLP, timestep_embedding
from model.unet_config import (
    MAX_LEVELS,
    ConfigError,
    UNetConfig,
    check_count,
    check_list,
    check_size,
    size_to_json,
)

ROWS = 4
"""Rows of every call for a gradient: torch gives a row the same bits only at the same batch shape."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape. sample_size: (height, width); one number, for a square, is taken too.

    block_out_channels: widths per level; with a stem, the first is the stem's, which has no blocks and halves
    the image. down_block_types: of each level with blocks, None for `DownBlock2D` in all; this, and
    downsample_type, attention_head_dim and resnet_time_scale_shift, as in `UNetConfig`. mid_block: residual
    block, attention, residual block after the last level. pool: the mean over positions, or attention by it,
    or none (`dense`): the last level halves too, and a layer of hidden_width sees all positions.
    """

    sample_size: tuple[int, int]
    in_channels: int
    classes: int
    block_out_channels: tuple[int, ...] = (16, 32, 64, 96)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    stem: bool = True
    down_block_types: tuple[str, ...] | None = None
    downsample_type: str = "conv"
    attention_head_dim: int | None = None
    resnet_time_scale_shift: str = "scale_shift"
    norm_eps: float = 1e-5
    mid_block: bool = False
    pool: str = "mean"
    hidden_width: int | None = None

    def __post_init__(self) -> None:
        check_list("block_out_channels", self.block_out_channels, MAX_LEVELS)
        if len(self.block_out_channels) < 2:
            raise ConfigError("block_out_channels: the stem and at least one level are needed")
        for width in self.block_out_channels:
            check_count("block_out_channels", width)
        for name in ("in_channels", "classes"):
            check_count(name, getattr(self, name))
        if self.attention_head_dim is not None:
            check_count("attention_head_dim", self.attention_head_dim)
        for name in ("stem", "mid_block"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.down_block_types is not None:
            check_list("down_block_types", self.down_block_types, MAX_LEVELS)
        if self.pool not in ("mean", "attention", "dense"):
            raise ConfigError(f"pool={self.pool!r} is not supported (known: mean, attention, dense)")
        if self.pool == "dense":
            check_count("hidden_width", self.hidden_width)
        if self.attention_head_dim is not None and self.block_out_channels[-1] % self.attention_head_dim:
            raise ConfigError(f"attention_head_dim={self.attention_head_dim} does not divide the last width")
        size = self.blocks().sample_size  # raises ConfigError for what these do not allow
        if size is None:
            raise ConfigError("sample_size is missing")
        check_size(size, self.halvings)
        object.__setattr__(self, "sample_size", size)

    @property
    def halvings(self) -> int:
        """How often the image is halved before what comes after the levels."""
        return len(self.block_out_channels) - (self.pool != "dense")

    @property
    def positions(self) -> int:
        """Of the feature map that comes out of the levels."""
        height, width = self.sample_size
        return (height >> self.halvings) * (width >> self.halvings)

    def blocks(self) -> UNetConfig:
        """The options of its blocks. The timestep scales and shifts, as in Dhariwal & Nichol 2021, §3.1."""
        levels = len(self.block_out_channels)
        types = self.down_block_types or ("DownBlock2D",) * (levels - self.stem)
        return UNetConfig(
            sample_size=self.sample_size,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            down_block_types=("DownBlock2D",) * self.stem + types,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            downsample_type=self.downsample_type,
            attention_head_dim=self.attention_head_dim,
            attn_norm_num_groups=self.norm_num_groups,
            resnet_time_scale_shift=self.resnet_time_scale_shift,
            norm_eps=self.norm_eps,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """Read a `classifier/config.json`. Raises ConfigError on an option that it does not have."""
        names = {field.name for field in fields(cls)}
        options = {name: value for name, value in config.items() if not name.startswith("_")}
        for name in options.keys() - names:
            raise ConfigError(f"{name} is not an option this classifier has")
        tuples: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        return cls(**tuples)

    def to_dict(self) -> dict[str, Any]:
        """The same as a `classifier/config.json`."""
        options = {**asdict(self), "sample_size": size_to_json(self.sample_size)}
        return {"_class_name": "NoiseClassifier", **options}


class AttentionPool(nn.Module):
    """The mean over positions attends to them and to itself (Radford et al. 2021, §2.4)."""

    def __init__(self, positions: int, channels: int, head_dim: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.zeros(channels, 1 + positions))
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C]."""
        h = x.flatten(2)
        h = torch.cat((h.mean(2, keepdim=True), h), dim=2) + self.positional_embedding
        h = h.transpose(1, 2)
        q, k, v = (
            to(of).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to, of in ((self.to_q, h[:, :1]), (self.to_k, h), (self.to_v, h))
        )
        return F.scaled_dot_product_attention(q, k, v).flatten(1)


class NoiseClassifier(nn.Module):
    """p(y | x_t), and its gradient."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        blocks, widths = config.blocks(), config.block_out_channels
        emb = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.downsample = Downsample(widths[0], padding=1) if config.stem else nn.Identity()
        self.time_embedding = TimeMLP(emb, emb)
        self.levels = nn.ModuleList()
        kinds = blocks.down_block_types[config.stem :]
        steps = pairwise(widths if config.stem else (widths[0], *widths))
        for i, (kind, (inputs, outputs)) in enumerate(zip(kinds, steps, strict=True)):
            shapes = [(inputs, outputs)] + [(outputs, outputs)] * (config.layers_per_block - 1)
            last = i == len(kinds) - 1
            level = Level(blocks, kind, shapes, emb, None if last and config.pool != "dense" else "down")
            self.levels.append(level)
        self.mid_block = MidBlock(blocks, emb) if config.mid_block else None
        self.pool: AttentionPool | None = None
        self.hidden: nn.Linear | None = None
        features = widths[-1]
        if config.pool == "dense":
            features = cast("int", config.hidden_width)
            self.hidden = nn.Linear(config.positions * widths[-1], features)
        else:
            self.norm_out = nn.GroupNorm(config.norm_num_groups, features, blocks.norm_eps)
        if config.pool == "attention":
            self.pool = AttentionPool(config.positions, features, config.attention_head_dim or features)
        self.head = nn.Linear(features, config.classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] float32, noisy; t: [B] int64, its timesteps. Returns logits [B, classes]."""
        emb = F.silu(self.time_embedding(timestep_embedding(t, self.time_embedding.linear_1.in_features)))
        h = self.downsample(self.conv_in(x))
        for level in self.levels:
            h = cast("Level", level).down(h, emb, [])
        if self.mid_block is not None:
            h = self.mid_block(h, emb)
        if self.hidden is not None:
            logits: Tensor = self.head(F.relu(self.hidden(h.flatten(1))))
            return logits
        h = F.silu(self.norm_out(h))
        out: Tensor = self.head(h.mean((2, 3)) if self.pool is None else self.pool(h))
        return out

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """∇ₓ log p(y | x_t). x: [B, C, H, W] float32; t, y: [B] int64. Returns as x, float32.

        Rows are taken ROWS at a time, so that on a CPU a row's bits depend on that row alone. Works in
        inference mode.
        """
        parts: list[Tensor] = []
        with torch.inference_mode(mode=False), torch.enable_grad():
            places = torch.arange(len(x) + (-len(x)) % ROWS, device=x.device).clamp(max=len(x) - 1)
            for chosen in torch.split(places, ROWS):
                part = x.detach()[chosen].requires_grad_()  # copies, which autograd may keep
                log_p = F.log_softmax(self(part, t[chosen]), dim=1)
                of_class = log_p.gather(1, y[chosen][:, None]).sum()
                parts += torch.autograd.grad(of_class, part)
        return torch.cat(parts)[: len(x)]
