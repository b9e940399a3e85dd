from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from model.checkpoint import Checkpoint
from model.runtimes import (
    DtypeName,
    OpenVinoRuntime,
    Runtime,
    RuntimeUnavailableError,
    TorchRuntime,
    choose_device,
    load,
    load_runtime,
)
from tests.model.conftest import randomise
from tests.model.runtimes.conftest import batch

Kind = Callable[[Checkpoint, DtypeName], Runtime]
KINDS: dict[str, Kind] = {
    "torch": lambda model, dtype: TorchRuntime(model, dtype=dtype),
    "openvino": lambda model, dtype: OpenVinoRuntime(model, dtype, threads=1),
}


def test_compiled_torch_agrees_with_eager_torch(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo without its code generator: what is compiled is right, and the test needs no C++ compiler.
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: real(net, backend="aot_eager", **options))
    runtime = load_runtime(tiny, "torch-compile", "cpu", max_batch_size=4)
    assert (runtime.name, runtime.batch_sizes) == ("torch-compile", (4,))
    expected = TorchRuntime(tiny).forward(*batch(3))
    torch.testing.assert_close(runtime.forward(*batch(3)), expected, rtol=1e-4, atol=1e-4)


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
    monkeypatch.setattr(load, "OpenVinoRuntime", lambda model, dtype: ("openvino", model, dtype))
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
    runtime = load_runtime(tiny, device="cpu", max_batch_size=6)
    assert isinstance(runtime, TorchRuntime)
    assert (runtime.batch_sizes, runtime.dtype) == ((6,), "float32")
    assert load_runtime(tiny, device="cpu", batch_invariant=False).batch_sizes == ()
    with pytest.raises(RuntimeUnavailableError, match="openvino is not installed"):
        load_runtime(tiny, "openvino", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_rounded_to_tf32_only_where_it_may_be(tiny: Checkpoint, tf32: bool) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).cuda()
    image, kernel = x.view(1, 64, 32, 32), x.view(64, 64, 4, 4)
    load_runtime(tiny, "torch", "cuda", tf32=tf32)
    errors = [
        ((x @ x).double() - x.double() @ x.double()).abs().max(),
        (F.conv2d(image, kernel) - F.conv2d(image.double(), kernel.double())).abs().max(),
    ]
    assert all((error > 2e-3) == tf32 for error in errors), errors
    load_runtime(tiny, "torch", "cuda")


@pytest.mark.gpu
def test_the_current_device_is_the_runtimes(tiny: Checkpoint) -> None:
    load_runtime(tiny, "torch", f"cuda:{torch.cuda.device_count() - 1}")
    assert torch.cuda.current_device() == torch.cuda.device_count() - 1
    torch.cuda.set_device(0)


def test_a_cpu_leaves_the_processes_precision_alone(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)
    load_runtime(tiny, "torch", "cpu", tf32=True)


def test_openvino_refuses_what_it_cannot_do(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeUnavailableError, match="not float16"):
        load_runtime(tiny, "openvino", "cpu", "float16")
    assert isinstance(load_runtime(tiny, "auto", "cpu", "float16"), TorchRuntime)
    monkeypatch.setattr(load, "choose_device", lambda _: "cuda")
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
