"""The DDPM U-Net, laid out so that a diffusers `UNet2DModel` state dict loads without translation.

Residual blocks with group norm, an embedding of the timestep added into each of them, self-attention at
chosen resolutions, and an optional class embedding (Ho et al. 2020, appendix B). Its options are those of
`model/unet_config.py`, its layers those of `model/blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import ACTIVATIONS, Level, MidBlock, TimeMLP, time_features, time_projection
from model.network import Network, Split
from model.unet_config import ConfigError, UNetConfig

__all__ = ["ConfigError", "UNet", "UNetConfig"]


class UNet(Network):
    """The network. Its state dict has the names and shapes of diffusers' `UNet2DModel`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config: UNetConfig = config
        channels = config.block_out_channels
        emb = config.time_embedding_dim or channels[0] * 4
        self.act = ACTIVATIONS[config.act_fn]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_proj = time_projection(config)
        self.time_embedding = TimeMLP(time_features(config), emb)
        if config.class_embed_type == "timestep":
            self.class_embedding: nn.Module = TimeMLP(time_features(config), emb)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, emb)

        # Down: remember the width of every skip connection.
        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]
        width = channels[0]
        for i, kind in enumerate(config.down_block_types):
            widths = [(width if j == 0 else channels[i], channels[i]) for j in range(config.layers_per_block)]
            last = i == len(channels) - 1
            self.down_blocks.append(Level(config, kind, widths, emb, None if last else "down"))
            width = channels[i]
            skips += [width] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock(config, emb) if config.mid_block_type else None

        # Up: one block more per level, each fed the next skip connection.
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            outputs = channels[-1 - i]
            widths = []
            for _ in range(config.layers_per_block + 1):
                widths.append((width + skips.pop(), outputs))
                width = outputs
            last = i == len(channels) - 1
            self.up_blocks.append(Level(config, kind, widths, emb, None if last else "up"))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def features(self, t: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """What `embed` takes, of timesteps and labels, [B] each; see `features_of`."""
        return features_of(self.time_proj, self.config, t, y)

    def embed(self, features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The embedding of timestep and class that the blocks take: `features` → [B, emb], activated."""
        emb: Tensor = self.time_embedding(features[0].to(dtype))
        for label in features[1:]:
            numbers = self.config.class_embed_type == "timestep"
            emb = emb + self.class_embedding(label.to(dtype) if numbers else label)
        return self.act(emb)  # each block starts with it; once is enough

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict ε (or whatever the checkpoint's `prediction_type` says) for each row.

        x: [B, C, H, W] float in about [-1, 1] plus noise; t: [B] timesteps in [0, T), one per row;
        y: [B] int64 class labels, required exactly when the network is conditional: indices, or numbers from
        0 where `class_embed_type` is `timestep`. Returns [B, C_out, H, W]; with Fourier features the network
        is divided by t (Song et al. 2021, appendix C.2), and is NaN at t = 0.
        """
        if (y is None) == self.config.conditional:
            raise ValueError("class labels must be given exactly when the network is class-conditional")
        return scaled(self.config, self.after(x, self.embed(self.features(t, y), x.dtype)), t)

    def split(self) -> Split:
        """See `Network.split`."""
        return Split(
            partial(features_of, deepcopy(self.time_proj), self.config),
            _Body(self),
            partial(scaled, self.config),
        )

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
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))  # SiLU whatever act_fn says, as diffusers
        return out


def features_of(time_proj: nn.Module, config: UNetConfig, t: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """What the network embeds of t and y, [B] each: features [B, …] in float32; of y perhaps its index."""
    if y is None:
        return (time_proj(t),)
    return time_proj(t), time_proj(y) if config.class_embed_type == "timestep" else y


def scaled(config: UNetConfig, out: Tensor, t: Tensor) -> Tensor:
    """The prediction, of what the last layer gives."""
    return out / t.view(-1, 1, 1, 1) if config.time_embedding_type == "fourier" else out


class _Body(nn.Module):
    """The network behind the features: (x, *features) → output."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        """See the class."""
        return self.unet.after(x, self.unet.embed(features, x.dtype))
