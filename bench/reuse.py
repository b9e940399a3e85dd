"""Feature reuse across neighbouring steps (DeepCache, Ma et al. 2024): does it pay here?

Only every N-th step runs the whole network; those between take what the deeper blocks gave in the last
whole one and run the blocks at full resolution alone. `python -m bench.reuse --data PATH` sets its quality
against that of fewer whole steps, which save work too: each line has what an image costs, in whole network
calls, by operations and by this machine's clock, and the measures of `model.evaluation.evaluate` for the same
seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.quality import Judge
from bench.roofline import inputs, timed
from model import checkpoint
from model.blocks import Level
from model.checkpoint import Checkpoint
from model.runtimes import OpenVinoRuntime, TorchRuntime
from model.runtimes.lowering import lowered, to_graph
from model.unet import UNet


class Whole(torch.nn.Module):
    """The network, which also gives what its last `blocks` blocks begin from: (x, t, y) → (output, kept)."""

    def __init__(self, unet: UNet, blocks: int) -> None:
        super().__init__()
        self.unet, self.blocks = unet, blocks

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        unet, emb = self.unet, self.unet.embed(self.unet.features(t, y), x.dtype)
        h = unet.conv_in(x)
        skips = [h]
        for level in unet.down_blocks:
            h = _level(level).down(h, emb, skips)
        if unet.mid_block is not None:
            h = unet.mid_block(h, emb)
        *deeper, last = (_level(level) for level in unet.up_blocks)
        for level in deeper:
            h = level.up(h, emb, skips)
        first = len(last.resnets) - self.blocks
        h = _through(last, range(first), h, emb, skips)
        out = _through(last, range(first, len(last.resnets)), h, emb, skips)
        return _output(unet, out), h


class Shallow(Whole):
    """The blocks at full resolution alone: (x, t, y, kept) → output."""

    def forward(self, x: Tensor, t: Tensor, *more: Tensor) -> Tensor:  # type: ignore[override]
        """See the class."""
        unet, (*labels, kept) = self.unet, more
        emb = unet.embed(unet.features(t, labels[0] if labels else None), x.dtype)
        h = unet.conv_in(x)
        skips = [h]
        first, last = _level(unet.down_blocks[0]), _level(unet.up_blocks[-1])
        for i in range(self.blocks - 1):
            h = first.resnets[i](h, emb)
            if first.attend:
                h = first.attentions[i](h)
            skips.append(h)
        count = len(last.resnets)
        return _output(unet, _through(last, range(count - self.blocks, count), kept, emb, skips))


def _level(module: torch.nn.Module) -> Level:
    assert isinstance(module, Level)
    return module


def _through(level: Level, blocks: range, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
    for i in blocks:
        h = level.resnets[i](torch.cat((h, skips.pop()), dim=1), emb)
        if level.attend:
            h = level.attentions[i](h)
    return h


def _output(unet: UNet, h: Tensor) -> Tensor:
    out: Tensor = unet.conv_out(torch.nn.functional.silu(unet.conv_norm_out(h)))
    return out


class Reusing(TorchRuntime):
    """Torch's network, whole only in every `interval`-th step of chains that march in lockstep."""

    def __init__(self, model: Checkpoint, interval: int, blocks: int) -> None:
        super().__init__(model)
        self.interval = interval
        self.whole, self.shallow = (
            Whole(cast("UNet", self.unet), blocks),
            Shallow(cast("UNet", self.unet), blocks),
        )
        self._step, self._before, self._kept = 0, -1, torch.empty(0)

    @torch.inference_mode()
    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """A step of the chains; timesteps that rise mean new ones."""
        now = int(t.max())
        self._step = self._step + 1 if now < self._before else 0
        self._before = now
        given = [x, t] if y is None else [x, t, y]
        if self._step % self.interval:
            return self.shallow(*given, self._kept)  # type: ignore[no-any-return]
        out, self._kept = self.whole(*given)
        return out  # type: ignore[no-any-return]


def share_of_operations(model: Checkpoint, blocks: int) -> float:
    """Operations of a shallow call as a share of a whole one."""
    given = [value for value in inputs(model, 1) if value is not None]
    counts = []
    with torch.no_grad():
        _, kept = Whole(cast("UNet", model.unet), blocks)(*given)
        for network, arguments in (
            (Whole(cast("UNet", model.unet), blocks), given),
            (Shallow(cast("UNet", model.unet), blocks), [*given, kept]),
        ):
            with FlopCounterMode(display=False) as counter:
                network(*arguments)
            counts.append(counter.get_total_flops())
    return float(counts[1] / counts[0])


class _Call(OpenVinoRuntime):
    """One of the two as the service would run it."""

    def __init__(self, model: Checkpoint, network: torch.nn.Module, given: Sequence[Tensor]) -> None:
        super().__init__(model, "auto")
        self._row_shapes = [tuple(value.shape[1:]) for value in given]
        self._graph = to_graph(network, given)

    def run(self, given: Sequence[Tensor]) -> Callable[[], Tensor]:
        """A call of it."""
        return lambda: self._run(given)


def share_of_time(model: Checkpoint, blocks: int, rows: int, rounds: int) -> float:
    """Seconds of a shallow call as a share of a whole one's without a second output; the median of rounds."""
    given = [value for value in inputs(model, rows) if value is not None]
    with torch.no_grad():
        _, kept = Whole(cast("UNet", model.unet), blocks)(*given)
    whole, shallow = (
        OpenVinoRuntime(model, "auto"),
        _Call(model, Shallow(lowered(cast("UNet", model.unet)), blocks), [*given, kept]),
    )
    calls = lambda: whole.forward(*inputs(model, rows)), shallow.run([*given, kept])
    pairs = [[timed(call, 0.3) for call in calls] for _ in range(rounds)]
    return median(few / all_ for all_, few in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.reuse", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--data", type=Path, required=True, help="as for model.evaluation.evaluate")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, nargs="*", default=(10, 20, 50), help="of whole steps alone")
    parser.add_argument("--of", type=int, default=50, help="steps of a chain that reuses")
    parser.add_argument("--interval", type=int, nargs="*", default=(2, 3, 5))
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=(1, 2), help="at full resolution that a shallow step runs"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of the timing")
    args = parser.parse_args(arguments)
    model = checkpoint.load(args.model)
    judge = Judge(args.model, args.data, args.samples)

    def line(title: str, runtime: TorchRuntime, steps: int, operations: float, seconds: float) -> None:
        found = judge.of(runtime, args.sampler, steps)
        agreed = "–" if found["agreement"] is None else f"{found['agreement']:.3f}"
        print(f"|{title}|{operations:.1f}|{seconds:.1f}|{agreed}|{found['frechet']:.1f}|", flush=True)

    print(f"{args.sampler}, {args.samples} samples; the cost of an image in whole network calls\n")
    print("|steps|by operations|by the clock|agreement|Fréchet ↓|\n|---|--:|--:|--:|--:|")
    for steps in args.steps:
        line(f"{steps} whole", TorchRuntime(model), steps, steps, steps)
    for blocks in args.blocks:
        operations = share_of_operations(model, blocks)
        seconds = share_of_time(model, blocks, 8, args.rounds)
        for interval in args.interval:
            whole = -(-args.of // interval)
            few = args.of - whole
            title = f"{args.of}, every {interval}th whole, {blocks} blocks between"
            runtime = Reusing(model, interval, blocks)
            line(title, runtime, args.of, whole + few * operations, whole + few * seconds)


if __name__ == "__main__":
    main()
