from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import runtimes
from model.checkpoint import Checkpoint
from model.runtimes import (
    DtypeName,
    OpenVinoRuntime,
    Runtime,
    RuntimeUnavailableError,
    TorchRuntime,
    choose_device,
    load_runtime,
)
from tests.model.conftest import randomise, tiny_checkpoint

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def batch(rows: int) -> Batch:
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, 8, 8, generator=rng)
    return x, torch.randint(0, 1000, (rows,), generator=rng), torch.randint(0, 4, (rows,), generator=rng)


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


def test_openvino_goes_on_after_a_failed_call(openvino: OpenVinoRuntime) -> None:
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


def test_torch_at_a_fixed_shape_is_bitwise_independent_of_mates_and_position(tiny: Checkpoint) -> None:
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


def test_compiled_torch_agrees_with_eager_torch(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo without its code generator: what is compiled is right, and the test needs no C++ compiler.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: real(net, backend="aot_eager", **options))
    runtime = load_runtime(tiny, "torch-compile", "cpu", max_rows=4)
    assert (runtime.name, runtime.batch_sizes) == ("torch-compile", (4,))
    expected = TorchRuntime(tiny).forward(*batch(3))
    torch.testing.assert_close(runtime.forward(*batch(3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_give_what_eager_calls_give(tiny: Checkpoint, dtype: DtypeName) -> None:
    eager = TorchRuntime(tiny, "cuda", dtype)
    graphed = TorchRuntime(tiny, "cuda", dtype, batch_sizes=(2, 8))
    for rows in (1, 2, 5, 8, 3):
        inputs = [values.cuda() for values in batch(rows)]
        size = 2 if rows <= 2 else 8
        padded = [torch.cat((v, v[:1].expand(size - rows, *v.shape[1:]))) for v in inputs]
        first = graphed.forward(*inputs)
        assert torch.equal(first, eager.forward(*padded)[:rows])
        kept = first.clone()
        graphed.forward(inputs[0] + 1, *inputs[1:])
        assert torch.equal(first, kept), "a result is not overwritten by the next call"
    graphed.batch_sizes = (4,)
    graphed.forward(*(values.cuda() for values in batch(4)))
    assert set(graphed._graphs) == {4}


Kind = Callable[[Checkpoint, DtypeName], Runtime]
KINDS: dict[str, Kind] = {
    "torch": lambda model, dtype: TorchRuntime(model, dtype=dtype),
    "openvino": lambda model, dtype: OpenVinoRuntime(model, dtype, threads=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32_and_returns_float32(tiny: Checkpoint, kind: str) -> None:
    expected = TorchRuntime(tiny).forward(*batch(4))
    runtime = KINDS[kind](tiny, "bfloat16")
    out = runtime.forward(*batch(4))
    assert (runtime.dtype, out.dtype) == ("bfloat16", torch.float32)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    assert {p.dtype for p in tiny.unet.parameters()} == {torch.float32}, "the caller's network is its own"


@pytest.mark.parametrize("kind", KINDS)
def test_a_runtime_does_not_follow_the_callers_network(tiny: Checkpoint, kind: str) -> None:
    runtime = KINDS[kind](tiny, "float32")
    before = runtime.forward(*batch(1))
    randomise(tiny.unet, seed=9)
    assert torch.equal(runtime.forward(*batch(1)), before)


def test_auto_on_a_cpu_is_openvino(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "OpenVinoRuntime", lambda model, dtype: ("openvino", model, dtype))
    built: object = load_runtime(tiny, device="cpu")
    assert built == ("openvino", tiny, "auto")


def test_auto_is_bfloat16_where_the_processor_has_it(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")
    for capabilities, dtype in ((["FP32", "BF16"], "bfloat16"), (["FP32"], "float32")):
        monkeypatch.setattr(openvino.Core, "get_property", lambda *_, found=capabilities: found)
        assert load_runtime(tiny, "openvino", "cpu").dtype == dtype
        mean = replace(tiny, schedule=replace(tiny.schedule, prediction_type="posterior_mean"))
        assert load_runtime(mean, "openvino", "cpu").dtype == "float32"


def test_without_openvino_auto_is_torch_at_one_shape(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what makes an import fail
    runtime = load_runtime(tiny, device="cpu", max_rows=6)
    assert isinstance(runtime, TorchRuntime)
    assert (runtime.batch_sizes, runtime.dtype) == ((6,), "float32")
    assert load_runtime(tiny, device="cpu", batch_invariant=False).batch_sizes == ()
    with pytest.raises(RuntimeUnavailableError, match="openvino is not installed"):
        load_runtime(tiny, "openvino", "cpu")


def test_openvino_refuses_what_it_cannot_do(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeUnavailableError, match="not float16"):
        load_runtime(tiny, "openvino", "cpu", "float16")
    assert isinstance(load_runtime(tiny, "auto", "cpu", "float16"), TorchRuntime)
    monkeypatch.setattr(runtimes, "choose_device", lambda _: "cuda")
    with pytest.raises(RuntimeUnavailableError, match="openvino runs on the CPU here, not on 'cuda'"):
        load_runtime(tiny, "openvino")


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(RuntimeUnavailableError, match="device 'quantum'"):
        choose_device("quantum")
    with pytest.raises(RuntimeUnavailableError, match="device 'cuda:99'") as caught:
        choose_device("cuda:99")
    assert "\n" not in str(caught.value)
    assert choose_device("cpu") == "cpu"


def test_auto_prefers_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
