"""How near the network comes to what this machine can multiply.

`python -m bench.roofline` times square matrix products for the machine's limit, then every runtime on the
shipped network and on the shape of the published cifar10-32 checkpoint (random weights), at 1 … 32 rows.
Times are medians; operations are two per multiply-add of convolutions, linear layers and attention, counted
on the network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import checkpoint
from model.checkpoint import Checkpoint
from model.runtimes import TORCH_DTYPES, DtypeName, Runtime, load_runtime
from model.unet import UNet, UNetConfig

CIFAR10_32 = UNetConfig(
    sample_size=(32, 32),
    in_channels=3,
    out_channels=3,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
KINDS: tuple[tuple[str, DtypeName], ...] = tuple(
    (kind, dtype) for kind in ("openvino", "torch") for dtype in ("float32", "bfloat16")
)
COMPILED: tuple[tuple[str, DtypeName], ...] = (("torch-compile", "float32"), ("torch-compile", "bfloat16"))
ROWS = (1, 2, 4, 8, 16, 32)


def timed(action: Callable[[], object], seconds: float) -> float:
    """Median seconds of an action, over at least three after one that is not counted."""
    action()
    taken: list[float] = []
    begun = perf_counter()
    while len(taken) < 3 or perf_counter() - begun < seconds:
        started = perf_counter()
        action()
        taken.append(perf_counter() - started)
    return median(taken)


def multiply_limit(dtype: DtypeName, seconds: float) -> float:
    """The most operations per second of a product of two square matrices, over a few sizes."""
    rates = []
    for size in (512, 1024, 2048):
        a = torch.randn(size, size, dtype=TORCH_DTYPES[dtype])
        rates.append(2 * size**3 / timed(lambda a=a: a @ a, seconds))  # type: ignore[misc]
    return max(rates)


def inputs(model: Checkpoint, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A batch of noise at timestep 500."""
    config = model.unet.config
    x = torch.randn(rows, *config.shape)
    t = torch.full((rows,), 500)
    return x, t, torch.zeros_like(t) if config.conditional else None


def operations(model: Checkpoint) -> int:
    """Operations of one row."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.unet(*inputs(model, 1))
    return int(counter.get_total_flops())


def row_rates(runtime: Runtime, model: Checkpoint, rows: Sequence[int], seconds: float) -> list[float]:
    """Rows per second at each batch size."""
    batches = [inputs(model, n) for n in rows]
    return [len(b[0]) / timed(lambda b=b: runtime.forward(*b), seconds) for b in batches]  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each network as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS, help="batch sizes")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too: minutes, and a compiler")
    args = parser.parse_args(arguments)
    shipped = checkpoint.load(args.model)
    cifar = replace(shipped, name="cifar10-32's shape", unet=UNet(CIFAR10_32).eval(), null_class=None)
    limits = {dtype: multiply_limit(dtype, args.seconds) for _, dtype in KINDS}
    for dtype, limit in limits.items():
        print(f"Matrix products, {dtype}: {limit / 1e9:.0f} GFLOP/s")
    for model in (shipped, cifar):
        row = operations(model)
        print(f"\n#### {model.name}: {row / 1e9:.2f} GFLOP a row; rows/s (share of matrix products)\n")
        print("|runtime|" + "|".join(map(str, args.rows)) + "|")
        print("|---" + "|--:" * len(args.rows) + "|")
        for kind, dtype in (*KINDS, *(COMPILED if args.compiled else ())):
            runtime = load_runtime(model, kind, "cpu", dtype, batch_invariant=False)  # type: ignore[arg-type]
            rates = row_rates(runtime, model, args.rows, args.seconds)
            cells = [f"{rate:.0f} ({rate * row / limits[dtype]:.0%})" for rate in rates]
            print(f"|{kind} {dtype}|" + "|".join(cells) + "|", flush=True)


if __name__ == "__main__":
    main()
