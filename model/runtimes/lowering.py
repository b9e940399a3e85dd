"""The network written as OpenVINO's CPU runs it best: the same function, but for rounding.

OpenVINO keeps feature maps channels-last, as its convolutions need them, and reorders them to channels-first
and back for some PyTorch layers: group norm, the sum with the time embedding, the reshapes around attention.
`lowered` writes those by channel instead:

- **Group norm** as one scale and shift a channel, whose statistics are sums over each channel's positions;
  the time embedding, a constant per channel, moves those statistics and the shift and is never added.
- **Attention** takes its positions from a permuted view, and q, k and v from one product.
- **Upsampling and its convolution**, also in a residual block, as one transposed convolution of 4×4 weights
  at stride 2: four products of 2×2 for every 3×3 that reads each pixel twice, 16 multiplications where there
  were 36.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.blocks import Attention, ResBlock, Upsample, resized
from model.unet import UNet


class ChannelNorm(nn.Module):
    """Group norm as a scale and a shift of each channel, of x + emb where an embedding is given."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.eps, self.channels = norm.eps, (-1, norm.num_channels, 1, 1)
        self.groups = -1, norm.num_groups, norm.num_channels // norm.num_groups
        self.weight = nn.Parameter(norm.weight.detach().reshape(1, *self.groups[1:]))
        self.bias = nn.Parameter(norm.bias.detach().reshape(1, *self.groups[1:]))

    def forward(self, x: Tensor, emb: Tensor | None = None, modulation: Sequence[Tensor] = ()) -> Tensor:
        """x: [B, C, H, W]; emb: [B, C] or none; modulation: (scale, shift), [B, C] each. Returns as x."""
        # Everything of a channel is [B, groups, channels of a group] until it meets x again.
        mean, square = x.mean((2, 3)).reshape(self.groups), (x * x).mean((2, 3)).reshape(self.groups)
        if emb is not None:
            emb = emb.reshape(self.groups)
            square = square + emb * (2 * mean + emb)
            mean = mean + emb
        mean, square = mean.mean(2, keepdim=True), square.mean(2, keepdim=True)
        deviation = torch.rsqrt((square - mean * mean).clamp(min=0) + self.eps)
        scale = deviation * self.weight
        shift = self.bias - (mean if emb is None else mean - emb) * scale
        if modulation:
            factor, term = (values.reshape(self.groups) for values in modulation)
            scale, shift = scale * (1 + factor), shift * (1 + factor) + term
        return x * scale.reshape(self.channels) + shift.reshape(self.channels)


class ChannelResBlock(nn.Module):
    """A residual block over `ChannelNorm`."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.block = block
        self.norm1, self.norm2 = ChannelNorm(block.norm1), ChannelNorm(block.norm2)
        upsamples = block.resample == "up"
        self.conv1 = TransposedUpsample(block.conv1) if upsamples else block.conv1

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """As `ResBlock`'s."""
        block = self.block
        h = block.act(self.norm1(x))
        if block.resample is not None:
            x, h = resized(x, block.resample), h if block.resample == "up" else resized(h, "down")
        h = self.conv1(h)
        emb = block.time_emb_proj(emb)
        h = self.norm2(h, modulation=emb.chunk(2, dim=1)) if block.scale_shift else self.norm2(h, emb)
        out: Tensor = (block.conv_shortcut(x) + block.conv2(block.act(h))) / block.scale
        return out


class PositionsFirstAttention(nn.Module):
    """Self-attention that reads its positions from a permuted view."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        norm = attention.group_norm
        self.norm = ChannelNorm(norm) if isinstance(norm, nn.GroupNorm) else norm
        projections = attention.to_q, attention.to_k, attention.to_v
        self.weight = nn.Parameter(torch.cat([each.weight for each in projections]))
        self.bias = nn.Parameter(torch.cat([each.bias for each in projections]))

    def forward(self, x: Tensor) -> Tensor:
        """As `Attention`'s."""
        attention = self.attention
        c, height, width = (int(size) for size in x.shape[1:])  # numbers in the trace, not operations
        heads, size, positions = attention.heads, attention.head_dim, height * width
        h = self.norm(x).permute(0, 2, 3, 1).reshape(-1, positions, c)
        h = F.linear(h, self.weight, self.bias)
        q, k, v = (part.view(-1, positions, heads, size).transpose(1, 2) for part in h.chunk(3, dim=2))
        h = F.scaled_dot_product_attention(q, k, v)
        h = attention.to_out[0](h.transpose(1, 2).reshape(-1, positions, heads * size))
        out: Tensor = (h.reshape(-1, height, width, c).permute(0, 3, 1, 2) + x) / attention.scale
        return out


class TransposedUpsample(nn.Module):
    """Nearest-neighbour doubling and a 3×3 convolution in one."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        outputs, inputs, *_ = weight.shape
        kernel = weight.new_zeros(outputs, inputs, 4, 4)
        for dy in range(2):
            for dx in range(2):
                kernel[:, :, dy : dy + 3, dx : dx + 3] += weight
        self.weight = nn.Parameter(kernel.flip(2, 3).transpose(0, 1).contiguous())
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


Rewrites = Mapping[type[nn.Module], Callable[[Any], nn.Module]]
REWRITES: Rewrites = {
    ResBlock: ChannelResBlock,
    Attention: PositionsFirstAttention,
    Upsample: lambda upsample: TransposedUpsample(upsample.conv),
    nn.GroupNorm: ChannelNorm,
}
"""The replacement of each kind of layer."""


def lowered(unet: UNet, rewrites: Rewrites = REWRITES) -> UNet:
    """A copy of the network for inference that computes the same up to rounding."""
    network = deepcopy(unet)
    for module in list(network.modules()):  # outer modules first, so that a layer is replaced whole
        for name, child in list(module.named_children()):
            if type(child) in rewrites:
                module.register_module(name, rewrites[type(child)](child))
    return network.eval().requires_grad_(False)


def to_graph(network: nn.Module, example: Sequence[Tensor]) -> Any:
    """A network as OpenVINO's graph, with the example's inputs. It shares the memory of the weights."""
    import openvino as ov  # an optional extra, and heavy

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the others would only spin and slow the converter down
    with ExitStack() as stack, torch.no_grad(), warnings.catch_warnings():
        stack.callback(torch.set_num_threads, threads)
        # OpenVINO reads torch.jit's traces; that warns of its age, and that group norm reads shapes.
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # The converter would trace too, but check the trace by a second one: three quarters of its time.
        traced = torch.jit.trace(network, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]
        return ov.convert_model(traced, example_input=tuple(example))
