"""Alternatives for running the network, side by side with the shipped one: what pays and what does not.

`python -m bench.variants` times each in turn, many rounds, at the service's usual batch size, and prints its
rows per second as a share of the shipped one's in the same round, and how far its output is from torch's in
float32. With `--data` each also makes the images of an evaluation, and their measures are printed.
Int8 needs nncf, which is in no lock file: `pip install nncf`.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.quality import Judge
from bench.roofline import timed
from model import checkpoint
from model.blocks import ResBlock, Upsample
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, trajectory
from model.runtimes import DtypeName, OpenVinoRuntime, TorchRuntime, keep_torch_off
from model.runtimes.lowering import REWRITES, Rewrites, lowered, to_graph
from model.samplers import build_plan
from model.unet import UNet

CALIBRATION = 300
"""Rows that int8's ranges are measured on."""


class OneStream(OpenVinoRuntime):
    """The whole batch in one request, which all cores work on together."""

    streams = 1


class AnyShape(OpenVinoRuntime):
    """Compiled once, with the number of rows left open."""

    def _compiled(self, size: int) -> list[Any]:
        if not self._requests:
            graph = self._graph.clone()
            graph.reshape({graph.input(i): [-1, *shape] for i, shape in enumerate(self._row_shapes)})
            self._open = self._core.compile_model(graph, "CPU", self._options)
        if size not in self._requests:
            self._requests[size] = [self._open.create_infer_request() for _ in range(self.streams)]
            for request in self._requests[size]:
                for place, shape in enumerate(self._row_shapes):
                    request.get_input_tensor(place).shape = [size, *shape]
        return self._requests[size]


class Unpinned(OpenVinoRuntime):
    """Threads that the system may move between cores."""

    def __init__(self, model: Checkpoint, dtype: DtypeName) -> None:
        super().__init__(model, dtype)
        self._options["ENABLE_CPU_PINNING"] = "NO"


class AsWritten(OpenVinoRuntime):
    """The layers as PyTorch has them."""

    rewrites: ClassVar[Rewrites] = {}


class ChannelNorms(OpenVinoRuntime):
    """Group norm by channel, the rest as PyTorch has it."""

    rewrites: ClassVar[Rewrites] = {kind: REWRITES[kind] for kind in (ResBlock, nn.GroupNorm)}


class PlainUpsampling(OpenVinoRuntime):
    """Shipped, but upsampling and its convolution apart."""

    rewrites: ClassVar[Rewrites] = {kind: new for kind, new in REWRITES.items() if kind is not Upsample}


class _Body(nn.Module):
    """The network behind its embedding: (x, what `embed` gives) → output."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """See the class."""
        return self.unet.after(x, emb)


class _Part(nn.Module):
    """Where a block's projection was: its columns of what is given instead."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, emb: Tensor) -> Tensor:
        """[B, all] → [B, columns]."""
        return emb[:, self.start : self.stop]


class Table(OpenVinoRuntime):
    """The embedding of every timestep and class looked up in a table, not computed."""

    projected = False

    def __init__(self, model: Checkpoint, dtype: DtypeName) -> None:
        super().__init__(model, dtype)
        unet = lowered(cast("UNet", model.unet))
        times, classes = model.schedule.timesteps, unet.config.num_class_embeds or 1
        t = torch.arange(times).repeat_interleave(classes)
        y = torch.arange(classes).repeat(times) if unet.config.conditional else None
        self.classes = classes
        with torch.no_grad():
            self.table = unet.embed(unet.features(t, y), torch.float32)
            if self.projected:
                columns, start = [], 0
                for block in [module for module in unet.modules() if isinstance(module, ResBlock)]:
                    columns.append(block.time_emb_proj(self.table))
                    stop = start + columns[-1].shape[1]
                    block.time_emb_proj, start = _Part(start, stop), stop  # type: ignore[assignment]
                self.table = torch.cat(columns, 1)
        self._row_shapes = [self._row_shapes[0], (self.table.shape[1],)]
        example = [torch.zeros(2, *shape) for shape in self._row_shapes]
        self._graph = to_graph(_Body(unet), example)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """As the shipped one's."""
        return self._run([x, self.table[t * self.classes + (0 if y is None else y)]])


class ProjectedTable(Table):
    """The same with every block's projection of the embedding."""

    projected = True


class Int8(OpenVinoRuntime):
    """Weights and activations in eight bits by NNCF's defaults, ranges measured along real chains."""

    careful = False

    def __init__(self, model: Checkpoint, dtype: DtypeName) -> None:
        import nncf  # in no lock file

        super().__init__(model, dtype)
        rows = [
            [values.numpy() for values in (x, *self._features(t, y[0] if y else None))]
            for x, t, *y in calibration(model)
        ]
        options = {}
        if self.careful:
            options = {
                "preset": nncf.QuantizationPreset.MIXED,
                "fast_bias_correction": False,
                "ignored_scope": nncf.IgnoredScope(
                    patterns=[".*conv_in.*", ".*conv_out.*", ".*attentions.*"], validate=False
                ),
            }
        self._graph = nncf.quantize(self._graph, nncf.Dataset(rows), subset_size=len(rows), **options)


class CarefulInt8(Int8):
    """The same, activations asymmetric, biases corrected exactly; first, last and attention layers kept."""

    careful = True


def calibration(model: Checkpoint) -> list[list[Tensor]]:
    """Rows that the network sees in DDIM chains of 50 steps of every class, each as a batch of one."""
    denoiser = Denoiser.of(model, TorchRuntime(model))
    plan = build_plan(model.schedule, "ddim", 50)
    kinds = model.unet.config.num_class_embeds
    chains = [Chain(plan, seed, seed % kinds if kinds else None) for seed in range(2 * (kinds or 10))]
    rows = []
    for step, latents in enumerate(trajectory(denoiser, chains)):
        for chain, latent in zip(chains, latents, strict=True):
            if step + 1 < len(plan):
                label = [] if chain.label is None else [torch.tensor([chain.label])]
                rows.append([latent.x[None], torch.tensor([plan.timesteps[step + 1]]), *label])
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(rows))
    return [rows[place] for place in order[:CALIBRATION]]


VARIANTS: dict[str, type[OpenVinoRuntime]] = {
    "shipped": OpenVinoRuntime,
    "as PyTorch has it": AsWritten,
    "channel norms alone": ChannelNorms,
    "upsampling apart": PlainUpsampling,
    "one stream": OneStream,
    "any shape": AnyShape,
    "threads not pinned": Unpinned,
    "table of embeddings": Table,
    "table of projections": ProjectedTable,
    "int8": Int8,
    "int8, careful": CarefulInt8,
}


def built(model: Checkpoint, dtype: DtypeName, names: Sequence[str]) -> Iterator[tuple[str, OpenVinoRuntime]]:
    """The variants by name; int8 only where nncf is installed."""
    for name in names:
        if name.startswith("int8") and importlib.util.find_spec("nncf") is None:
            print(f"{name} is left out: nncf is not installed\n")
            continue
        yield name, VARIANTS[name](model, dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.variants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a variant in a round")
    parser.add_argument(
        "--variant", action="append", choices=[name for name in VARIANTS if name != "shipped"]
    )
    parser.add_argument("--data", type=Path, help="as for model.evaluation.evaluate; measures quality too")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(arguments)
    model = checkpoint.load(args.model)
    names = ["shipped", *(args.variant or [name for name in VARIANTS if name != "shipped"])]
    runtimes = dict(built(model, args.dtype, names))
    keep_torch_off(runtimes["shipped"])
    seen = calibration(model)[: args.rows]
    x, t, *labels = (torch.cat(column) for column in zip(*seen, strict=True))
    batch = x, t, labels[0] if labels else None
    true = TorchRuntime(model).forward(*batch)
    rates: dict[str, list[float]] = {name: [] for name in runtimes}
    for _ in range(args.rounds):
        for name, runtime in runtimes.items():
            rates[name].append(args.rows / timed(_call(runtime, batch), args.seconds))
    print(f"{args.dtype}, {args.rows} rows a call, medians of {args.rounds} rounds\n")
    print("|variant|rows/s|of the shipped|min and max|relative error|\n|---|--:|--:|---|--:|")
    for name, runtime in runtimes.items():
        shares = [rate / shipped for rate, shipped in zip(rates[name], rates["shipped"], strict=True)]
        error = ((runtime.forward(*batch) - true).norm() / true.norm()).item()
        spread = f"{min(shares):.0%} … {max(shares):.0%}"
        print(f"|{name}|{median(rates[name]):.0f}|{median(shares):.1%}|{spread}|{error:.2%}|")
    if args.data:
        print(f"\n{args.sampler}, {args.steps} steps, {args.samples} samples\n")
        print("|variant|agreement|Fréchet ↓|precision|recall|\n|---|--:|--:|--:|--:|")
        judge = Judge(args.model, args.data, args.samples)
        for name, runtime in runtimes.items():
            found = judge.of(runtime, args.sampler, args.steps)
            agreement = "–" if found["agreement"] is None else f"{found['agreement']:.3f}"
            rest = "|".join(f"{found[key]:.3f}" for key in ("frechet", "precision", "recall"))
            print(f"|{name}|{agreement}|{rest}|", flush=True)


def _call(runtime: OpenVinoRuntime, batch: tuple[Tensor, Tensor, Tensor | None]) -> Callable[[], Tensor]:
    return lambda: runtime.forward(*batch)


if __name__ == "__main__":
    main()
