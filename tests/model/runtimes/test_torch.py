from __future__ import annotations

import pytest
import torch

from model.checkpoint import Checkpoint
from model.runtimes import TorchRuntime
from tests.model.runtimes.conftest import batch


def test_torch_at_a_fixed_shape_is_bitwise_independent_of_batch_neighbours_and_position(
    tiny: Checkpoint,
) -> None:
    runtime = TorchRuntime(tiny, batch_sizes=(8,))
    x, t, y = batch(8)
    together = runtime.forward(x, t, y)
    for i in range(8):
        alone = runtime.forward(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert alone.shape == (1, 1, 8, 8)
        assert torch.equal(alone[0], together[i])
    assert torch.equal(runtime.forward(x[3:6], t[3:6], y[3:6]), together[3:6])


def test_torch_pads_to_the_next_shape_it_was_given(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = TorchRuntime(tiny, batch_sizes=(8, 2))
    assert runtime.batch_sizes == (2, 8)
    seen: list[int] = []
    runtime.unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for rows in (1, 2, 3, 8, 9):
        assert len(runtime.forward(*batch(rows))) == rows
    assert seen == [2, 2, 8, 8, 9]
