"""Rows per second of the networks by themselves, beside the card's matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.scale import PRECISIONS, Figures, Network, Scale
from bench.roofline import inputs
from model.checkpoint import Checkpoint
from model.runtimes import TORCH_DTYPES, Recorded, TorchRuntime
from model.unet import UNet, UNetConfig


def per_call(action: Callable[[], object], scale: Scale) -> float:
    """Seconds of a call, of as many as take the wanted time, without waiting between them."""
    action()
    scale.synchronize()
    calls = 1
    while True:
        begun = time.perf_counter()
        for _ in range(calls):
            action()
        scale.synchronize()
        taken = time.perf_counter() - begun
        if taken >= scale.seconds:
            return taken / calls
        calls = max(2 * calls, int(1.1 * calls * scale.seconds / taken))


def product_limit(precision: str, scale: Scale) -> float:
    """Operations per second of a product of two large square matrices."""
    dtype, tf32 = PRECISIONS[precision]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    a = torch.randn(scale.product, scale.product, device=scale.device).to(TORCH_DTYPES[dtype])
    out = torch.empty_like(a)
    return 2 * scale.product**3 / per_call(lambda: torch.mm(a, a, out=out), scale)


def operations(config: UNetConfig) -> int:
    """Operations of one row: two per multiply-add of convolutions, linear layers and attention."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        t = torch.zeros(1, dtype=torch.int64)
        x = torch.zeros(1, *config.shape)
        UNet(config).eval()(x, t, t if config.conditional else None)
    return int(counter.get_total_flops())


def call(
    runtime: TorchRuntime, model: Checkpoint, rows: int, scale: Scale, *, recorded: bool
) -> Callable[[], object]:
    """A call of the network at a batch size; recorded where there is a GPU to record for."""
    x, t, y = (None if values is None else values.to(scale.device) for values in inputs(model, rows))
    assert x is not None
    assert t is not None

    @torch.inference_mode()
    def forward(x: torch.Tensor = x) -> torch.Tensor:
        return runtime.forward(x, t, y)

    if not recorded or scale.simulated:
        return forward
    with torch.inference_mode():
        kept = Recorded(forward, x.cpu())
    return lambda: kept._graph.replay()


def rates(scale: Scale, name: Network) -> Figures:
    """Rows per second of a network by precision, way of calling and batch size, beside matrix products."""
    model = scale.model(name)
    yield "operations", operations(cast("UNetConfig", model.unet.config))
    for precision in scale.precisions:
        dtype, tf32 = PRECISIONS[precision]
        try:
            yield f"{precision}/product", product_limit(precision, scale)
            runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
            for way in ("recorded", "eager"):
                for rows in scale.rows[name]:
                    action = call(runtime, model, rows, scale, recorded=way == "recorded")
                    yield f"{precision}/{way}/{rows}", rows / per_call(action, scale)
                    del action
        except Exception as error:  # noqa: BLE001 (out of memory, say; the next precision may still work)
            yield f"{precision}/error", f"{type(error).__name__}: {str(error)[:500]}"
        scale.free()
    rows = scale.rows[name][-1]
    for precision in scale.precisions[1:3]:  # whether another layout, or a search for kernels, would pay
        dtype, tf32 = PRECISIONS[precision]
        runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
        torch.backends.cudnn.benchmark = True
        action = call(runtime, model, rows, scale, recorded=True)
        yield f"{precision}/recorded, cudnn.benchmark/{rows}", rows / per_call(action, scale)
        torch.backends.cudnn.benchmark = False
        runtime.unet = runtime.unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        runtime._network = runtime.unet
        action = call(runtime, model, rows, scale, recorded=True)
        yield f"{precision}/recorded, channels first/{rows}", rows / per_call(action, scale)


def compiled(scale: Scale) -> Figures:
    """The networks by torch.compile, at one batch size each. What there was no time for is named."""
    wanted = [(name, precision) for precision in reversed(scale.precisions) for name in scale.rows]
    wanted.sort(key=lambda each: each[1] != "bfloat16")  # what would be missed most
    begun = time.perf_counter()
    while wanted and time.perf_counter() - begun < scale.compile_s:
        name, precision = wanted.pop(0)
        try:
            yield from _compiled(scale, name, precision)
        except Exception as error:  # noqa: BLE001 (the next one may still work)
            yield f"{name}/{precision}/error", f"{type(error).__name__}: {str(error)[:500]}"
        torch.compiler.reset()
        scale.free()
    if wanted:
        yield "no time was left for", [f"{name}/{precision}" for name, precision in wanted]


def _compiled(scale: Scale, name: Network, precision: str) -> Figures:
    model, rows = scale.model(name), max(rows for rows in scale.rows[name] if rows <= scale.width)
    dtype, tf32 = PRECISIONS[precision]
    runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
    backend = "eager" if scale.simulated else "inductor"  # a simulation needs no compiler
    runtime._network = torch.compile(runtime.unet, dynamic=False, backend=backend)
    begun = time.perf_counter()
    action = call(runtime, model, rows, scale, recorded=False)
    action()
    scale.synchronize()
    yield f"{name}/{precision}/seconds to compile", time.perf_counter() - begun
    yield f"{name}/{precision}/compiled/{rows}", rows / per_call(action, scale)
    action = call(runtime, model, rows, scale, recorded=True)
    yield f"{name}/{precision}/compiled and recorded/{rows}", rows / per_call(action, scale)
