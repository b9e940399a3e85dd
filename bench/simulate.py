"""Policies and batch widths compared: tables and a plot over simulated runs.

`python -m bench.simulate` prints every table as Markdown (minutes); `--only widths` one of them; `--quick` a
small version of all, in seconds; `--out docs` also writes scheduling-tables.md and scheduling.svg there;
`--curve info.json` takes the step times that a running service's /info reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from service.scheduler import StepTimes

from bench.simulation import (
    CURVES,
    POLICIES,
    Case,
    Course,
    Curve,
    Outcome,
    jobs_of,
    read_curve,
    request,
    run,
)
from bench.workload import WORKLOADS, trace

LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
TURNS = {2: "2", 4: "4", 8: "8", 16: "16", 64: "64", 10**9: "never"}


def cells(outcomes: Sequence[Outcome], shown: str) -> list[str]:
    """Format seconds, one for each word: mean, p50 … p100 of latency; first, firstp95: to the first step."""
    numbers = []
    for word in shown.split():
        values = [o.first - o.created if word.startswith("first") else o.latency for o in outcomes]
        percent = word.rpartition("p")[2]
        numbers.append(np.percentile(values, float(percent)) if percent.isdigit() else np.mean(values))
    return [f"{x:.2f}" for x in numbers]


def worst(outcomes: Sequence[Outcome], curve: Curve) -> str:
    """Format the largest slowdown."""
    return f"{max(o.slowdown(curve) for o in outcomes):.1f}"


def table(title: str, header: str, rows: Iterable[Sequence[object]]) -> str:
    """Lay out a Markdown table, its header's cells parted by |."""
    lines = [header, "|".join("-" * len(header.split("|"))), *("|".join(map(str, row)) for row in rows)]
    return "\n".join([f"#### {title}", "", *(f"|{line}|" for line in lines), ""])


def grid(title: str, cases: Iterable[Case], label: str, shown: str, steps: tuple[int, ...] = (0,)) -> str:
    """Lay out a row for each case, named by its fields `label`, and a column for each policy.

    With `steps`, a row for each case and the requests of so many steps.
    """
    rows = []
    for case, of in ((case, of) for case in cases for of in steps):
        runs = [run(replace(case, policy=policy)) for policy in POLICIES]
        kept = [[o for o in done if of in (0, len(o.course))] for done in runs]
        names = [*(getattr(case, name) for name in label.split()), *([of, len(kept[0])] if of else [])]
        rows.append([*names, *(" / ".join(cells(outcomes, shown)) for outcomes in kept if outcomes)])
    header = [*label.split(), *(["steps", "requests"] if steps[0] else []), *POLICIES]
    return table(f"{title}: {shown.replace(' ', ' / ')}", "|".join(header), rows)


def policies(base: Case) -> str:
    """Everything about every policy at one load."""
    shown, rows = "mean p50 p95 p99 first firstp95", []
    for case in (replace(base, workload=w, policy=p) for w in WORKLOADS for p in POLICIES):
        done = run(case)
        rate = sum(o.rows for o in done) / (max(o.ended for o in done) - done[0].created)
        last = worst(done, case.curve), f"{rate / case.capacity:.3f}"
        rows.append([case.workload, case.policy, case.rows, *cells(done, shown), *last])
    header = "workload|policy|width|mean|p50|p95|p99|first step mean|first step p95|worst slowdown|throughput"
    return table(f"policies, load {base.load}", header, rows)


def loads(base: Case) -> str:
    """Compare the policies over the load."""
    cases = (replace(base, workload=w, load=x) for w in WORKLOADS for x in LOADS)
    return grid("loads", cases, "workload load", "mean p95")


def widths(base: Case) -> str:
    """Compare the policies at equal widths."""
    cases = (replace(base, workload=w, width=rows) for w in WORKLOADS for rows, _ in base.curve[1:])
    return grid(f"widths, load {base.load}", cases, "workload width", "mean p95 p99")


def classes(base: Case) -> str:
    """Show who pays, by the steps of the request."""
    return grid(f"classes, load {base.load}", [base], "workload", "mean p99 p100", steps=(20, 50, 250))


def turns(base: Case) -> str:
    """Vary how often a step goes in order of arrival, at the given load and above capacity."""
    rows = []
    for case in (replace(base, load=x, turn=turn) for x in (base.load, 1.2) for turn in TURNS):
        done = run(case)
        nearest = max(o.latency / o.bound(case.rows, case.turn, StepTimes(case.curve)) for o in done)
        shown = *cells(done, "mean p95 p99 p100"), worst(done, case.curve), f"{nearest:.3f}"
        rows.append([case.load, TURNS[case.turn], *shown])
    return table("turns, mix", "load|turn|mean|p95|p99|p100|worst slowdown|largest latency / bound", rows)


def starvation(base: Case) -> str:
    """Show a large job amid small ones that ask for 1.2 of capacity until half as long again as its bound."""
    rows, rate = [], 1.2 * base.capacity / 20
    for images, steps in ((64, 50), (1, 250)) if base.arrivals > 100 else ((4, 50),):
        times = StepTimes(base.curve)
        stream = 1.5 * Outcome(0.0, Course(steps), images, images * steps, steps, 1).bound(
            base.rows, 8, times
        )
        for case in [replace(base, turn=t) for t in TURNS] + [replace(base, policy=p) for p in POLICIES[1:]]:
            asks = trace("uniform", 50 * rate, int(stream * rate), base.seed)
            small = jobs_of(replace(ask, steps=20) for ask in asks)
            large, *others = case.drive([request("large", 0.0, steps, images), *small])
            shown = f"{large.latency:.1f}", f"{stream:.1f}", len(others), worst([large], case.curve)
            name = case.policy
            if name == "remaining":
                limit = large.bound(case.rows, case.turn, times)
                name += f", turn {TURNS[case.turn]}" + (f", bound {limit:.1f}" if limit < 1e6 else "")
            rows.append([f"{images}×{steps}", name, *shown, *cells(others, "mean")])
    return table("starvation", "large|policy|latency|stream|small|slowdown|mean of the small", rows)


def behind(base: Case) -> str:
    """Show one image (50 steps) asked for when 64 others are a tenth done."""
    rows = []
    for case in (replace(base, policy=p, width=w) for p in POLICIES for w in sorted({base.rows, 4, 16})):
        both = [(0.0, 64), (320 / case.capacity, 1)]
        runs = ([request(str(n), at, 50, n) for at, n in asked] for asked in (both[1:], both, both[:1]))
        (one,), (with_one, after), (many,) = map(case.drive, runs)
        times = (f"{o.latency:.2f}" for o in (one, after, many, with_one))
        rows.append([case.policy, case.width, *times])
    return table("behind", "policy|width|1 image alone|behind 64|64 images alone|with 1 arriving", rows)


SECTIONS = {made.__name__: made for made in (policies, loads, widths, classes, turns, starvation, behind)}


def plot(bases: dict[str, Case], path: Path) -> None:
    """Draw p95 over the load, a panel for each workload and curve."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scheduling"  # the same bytes every time
    from matplotlib import pyplot as plt

    size = 10, 4 * len(bases)
    figure, axes = plt.subplots(len(bases), 2, figsize=size, squeeze=False, layout="constrained")
    panels = zip(axes.flat, ((name, workload) for name in bases for workload in WORKLOADS), strict=True)
    for panel, (name, workload) in panels:
        for policy in POLICIES:
            case = replace(bases[name], workload=workload, policy=policy)
            p95 = [float(*cells(run(replace(case, load=x)), "p95")) for x in LOADS]
            line = "o:" if policy == "peer" else "o-"
            panel.semilogy(LOADS, p95, line, label=f"{policy}, width {case.rows}")
        panel.set(title=f"{name}, {workload}", xlabel="load (share of capacity)", ylabel="p95 latency (s)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser("python -m bench.simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curve", action="append", help="cpu, gpu or a file with /info's answer; repeatable")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a table; repeatable")
    parser.add_argument("--load", type=float, default=0.7, help="share of capacity, where a table has one")
    parser.add_argument("--width", type=int, default=0, help="most rows of a step (0: the curve's knee)")
    parser.add_argument("--arrivals", type=int, default=1000, help="requests of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--quick", action="store_true", help="20 arrivals, and a small large job")
    parser.add_argument("--out", type=Path, help="folder for scheduling-tables.md and scheduling.svg")
    args = parser.parse_args(arguments)
    arrivals = 20 if args.quick else args.arrivals
    usual = Case((), width=args.width, load=args.load, arrivals=arrivals, seed=args.seed)
    bases = {}
    for name in args.curve or CURVES:
        curve = CURVES[name] if name in CURVES else read_curve(Path(name))
        bases[Path(name).stem] = replace(usual, curve=curve)
    texts = []
    for name, base in bases.items():
        points = ", ".join(f"{rows}: {seconds * 1e3:.1f}" for rows, seconds in base.curve)
        facts = f"capacity {base.capacity:.0f} rows/s; usual width {base.rows}; {arrivals} arrivals a run"
        head = f"Step times in ms by rows: {points}; {facts}, seed {args.seed}, all served to the end."
        texts.append(f"### {name}\n\n{head} Times in seconds.\n")
        print(texts[-1], flush=True)
        for section in args.only or SECTIONS:
            texts.append(SECTIONS[section](base))
            print(texts[-1], flush=True)
    if args.out:
        (args.out / "scheduling-tables.md").write_text("\n".join(texts))
        plot(bases, args.out / "scheduling.svg")


if __name__ == "__main__":
    main()
