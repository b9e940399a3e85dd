"""Policies and batch sizes compared: tables and a plot over simulated runs.

`python -m bench.simulate` prints every table as Markdown (minutes); `--only sizes` one of them; `--quick` a
small version of all, in seconds; `--out docs` also writes scheduling-tables.md and scheduling.svg there;
`--curve info.json` takes the step times that a running service's /info reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np

from bench.promises import PATIENCE, deadline_rows, eta_rows
from bench.shares import GREEDY, contests
from bench.simulation import (
    CURVES,
    POLICIES,
    Case,
    Curve,
    Outcome,
    job_of,
    jobs_of,
    plan_of,
    read_curve,
    run,
)
from bench.workload import WORKLOADS, trace
from service.engine.estimates import StepTimes

LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2)
INTERVALS = {2: "2", 4: "4", 8: "8", 16: "16", 64: "64", 10**9: "no FIFO steps"}


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
        kept = [[o for o in done if of in (0, len(o.plan))] for done in runs]
        names = [*(getattr(case, name) for name in label.split()), *([of, len(kept[0])] if of else [])]
        rows.append([*names, *(" / ".join(cells(outcomes, shown)) for outcomes in kept if outcomes)])
    names = [name.replace("_", " ") for name in label.split()]
    header = [*names, *(["steps", "requests"] if steps[0] else []), *POLICIES]
    return table(f"{title}: {shown.replace(' ', ' / ')}", "|".join(header), rows)


def policies(base: Case) -> str:
    """Everything about every policy at one load."""
    shown, rows = "mean p50 p95 p99 first firstp95", []
    for case in (replace(base, workload=w, policy=p) for w in WORKLOADS for p in POLICIES):
        done = run(case)
        rate = sum(o.evaluations for o in done) / (max(o.ended for o in done) - done[0].created)
        last = worst(done, case.curve), f"{rate / case.capacity:.3f}"
        rows.append([case.workload, case.policy, case.max_batch_size, *cells(done, shown), *last])
    header = (
        "workload|policy|batch size|mean|p50|p95|p99|first step mean|first step p95|worst slowdown|throughput"
    )
    return table(f"policies, load {base.load}", header, rows)


def loads(base: Case) -> str:
    """Compare the policies over the load."""
    cases = (replace(base, workload=w, load=x) for w in WORKLOADS for x in LOADS)
    return grid("loads", cases, "workload load", "mean p95")


def sizes(base: Case) -> str:
    """Compare the policies at equal batch sizes."""
    cases = (replace(base, workload=w, batch_size=size) for w in WORKLOADS for size, _ in base.curve[1:])
    return grid(f"sizes, load {base.load}", cases, "workload batch_size", "mean p95 p99")


def classes(base: Case) -> str:
    """Show who pays, by the steps of the request."""
    return grid(f"classes, load {base.load}", [base], "workload", "mean p99 p100", steps=(20, 50, 250))


def intervals(base: Case) -> str:
    """Vary how often a step goes in order of arrival, at the given load and above capacity."""
    rows = []
    for case in (replace(base, load=x, fifo_interval=n) for x in (base.load, 1.2) for n in INTERVALS):
        done, times = run(case), StepTimes(case.curve)
        nearest = max(o.latency / o.bound(case.max_batch_size, case.fifo_interval, times) for o in done)
        shown = *cells(done, "mean p95 p99 p100"), worst(done, case.curve), f"{nearest:.3f}"
        rows.append([case.load, INTERVALS[case.fifo_interval], *shown])
    header = "load|fifo_interval|mean|p95|p99|p100|worst slowdown|largest latency / bound"
    return table("intervals, mix", header, rows)


def starvation(base: Case) -> str:
    """Show a large job amid small ones at 1.2 of capacity, which arrive for 1.5 times its bound."""
    rows, rate = [], 1.2 * base.capacity / 20
    for images, steps in ((64, 50), (1, 250)) if base.arrivals > 100 else ((4, 50),):
        times = StepTimes(base.curve)
        alone = Outcome(0.0, plan_of(steps), images, images * steps, steps, 1)
        stream = 1.5 * alone.bound(base.max_batch_size, 8, times)
        remaining = [replace(base, fifo_interval=n) for n in INTERVALS]
        for case in remaining + [replace(base, policy=p) for p in POLICIES[1:]]:
            requests = trace("uniform", 50 * rate, int(stream * rate), base.seed)
            small = jobs_of(replace(each, steps=20) for each in requests)
            large, *others = case.drive([job_of("large", 0.0, steps, images), *small])
            shown = f"{large.latency:.1f}", f"{stream:.1f}", len(others), worst([large], case.curve)
            name = case.policy
            if name == "remaining":
                limit = large.bound(case.max_batch_size, case.fifo_interval, times)
                name += f", {INTERVALS[case.fifo_interval]}" + (f", bound {limit:.1f}" if limit < 1e6 else "")
            rows.append([f"{images}×{steps}", name, *shown, *cells(others, "mean")])
    header = "large|policy, fifo_interval|latency|stream|small|slowdown|mean of the small"
    return table("starvation", header, rows)


def behind(base: Case) -> str:
    """Show one image (50 steps) that is requested when 64 others are a tenth done."""
    rows, sizes = [], sorted({base.max_batch_size, 4, 16})
    for case in (replace(base, policy=p, batch_size=size) for p in POLICIES for size in sizes):
        both = [(0.0, 64), (320 / case.capacity, 1)]
        runs = ([job_of(str(n), at, 50, n) for at, n in some] for some in (both[1:], both, both[:1]))
        (one,), (with_one, after), (many,) = map(case.drive, runs)
        times = (f"{o.latency:.2f}" for o in (one, after, many, with_one))
        rows.append([case.policy, case.batch_size, *times])
    header = "policy|batch size|1 image alone|behind 64|64 images alone|with 1 arriving"
    return table("behind", header, rows)


def clients(base: Case) -> str:
    """Show single images of one client beside another that asks for all slots, without shares and with."""
    rows = []
    for name, contest, done in contests(base):
        waits = [asked.ended - asked.sent for asked in done if asked.ended < inf]
        refused = sum(asked.refusals > 0 for asked in done)
        served = sum(asked.ended < inf for asked in done)
        rate = sum(contest.rows.values()) / contest.now / base.capacity
        part = contest.rows[GREEDY] / sum(contest.rows.values())
        shown = ["–"] * 4
        if waits:
            shown = [f"{np.mean(waits):.2f}", *(f"{np.percentile(waits, q):.2f}" for q in (50, 95, 100))]
        rows.append([name, len(done), served, refused, *shown, f"{part:.2f}", f"{rate:.2f}"])
    header = (
        "the modest client|requests|served|refused at first|mean|p50|p95|p100|the other's rows|throughput"
    )
    return table("clients", header, rows)


def etas(base: Case) -> str:
    """Compare what is announced at a request's arrival with what comes about."""
    header = "load|policy|accepted|late: p5|p50|p95|actual / announced: p5|p50|p95|mean error|mean latency"
    return table("etas, mix, 256 slots", header, eta_rows(base))


def deadlines(base: Case) -> str:
    """Show what accepting deadlines together saves."""
    header = (
        "load|deadlines looked at|requests|no slots|refused|accepted, not met|met|evaluations computed|"
        "of these for requests that were in time"
    )
    return table(
        f"deadlines of {PATIENCE[0]} to {PATIENCE[1]} times the request's time, mix",
        header,
        deadline_rows(base),
    )


SECTIONS = {
    made.__name__: made
    for made in (policies, loads, sizes, classes, intervals, starvation, behind, clients, etas, deadlines)
}


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
            panel.semilogy(LOADS, p95, line, label=f"{policy}, batch size {case.max_batch_size}")
        panel.set(title=f"{name}, {workload}", xlabel="load (share of capacity)", ylabel="p95 latency (s)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser("python -m bench.simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curve", action="append", help="cpu, gpu or a file with /info's answer; repeatable")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a table; repeatable")
    parser.add_argument("--load", type=float, default=0.7, help="share of capacity, where a table has one")
    parser.add_argument("--batch-size", type=int, default=0, help="most rows of a step (0: the curve's knee)")
    parser.add_argument("--arrivals", type=int, default=1000, help="requests of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--quick", action="store_true", help="20 arrivals, and a small large job")
    parser.add_argument("--out", type=Path, help="folder for scheduling-tables.md and scheduling.svg")
    args = parser.parse_args(arguments)
    arrivals = 20 if args.quick else args.arrivals
    usual = Case((), batch_size=args.batch_size, load=args.load, arrivals=arrivals, seed=args.seed)
    bases = {}
    for name in args.curve or CURVES:
        curve = CURVES[name] if name in CURVES else read_curve(Path(name))
        bases[Path(name).stem] = replace(usual, curve=curve)
    texts = []
    for name, base in bases.items():
        points = ", ".join(f"{size}: {seconds * 1e3:.1f}" for size, seconds in base.curve)
        facts = f"capacity {base.capacity:.0f} rows/s; usual batch size {base.max_batch_size}"
        runs = f"{arrivals} arrivals a run, seed {args.seed}, all served to completion"
        head = f"Step times in ms by batch size: {points}; {facts}; {runs}. Times in seconds."
        texts.append(f"### {name}\n\n{head}\n")
        print(texts[-1], flush=True)
        for section in args.only or SECTIONS:
            texts.append(SECTIONS[section](base))
            print(texts[-1], flush=True)
    if args.out:
        (args.out / "scheduling-tables.md").write_text("\n".join(texts))
        plot(bases, args.out / "scheduling.svg")


if __name__ == "__main__":
    main()
