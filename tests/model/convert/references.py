"""The networks of other projects, written from their papers, with the names their checkpoints have.

OpenAINet and OpenAIEncoder: Nichol & Dhariwal 2021; Dhariwal & Nichol 2021, §3 and appendices. HoNet: Ho et
al. 2020, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoids(t: Tensor, dim: int, last: int, cosines_first: bool) -> Tensor:
    """[B] → [B, dim]: frequencies from 1 to 1/10000, which is reached at number `last` of them."""
    frequencies = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float32) / last)
    angles = t.float()[:, None] * frequencies
    parts = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(parts[::-1] if cosines_first else parts, dim=1)


# ----------------------------------------------------------------------------------------------------
# OpenAI's.


class OpenAIResBlock(nn.Module):
    """Residual block; `resample` is +1 to double the size, −1 to halve it."""

    def __init__(self, inputs: int, outputs: int, emb: int, scale_shift: bool, resample: int = 0) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, outputs * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def resized(self, x: Tensor) -> Tensor:
        if self.resample > 0:
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return F.avg_pool2d(x, 2) if self.resample < 0 else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            half = e.shape[1] // 2
            h = self.out_layers[0](h) * (1 + e[:, :half]) + e[:, half:]
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        out: Tensor = self.skip_connection(self.resized(x)) + h
        return out


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """[B, 3C, N] → [B, C, N]: softmax(qᵀk / √d) v for each head."""
    b, width, n = qkv.shape
    d = width // 3 // heads
    if new_order:
        q, k, v = qkv.view(b, 3, heads, d, n).unbind(1)
    else:
        q, k, v = qkv.view(b, heads, 3, d, n).unbind(2)
    weights = torch.softmax(q.transpose(-1, -2) @ k / math.sqrt(d), dim=-1)
    out: Tensor = weights @ v.transpose(-1, -2)
    return out.transpose(-1, -2).reshape(b, width // 3, n)


class OpenAIAttention(nn.Module):
    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.qkv(self.norm(x.flatten(2)))
        out: Tensor = x + self.proj_out(attend(h, self.heads, self.new_order)).view_as(x)
        return out


class OpenAIDown(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.op(x)
        return out


class OpenAIUp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return out


class OpenAIHalf(nn.Module):
    """What the U-Net and the classifier share: the way down, and the middle."""

    def __init__(
        self,
        channels: int = 3,
        width: int = 32,
        multiples: Sequence[int] = (1, 2),
        layers: int = 1,
        attention: Sequence[int] = (1,),
        *,
        heads: int | None = None,
        head_channels: int | None = None,
        new_order: bool = False,
        scale_shift: bool = True,
        resblock_updown: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.widths, self.attention = width, [width * m for m in multiples], attention
        self.layers, self.emb = layers, 4 * width
        self.scale_shift, self.resblock_updown = scale_shift, resblock_updown
        self.heads, self.head_channels, self.new_order = heads, head_channels, new_order
        self.time_embed = nn.Sequential(nn.Linear(width, self.emb), nn.SiLU(), nn.Linear(self.emb, self.emb))
        now = self.widths[0]
        self.skips = [now]
        self.input_blocks: Any = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, now, 3, padding=1)])])
        for level, outputs in enumerate(self.widths):
            for _ in range(layers):
                self.input_blocks.append(nn.ModuleList(self.pair(now, outputs, level)))
                now = outputs
                self.skips.append(now)
            if level < len(self.widths) - 1:
                down = self.resblock(now, now, -1) if resblock_updown else OpenAIDown(now)
                self.input_blocks.append(nn.ModuleList([down]))
                self.skips.append(now)
        self.middle_block = nn.ModuleList(
            [self.resblock(now, now), self.attention_block(now), self.resblock(now, now)]
        )

    def resblock(self, inputs: int, outputs: int, resample: int = 0) -> OpenAIResBlock:
        return OpenAIResBlock(inputs, outputs, self.emb, self.scale_shift, resample)

    def attention_block(self, width: int) -> OpenAIAttention:
        heads = self.heads or width // (self.head_channels or width)
        return OpenAIAttention(width, heads, self.new_order)

    def pair(self, inputs: int, outputs: int, level: int) -> list[nn.Module]:
        blocks: list[nn.Module] = [self.resblock(inputs, outputs)]
        if level in self.attention:
            blocks.append(self.attention_block(outputs))
        return blocks

    def embed(self, t: Tensor) -> Tensor:
        out: Tensor = self.time_embed(sinusoids(t, self.width, self.width // 2, cosines_first=True))
        return out

    def down(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """The feature maps that go over to the other side, and at the end the middle's."""
        maps = [self.input_blocks[0][0](x)]
        for block in self.input_blocks[1:]:
            h = maps[-1]
            for layer in block:
                h = layer(h, emb)
            maps.append(h)
        h = maps[-1]
        for layer in self.middle_block:
            h = layer(h, emb)
        return [*maps, h]


class OpenAINet(OpenAIHalf):
    """The U-Net of improved-diffusion, and of guided-diffusion with `resblock_updown`."""

    def __init__(self, *, channels: int = 3, outputs: int = 6, classes: int | None = None, **options: Any):
        super().__init__(channels, **options)
        if classes:
            self.label_emb = nn.Embedding(classes, self.emb)
        now, skips = self.widths[-1], list(self.skips)
        self.output_blocks: Any = nn.ModuleList()
        for level in reversed(range(len(self.widths))):
            for j in range(self.layers + 1):
                blocks = self.pair(now + skips.pop(), self.widths[level], level)
                now = self.widths[level]
                if level > 0 and j == self.layers:
                    blocks.append(self.resblock(now, now, 1) if self.resblock_updown else OpenAIUp(now))
                self.output_blocks.append(nn.ModuleList(blocks))
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embed(t)
        if y is not None:
            emb = emb + self.label_emb(y)
        *maps, h = self.down(x, emb)
        for block in self.output_blocks:
            h = torch.cat([h, maps.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        out: Tensor = self.out(h)
        return out


class AttentionPool(nn.Module):
    """Radford et al. 2021: the mean attends to all positions, and its answer is projected to the classes."""

    def __init__(self, size: int, width: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.zeros(width, size**2 + 1))
        self.qkv_proj = nn.Conv1d(width, 3 * width, 1)
        self.c_proj = nn.Conv1d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)
        h = torch.cat([h.mean(dim=2, keepdim=True), h], dim=2) + self.positional_embedding
        out: Tensor = self.c_proj(attend(self.qkv_proj(h), self.heads, new_order=True))[:, :, 0]
        return out


class OpenAIEncoder(OpenAIHalf):
    """The noisy classifier of guided-diffusion. size: of the image; pool: attention, or adaptive."""

    def __init__(
        self, size: int, classes: int, channels: int = 3, pool: str = "attention", **options: Any
    ) -> None:
        super().__init__(channels, **options)
        now, size = self.widths[-1], size // 2 ** (len(self.widths) - 1)
        heads = now // (self.head_channels or now)
        last = (
            [AttentionPool(size, now, heads, classes)]
            if pool == "attention"
            else [nn.AdaptiveAvgPool2d(1), nn.Conv2d(now, classes, 1), nn.Flatten()]
        )
        self.out = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), *last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.out(self.down(x, self.embed(t))[-1])
        return out


# ----------------------------------------------------------------------------------------------------
# Ho et al.


class HoResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, emb: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.temb_proj = nn.Linear(emb, outputs)
        self.norm2 = nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)
        return out


class HoAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        qkv = torch.cat([layer(h) for layer in (self.q, self.k, self.v)], dim=1)
        out: Tensor = x + self.proj_out(attend(qkv.flatten(2), 1, new_order=True).view_as(x))
        return out


class HoNet(nn.Module):
    """The U-Net of Ho et al., as ermongroup/ddim names its parts."""

    def __init__(
        self,
        channels: int = 3,
        width: int = 32,
        multiples: Sequence[int] = (1, 2),
        layers: int = 1,
        attention: Sequence[int] = (1,),
        downsample: str = "conv",
    ) -> None:
        super().__init__()
        self.width, self.levels, self.layers, self.downsample = width, len(multiples), layers, downsample
        widths, emb = [width * m for m in multiples], 4 * width
        self.temb: Any = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, emb), nn.Linear(emb, emb)])
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down: Any = nn.ModuleList()
        self.up: Any = nn.ModuleList()
        self.mid: Any = nn.Module()
        now, skips = width, [width]
        for level, outputs in enumerate(widths):
            part: Any = nn.Module()
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers):
                part.block.append(HoResBlock(now, outputs, emb))
                now = outputs
                skips.append(now)
                if level in attention:
                    part.attn.append(HoAttention(now))
            if level < len(widths) - 1:
                part.downsample = nn.ModuleDict({downsample: nn.Conv2d(now, now, 3, stride=2)})
                skips.append(now)
            self.down.append(part)
        self.mid.block_1, self.mid.block_2 = HoResBlock(now, now, emb), HoResBlock(now, now, emb)
        self.mid.attn_1 = HoAttention(now)
        for level in reversed(range(len(widths))):
            part = nn.Module()
            part.block, part.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers + 1):
                part.block.append(HoResBlock(now + skips.pop(), widths[level], emb))
                now = widths[level]
                if level in attention:
                    part.attn.append(HoAttention(now))
            if level > 0:
                part.upsample = nn.ModuleDict({"conv": nn.Conv2d(now, now, 3, padding=1)})
            self.up.insert(0, part)
        self.norm_out = nn.GroupNorm(32, now, eps=1e-6)
        self.conv_out = nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.temb.dense
        emb = second(F.silu(first(sinusoids(t, self.width, self.width // 2 - 1, cosines_first=False))))
        h = self.conv_in(x)
        maps = [h]
        for level, part in enumerate(self.down):
            for j in range(self.layers):
                h = part.block[j](h, emb)
                if len(part.attn):
                    h = part.attn[j](h)
                maps.append(h)
            if level < self.levels - 1:
                h = part.downsample[self.downsample](F.pad(h, (0, 1, 0, 1)))
                maps.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, emb)), emb)
        for level in reversed(range(self.levels)):
            part = self.up[level]
            for j in range(self.layers + 1):
                h = part.block[j](torch.cat([h, maps.pop()], dim=1), emb)
                if len(part.attn):
                    h = part.attn[j](h)
            if level > 0:
                h = part.upsample["conv"](h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
