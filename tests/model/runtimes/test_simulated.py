"""A device that takes its time and computes next to nothing."""

from __future__ import annotations

import time

import pytest
import torch

from model.runtimes.simulated import SimulatedRuntime


@pytest.mark.parametrize(("batch_size", "seconds"), [(1, 0.25), (64, 0.25), (128, 0.5)])
def test_a_call_takes_the_time_of_its_batch(
    batch_size: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    x = torch.randn(batch_size, 3, 4, 4)
    out = SimulatedRuntime(64, 0.25).forward(x, torch.zeros(batch_size, dtype=torch.int64), None)
    assert slept == [seconds]
    assert torch.equal(out, x / 2)
