"""A device that takes its time and computes next to nothing."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from model.runtimes.simulated import SimulatedNoise, SimulatedRuntime


@pytest.mark.parametrize(("batch_size", "seconds"), [(1, 0.25), (64, 0.25), (128, 0.5)])
def test_a_step_takes_the_time_of_its_batch(
    batch_size: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed meanwhile is part of it."""
    clock, slept = 100.0, list[float]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(time, "sleep", slept.append)
    x = torch.randn(batch_size, 3, 4, 4)
    runtime = SimulatedRuntime(64, 0.25)

    def work() -> list[torch.Tensor]:
        nonlocal clock
        clock += 0.125
        return [runtime.forward(x, torch.zeros(batch_size, dtype=torch.int64), None)]

    (out,) = runtime.queue.submit(work).result()
    assert slept == [seconds - 0.125]
    assert (out == x.numpy() / 2).all()


def test_a_step_begins_when_the_one_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late the thread is that stands for the device."""
    clock, slept = 100.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal clock
        slept.append(seconds)
        clock += seconds + 0.03125  # it oversleeps

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(time, "sleep", sleep)
    runtime, both = SimulatedRuntime(8, 0.25), threading.Event()

    def work() -> list[torch.Tensor]:
        assert both.wait(60)
        return [runtime.forward(torch.zeros(8), torch.zeros(8), None)]

    steps = [runtime.queue.submit(work) for _ in "ab"]
    both.set()
    for step in steps:
        step.result()
    assert slept == [0.25, 0.25 - 0.03125]


def test_its_noise_is_a_function_of_seed_step_and_stream() -> None:
    noise = SimulatedNoise((3, 4, 4))
    seeds, steps = torch.tensor([1, 2, 2**62, -5]), torch.tensor([0, -1, 7, 3])
    drawn = noise(seeds, steps, 0)
    assert drawn.shape == (4, 3, 4, 4)
    assert torch.equal(noise(seeds[[3, 1]], steps[[3, 1]], 0), drawn[[3, 1]])
    assert not torch.equal(noise(seeds, steps + 1, 0), drawn)
    assert not torch.equal(noise(seeds, steps, 1), drawn)
