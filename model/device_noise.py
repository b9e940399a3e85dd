"""The noise of model/noise.py, bit for bit, made where the latents are.

Tensor operations of fixed shapes, with no look at a value on the way: they may be compiled and captured in a
CUDA graph. On a CUDA device with Triton one kernel does all of it (model/noise_kernel.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model import noise
from model.noise import (
    KEY_STEPS,
    LOW_32,
    MAX_SEED,
    MULTIPLIERS,
    ROUNDS,
    NoiseStream,
    normal_table,
)

try:
    from model import noise_kernel
except ImportError:  # torch for the CPU comes without Triton
    HAS_KERNEL = False
else:
    HAS_KERNEL = True


class Normals(Protocol):
    """Noise on the device."""

    def __call__(self, seeds: Tensor, steps: Tensor, stream: NoiseStream) -> Tensor:
        """[N, C, H, W] float32 for seeds (64 bits as int64) and steps, both [N]."""


def normals_on(device: torch.device, shape: tuple[int, int, int]) -> Normals:
    """The noise of samples of this shape, drawn where it is needed: the same bits anywhere."""

    def on_processor(
        seeds: Tensor, steps: Tensor, stream: NoiseStream
    ) -> Tensor:  # NumPy is the sooner there
        keys = seeds.numpy().view(np.uint64).tolist()
        return torch.from_numpy(noise.normals(keys, steps.tolist(), shape, stream))

    if device.type == "cpu":
        return on_processor
    known = table(device)
    return lambda seeds, steps, stream: normals(seeds, steps, shape, stream, known)


def table(device: torch.device | str = "cpu") -> Tensor:
    """The table that `normals` takes: [65536] float32. Put it on a device once."""
    return torch.tensor(normal_table(), device=device)


def as_int64(seeds: Sequence[int]) -> Tensor:
    """Seeds of 64 bits as the int64 of the same bits, for `normals`: [N]. ValueError for other seeds."""
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed is from 0 to {MAX_SEED}, got {seed}")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds], dtype=torch.int64)


def normals(seeds: Tensor, steps: Tensor, shape: Sequence[int], stream: int, table: Tensor) -> Tensor:
    """Standard normal noise of each seed and step: [N, *shape] float32, the bits of `noise.normals`.

    seeds (see `as_int64`), steps: [N] int64. stream: a NoiseStream. table: see `table`. All are on one
    device, and so is the result.
    """
    if HAS_KERNEL and seeds.is_cuda:
        flat = noise_kernel.normals(seeds, steps, prod(shape), int(stream), table)
    else:
        flat = plain_normals(seeds, steps, prod(shape), int(stream), table)
    return flat.reshape(len(seeds), *shape)


def plain_normals(seeds: Tensor, steps: Tensor, count: int, stream: int, table: Tensor) -> Tensor:
    """`normals` in tensor operations alone: [N, count] float32. stream: a number below 2³¹."""
    words = torch.stack(_philox(seeds, steps, -(-count // 4), stream), dim=-1)
    z = table[words & 0xFFFF] + table[words >> 16 & 0xFFFF]
    return z.flatten(1)[:, :count]


def _philox(seeds: Tensor, steps: Tensor, blocks: int, stream: int) -> list[Tensor]:
    """The four words of every block, [N, blocks] each, in the low 32 bits of an int64.

    Torch has no multiplication of unsigned words: the int64 product wraps, which leaves its bits right, and
    `>>` copies the sign, which the mask takes away. Words that are only xored keep what is above 32 bits.
    """
    x0, x1 = torch.arange(blocks, device=seeds.device), steps[:, None] + 1
    x2, x3 = seeds.new_full((1,), stream), seeds.new_zeros(1)
    k0, k1 = seeds[:, None], seeds[:, None] >> 32
    for _ in range(ROUNDS):
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1 = ((p1 >> 32) ^ (x1 ^ k0)) & LOW_32, p1
        x2, x3 = ((p0 >> 32) ^ (x3 ^ k1)) & LOW_32, p0
        k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
    return [x0, x1, x2, x3]
