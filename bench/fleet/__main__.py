"""A fleet in virtual time: `python -m bench.fleet --out docs` writes scale-tables.md and scale.svg there.

That takes a quarter of an hour; `--only flash` prints one table, `--quick` a small version of all in seconds.
`--price 2` is what a device costs for an hour, in any currency. `--check` runs the real service on simulated
devices, one and two, beside the simulation of the same requests.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from bench.fleet.sections import SECTIONS, Study
from bench.simulation import CURVES

PANELS = ("gpu, 10", "cpu, 10", "flash", "batching, gpu", "batching, cpu", "gpu, 100")
WORDS = {
    "flash": ("a flash crowd, start-up 10 s", "seconds", "mean latency (s)"),
    "batching, gpu": ("4 replicas, gpu: batching", "load (share of capacity)", "p95 latency (s)"),
    "batching, cpu": ("4 replicas, cpu: batching", "load (share of capacity)", "p95 latency (s)"),
    "gpu, 10": ("10 replicas, gpu: routing", "load (share of capacity)", "mean latency (s)"),
    "cpu, 10": ("10 replicas, cpu: routing", "load (share of capacity)", "mean latency (s)"),
    "gpu, 100": ("100 replicas, gpu: routing", "load (share of capacity)", "mean latency (s)"),
}


def plot(study: Study, path: Path) -> None:
    """Draw the lines that the tables' runs have left."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scale"  # the same bytes every time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 2, figsize=(11, 12), layout="constrained")
    for panel, name in zip(axes.flat, PANELS, strict=True):
        for line, points in study.points.items():
            where, _, label = line.partition("|")
            if where == name:
                panel.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
        title, across, up = WORDS[name]
        panel.set(title=title, xlabel=across, ylabel=up, yscale="log")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser("python -m bench.fleet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a table; repeatable")
    parser.add_argument("--price", type=float, default=1.0, help="of a device for an hour")
    parser.add_argument("--seed", type=int, default=0, help="of the requests and of the draws")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the requests")
    parser.add_argument("--out", type=Path, help="folder for scale-tables.md and scale.svg")
    parser.add_argument("--check", action="store_true", help="the real service beside the simulation")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run of the check")
    args = parser.parse_args(arguments)
    if args.check:
        from bench.fleet.check import check

        print(check(args.seconds))
        return
    study = Study(0.01 if args.quick else 1.0, args.seed, args.price, largest=100 if args.quick else 10_000)
    texts = []
    for name, curve in CURVES.items():
        points = ", ".join(f"{size}: {seconds * 1e3:.1f}" for size, seconds in curve)
        texts.append(f"Curve `{name}`: step times in ms by batch size: {points}.\n")
        print(texts[-1], flush=True)
    for section in args.only or SECTIONS:
        begun = time.perf_counter()
        texts.append(SECTIONS[section](study))
        print(texts[-1], f"({time.perf_counter() - begun:.0f} s)\n", sep="", flush=True)
    if args.out:
        (args.out / "scale-tables.md").write_text("\n".join(texts))
        plot(study, args.out / "scale.svg")


if __name__ == "__main__":
    main()
