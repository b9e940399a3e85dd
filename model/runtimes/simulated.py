"""A device that computes next to nothing in a given time: it measures what surrounds the network.

The lock is released while it waits, as during a GPU's work. What is left of the time that the device could
have been busy is the cost of the host.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from model.runtimes.base import DtypeName


class SimulatedRuntime:
    """rows: up to so many take `step_s` seconds a call, more in proportion. The output is x / 2."""

    name = "simulated"
    dtype: DtypeName = "float32"

    def __init__(self, rows: int, step_s: float) -> None:
        self.rows, self.step_s = rows, step_s
        self.device = torch.device("cpu")
        self.batch_sizes: tuple[int, ...] = ()

    def seconds(self, batch_size: int) -> float:
        """What a call of so many rows takes."""
        return self.step_s * max(1.0, batch_size / self.rows)

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:  # noqa: ARG002 (as in a Runtime)
        """x: [B, C, H, W] float32. Returns its half, after the time of the batch."""
        end = time.perf_counter() + self.seconds(len(x))
        out = x * 0.5
        time.sleep(max(0.0, end - time.perf_counter()))
        return out

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing to prepare."""
