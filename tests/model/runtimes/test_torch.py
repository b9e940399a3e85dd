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


@pytest.mark.parametrize(
    ("device", "compiled", "last"),
    [("cpu", False, False), ("cpu", True, True), pytest.param("cuda", False, True, marks=pytest.mark.gpu)],
)
def test_channels_come_last_on_a_gpu_and_where_it_is_compiled(
    tiny: Checkpoint, device: str, compiled: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    runtime = TorchRuntime(tiny, device, compiled=compiled)
    kernels = [each for each in runtime.unet.parameters() if each.dim() == 4 and each.shape[-1] > 1]
    assert kernels
    for each in kernels:
        assert each.is_contiguous(memory_format=torch.channels_last) == last or each.shape[1] == 1
    assert all(each.is_contiguous() for each in tiny.unet.parameters())  # the caller's is left alone
