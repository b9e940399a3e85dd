"""A batch for any runtime."""

from __future__ import annotations

import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(rows: int) -> Batch:
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 8, 8, generator=rng)
    return x, torch.randint(0, 1000, (rows,), generator=rng), torch.randint(0, 4, (rows,), generator=rng)
