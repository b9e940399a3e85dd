"""A network and a classifier of elementwise float32 operations, which IEEE 754 fixes on every machine.

Only multiplication, addition, subtraction, division, maximum and minimum, absolute values and moves, each an
operation of its own: no convolution, no sum over pixels, no exponential. A row's result is its own, whatever
shares the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from model.runtimes import ThreadQueue

SIZE = 8
PAUSE_S = 0.003
"""What a call takes, so that the reader of a stream keeps up with it."""


def patterns(count: int, channels: int) -> Tensor:
    """A pattern for each class, and for none: [count, C, H, W], multiples of 1/8 from −1 to 1."""
    k, c, i, j = (torch.arange(n) for n in (count, channels, SIZE, SIZE))
    k, c, i = k[:, None, None, None], c[:, None, None], i[:, None]
    return ((5 * k * (i + 1) + 3 * c * (j + 2) + 7 * i + 11 * j) % 17 - 8).float() / 8


def lateness(t: Tensor) -> Tensor:
    """From 1/128 at t = 0 upwards: [B, 1, 1, 1]."""
    return ((t.float() + 1) / 128)[:, None, None, None]


def bounded(x: Tensor) -> Tensor:
    """Within −2 and 2."""
    return 2 * x / (x.abs() + 2)


class Network:
    """In place of the U-Net: a bounded mix of each pixel with its neighbours and its class's pattern.

    classes: rows of the label embedding, the null class included; 0 where there are no labels. learned:
    whether it says its variance too. near: whether its output is close to x, as the posterior mean is.
    breaks: (label, t): for this class it gives NaN below this timestep.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        learned: bool = False,
        near: bool = False,
        breaks: tuple[int, int] | None = None,
    ) -> None:
        self.name, self.device = "golden", torch.device("cpu")
        self.dtype: Literal["float32", "bfloat16", "float16"] = "float32"
        self.batch_sizes: tuple[int, ...] = ()
        self.recorder = None
        self.queue = ThreadQueue()
        self.learned, self.near, self.breaks = learned, near, breaks
        self.patterns = patterns(max(1, classes), channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x: [B, C, H, W] float32; t, y: [B] int64. Returns [B, C or 2C, H, W] float32."""
        time.sleep(PAUSE_S)
        late = lateness(t)
        beside = 0.5 * torch.roll(x, 1, 3) - 0.25 * torch.roll(x, 1, 2) + 0.125 * torch.roll(x, 1, 1)
        pattern = self.patterns[torch.zeros_like(t) if y is None else y]
        out = late * bounded(1.25 * x + beside) + (1 - late) * 0.5 * pattern
        if self.near:
            out = x + (pattern - out) / 64
        if self.breaks is not None and y is not None:
            label, limit = self.breaks
            out[(y == label) & (t < limit)] = float("nan")
        if self.learned:
            spread = torch.minimum(torch.maximum(beside, torch.tensor(-1.0)), torch.tensor(1.0))
            out = torch.cat((out, spread), 1)
        return out

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing."""


class Gradient:
    """In place of the classifier: towards its class's pattern."""

    def __init__(self, channels: int, classes: int) -> None:
        self.patterns = patterns(classes, channels)

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x: [B, C, H, W] float32; t, y: [B] int64. Returns as x."""
        return 0.5 * self.patterns[y] - lateness(t) * bounded(x)
