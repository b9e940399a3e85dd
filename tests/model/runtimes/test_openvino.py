from __future__ import annotations

from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from model.runtimes import (
    OpenVinoRuntime,
    TorchRuntime,
)
from tests.model.conftest import tiny_checkpoint
from tests.model.runtimes.conftest import batch


def test_openvino_agrees_with_torch(tiny: Checkpoint, openvino: OpenVinoRuntime) -> None:
    torch_runtime = TorchRuntime(tiny)
    for rows in (1, 2, 5):
        expected = torch_runtime.forward(*batch(rows))
        assert (openvino.forward(*batch(rows)) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_openvino_takes_unconditional_networks() -> None:
    model = tiny_checkpoint(num_class_embeds=None, in_channels=3, out_channels=3)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    out = OpenVinoRuntime(model, threads=1).forward(x, t, None)
    torch.testing.assert_close(out, TorchRuntime(model).forward(x, t, None), rtol=1e-4, atol=1e-4)


def test_openvino_is_bitwise_independent_of_the_batch(openvino: OpenVinoRuntime) -> None:
    x, t, y = batch(7)
    together = openvino.forward(x, t, y)
    for i in range(7):
        assert torch.equal(openvino.forward(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i])
    assert torch.equal(openvino.forward(x.flip(0), t.flip(0), y.flip(0)).flip(0), together)


def test_openvino_compiles_powers_of_two_and_each_once(tiny: Checkpoint) -> None:
    runtime = OpenVinoRuntime(tiny)
    compiled: list[int] = []
    real = runtime._compiled

    def counting(size: int) -> list[Any]:
        compiled.extend([size] * (size not in runtime._requests))
        return real(size)

    runtime._compiled = counting  # type: ignore[method-assign]
    for rows in (1, 2, 3, 7, 5, 8):
        assert len(runtime.forward(*batch(rows))) == rows
    assert compiled == [1, 2, 4]


def test_openvino_works_after_a_failed_call(openvino: OpenVinoRuntime) -> None:
    before = openvino.forward(*batch(4))
    x, t, y = batch(4)
    with pytest.raises(ValueError, match="broadcast"):
        openvino.forward(x[:, :, :4], t, y)
    with pytest.raises(ValueError, match="zip"):
        openvino.forward(x, t[:2], y)
    assert torch.equal(openvino.forward(*batch(4)), before)


def test_openvino_results_are_not_overwritten_by_the_next_call(openvino: OpenVinoRuntime) -> None:
    first = openvino.forward(*batch(2))
    kept = first.clone()
    x, t, y = batch(2)
    openvino.forward(x + 1, t, y)
    assert torch.equal(first, kept)
