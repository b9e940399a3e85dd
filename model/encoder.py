"""A classifier of noisy images: the encoder half of the U-Net, for guidance by its gradient.

∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t), so a classifier of noisy images that knows the timestep
guides a chain towards a class (Dhariwal & Nichol 2021, §4). It runs in every step that it guides, so it is
small: it halves the image first, and its residual blocks follow at that size. It is trained by
`model/training/noise_classifier.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.unet import ConfigError, Downsample, Level, TimeMLP, UNetConfig, timestep_embedding

ROWS = 4
"""Rows of every call for a gradient: torch gives a row the same bits only at the same batch shape."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape. block_out_channels: widths per level; the first is that of the stem, which has no blocks."""

    sample_size: int
    in_channels: int
    classes: int
    block_out_channels: tuple[int, ...] = (16, 32, 64, 96)
    layers_per_block: int = 1
    norm_num_groups: int = 8

    def __post_init__(self) -> None:
        for name in ("in_channels", "classes", "layers_per_block"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
        if len(self.block_out_channels) < 2:
            raise ConfigError("block_out_channels: the stem and at least one level are needed")
        self.blocks()  # raises ConfigError for what these do not allow

    def blocks(self) -> UNetConfig:
        """The options of its blocks. The timestep scales and shifts, as in Dhariwal & Nichol 2021, §3.1."""
        levels = len(self.block_out_channels)
        return UNetConfig(
            sample_size=self.sample_size,
            in_channels=self.in_channels,
            out_channels=self.in_channels,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            resnet_time_scale_shift="scale_shift",
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
        return {"_class_name": "NoiseClassifier", **asdict(self)}


class NoiseClassifier(nn.Module):
    """p(y | x_t), and its gradient."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        blocks, widths = config.blocks(), config.block_out_channels
        emb = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.downsample = Downsample(widths[0], padding=1)
        self.time_embedding = TimeMLP(emb, emb)
        self.levels = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes = [(inputs, outputs)] + [(outputs, outputs)] * (config.layers_per_block - 1)
            last = i == len(widths) - 2
            self.levels.append(Level(blocks, shapes, emb, attend=False, resample=None if last else "down"))
        self.norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], blocks.norm_eps)
        self.head = nn.Linear(widths[-1], config.classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, C, H, W] float32, noisy; t: [B] int64, its timesteps. Returns logits [B, classes]."""
        emb = F.silu(self.time_embedding(timestep_embedding(t, self.time_embedding.linear_1.in_features)))
        h = self.downsample(self.conv_in(x))
        for level in self.levels:
            h = cast("Level", level).down(h, emb, [])
        out: Tensor = self.head(F.silu(self.norm_out(h)).mean((2, 3)))
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
