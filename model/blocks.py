"""The layers of the U-Net: residual blocks, attention, resampling, and the levels that they make up.

Each has the parameters, by name and shape, of the layer of diffusers that it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.unet_config import ConfigError, UNetConfig

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}
Direction = Literal["down", "up"]


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


class Sinusoids(nn.Module):
    """`timestep_embedding` as a layer, which has no parameters."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.dim = config.block_out_channels[0]
        self.freq_shift, self.flip_sin_to_cos = config.freq_shift, config.flip_sin_to_cos

    def forward(self, t: Tensor) -> Tensor:
        """[B] → [B, dim] float32."""
        return timestep_embedding(t, self.dim, self.freq_shift, self.flip_sin_to_cos)


class RandomFourierFeatures(nn.Module):
    """Sines and cosines of log t at frequencies drawn once (Tancik et al. 2020; Song et al. 2021, app. C).

    The frequencies stay float32 when the network gets another dtype: an angle of many turns would lose its
    place in the last one.
    """

    scale = 16.0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(self.scale * torch.randn(dim), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomFourierFeatures:
        before = self.weight.data  # of before, whatever becomes of the parameter
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        if not before.is_meta:
            self.weight.data = before.to(self.weight.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """[B] → [B, 2 dim] float32. t = 0 has no logarithm: its features are NaN, as in diffusers."""
        angles = t.to(torch.float32).log()[:, None] * self.weight[None, :] * (2 * math.pi)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class LearnedEmbedding(nn.Embedding):
    """A vector for each timestep."""

    def forward(self, t: Tensor) -> Tensor:
        """[B], whole numbers of any dtype → [B, dim]."""
        return super().forward(t.long())


def time_projection(config: UNetConfig) -> nn.Module:
    """What turns timesteps [B] into the features that `TimeMLP` takes; see `time_features`."""
    dim = config.block_out_channels[0]
    if config.time_embedding_type == "fourier":
        return RandomFourierFeatures(dim)
    if config.time_embedding_type == "learned":
        assert config.num_train_timesteps is not None  # the configuration has been checked
        return LearnedEmbedding(config.num_train_timesteps, dim)
    return Sinusoids(config)


def time_features(config: UNetConfig) -> int:
    """How many features `time_projection` makes of a timestep."""
    return config.block_out_channels[0] * (2 if config.time_embedding_type == "fourier" else 1)


class TimeMLP(nn.Module):
    """Two linear layers between the features of the timestep and the residual blocks."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, emb: Tensor) -> Tensor:
        """[B, in_channels] → [B, dim]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(emb)))
        return out


def resized(x: Tensor, direction: Direction) -> Tensor:
    """[B, C, H, W] → [B, C, H/2, W/2] by averages, or → [B, C, 2H, 2W] by nearest neighbours."""
    return F.avg_pool2d(x, 2) if direction == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """Norm, activation, conv, twice, with the time embedding added (or as scale and shift) in between.

    resample: resize what comes in, before the first convolution and on the way around both (Dhariwal & Nichol
    2021, appendix A, "BigGAN up/downsampling").
    """

    def __init__(
        self,
        config: UNetConfig,
        inputs: int,
        outputs: int,
        emb: int,
        scale: float = 1.0,
        resample: Direction | None = None,
    ) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.scale, self.resample = scale, resample
        self.act = ACTIVATIONS[config.act_fn]
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, 2 * outputs if self.scale_shift else outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, inputs, H, W]; emb: [B, emb]. Returns [B, outputs, H, W], resized where it resamples."""
        h = self.act(self.norm1(x))
        if self.resample is not None:
            x, h = resized(x, self.resample), resized(h, self.resample)
        h = self.conv1(h)
        emb = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.conv2(self.dropout(self.act(h)))
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
        out: Tensor = self.conv(resized(x, "up"))
        return out


class Level(nn.Module):
    """One resolution, going down or up: residual blocks, attention after each or not, a resampler or none.

    kind: the block's type in diffusers, of which the prefix says what is in it. resample: to the next level,
    by a residual block or by a convolution alone; a level without a next one has None.
    """

    def __init__(
        self,
        config: UNetConfig,
        kind: str,
        widths: Sequence[tuple[int, int]],
        emb: int,
        resample: Direction | None,
    ) -> None:
        super().__init__()
        outputs = widths[-1][1]
        self.resnets = nn.ModuleList(ResBlock(config, i, o, emb) for i, o in widths)
        self.attend = kind.startswith("Attn")
        if self.attend:
            self.attentions = nn.ModuleList(
                Attention(config, outputs, config.norm_num_groups) for _ in widths
            )
        # diffusers asks for the type of resampling in levels with attention only.
        wanted = config.downsample_type if resample == "down" else config.upsample_type
        self.by_resnet = wanted == "resnet" if self.attend else kind.startswith("Resnet")
        if resample is not None:
            sampler: nn.Module
            if self.by_resnet:
                sampler = ResBlock(config, outputs, outputs, emb, resample=resample)
            elif resample == "down":
                sampler = Downsample(outputs, config.downsample_padding)
            else:
                sampler = Upsample(outputs)
            setattr(self, f"{resample}samplers", nn.ModuleList([sampler]))
        self.resample = resample

    def _block(self, i: int, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x) if self.attend else x

    def _resampled(self, x: Tensor, emb: Tensor) -> Tensor:
        samplers = cast("nn.ModuleList", self.downsamplers if self.resample == "down" else self.upsamplers)
        out: Tensor = samplers[0](x, emb) if self.by_resnet else samplers[0](x)
        return out

    def down(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Go down, leaving every intermediate feature map on `skips`."""
        for i in range(len(self.resnets)):
            x = self._block(i, x, emb)
            skips.append(x)
        if self.resample:
            x = self._resampled(x, emb)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Go up, taking the feature maps back off `skips` in reverse."""
        for i in range(len(self.resnets)):
            x = self._block(i, torch.cat((x, skips.pop()), dim=1), emb)
        return self._resampled(x, emb) if self.resample else x


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
