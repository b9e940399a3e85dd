"""The noise of model/noise.py as one Triton kernel, for model/device_noise.py, which checks for Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks of four numbers for one program. It holds few registers per number, and the table is in the cache.
_BLOCKS = 256


def normals(seeds: Tensor, steps: Tensor, count: int, stream: int, table: Tensor) -> Tensor:
    """[N, count] float32 from seeds and steps, [N] int64, and the table; N is below 65,536.

    Seeds and steps may be columns of an array, as those of an upload are.
    """
    out = torch.empty((len(seeds), count), device=seeds.device)
    grid = (triton.cdiv(count, 4 * _BLOCKS), len(seeds))
    apart = seeds.stride(0), steps.stride(0)
    _kernel[grid](seeds, steps, *apart, table, out, count, stream, BLOCKS=_BLOCKS)
    return out


@triton.jit
def _kernel(seeds, steps, seeds_apart, steps_apart, table, out, count, stream, BLOCKS: tl.constexpr):
    """BLOCKS blocks of one sample: program (i, n) makes numbers 4·BLOCKS·i … of sample n."""
    sample = tl.program_id(1)
    seed = tl.load(seeds + sample * seeds_apart)
    step = tl.load(steps + sample * steps_apart).to(tl.int32) + 1
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    zero = block * 0
    # Ten rounds on 32-bit words; the halves of the seed are the key.
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step, zero + stream, zero)
    z0, z1, z2, z3 = _normal(w0, table), _normal(w1, table), _normal(w2, table), _normal(w3, table)
    # 0 2 0 2 … and 1 3 1 3 … give 0 1 2 3 0 1 2 3 …, which is stored in one run.
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    at = tl.program_id(0) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    tl.store(out + sample.to(tl.int64) * count + at, z, mask=at < count)


@triton.jit
def _normal(word, table):
    """Two look-ups and an addition that is exact."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32)
    return tl.load(table + low) + tl.load(table + high)
