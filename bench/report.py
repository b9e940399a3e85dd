"""The comparison's results as Markdown tables and a plot.

`python -m bench.report docs` reads comparison.json there and writes comparison.md and comparison.svg
beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.servers import NAMES
from bench.simulate import table
from bench.workload import WORKLOADS

Case = Mapping[str, Any]

HOW = """\
Open loop: Poisson arrivals from a seeded trace (`bench/workload.py`) are sent at their scheduled times,
whatever the state of earlier requests, and latency is counted from the scheduled time.
Load 1 is the capacity: {capacity:.0f} rows of network calls a second, which a bare loop over
the runtime ({runtime}, {dtype}) reaches at its best batch size of {rows} rows on this machine;
*all at once* is a burst of {burst:.0f} s of that, whose clients wait until it is done. One server at
a time, restarted and warmed up for every row; clients and server share the machine. `service` is
this repository's, with every client streaming; with `/json` clients get a single answer, as from every
other server; with `/fifo` and `/sharing` it has another policy. A peer runs over diffusers as
documented, or over this repository's own runtime (`/ours`). Arrivals last {seconds:.0f} s on average, and
clients wait at most {patience:.0f} s. Times in seconds; rows/s count the completed requests.
"""
LEGEND = """\
≥: some requests timed out; they count with the time the client waited, so the figure is a lower bound,
and the case was ended there. *rejected*: 429 or 503. *CPU*: cores that the server kept busy on
average. *memory*: peak resident memory, including child processes. *ETA error*: median and p95 of the error
of the estimated completion time, as a share of the actual time. *pace*: the machine's capacity just before
the case, as a share of the capacity above; other guests share its processor.
"""
HEADER = (
    "server|requests|offered rows/s|done rows/s|mean|p50|p95|p99|first byte p50|first preview p50 / p95"
    "|ETA error|rejected|failed|timed out|CPU|memory (MB)|pace"
)


def number(figures: Mapping[str, float] | None, name: str, bound: bool = False) -> str:
    """Format one of a quantity's figures; a dash when there are none."""
    if not figures:
        return "–"
    return ("≥ " if bound else "") + f"{figures[name]:.2f}"


def row(case: Case) -> list[str]:
    """Lay out a case as a line of its table."""
    if "error" in case:
        reason = case["error"].splitlines()[0]
        return [case["server"], f"did not start: {reason}", *[""] * (HEADER.count("|") - 1)]
    latency = [number(case["latency"], name, case["timeouts"] > 0) for name in ("mean", "p50", "p95", "p99")]
    preview, eta = case["first_preview"], case["eta_error_share"]
    usage = case["usage"]
    return [
        case["server"],
        str(case["requests"]),
        "–" if case["offered"] is None else f"{case['offered']:.0f}",
        f"{case['rows_per_s']:.0f}",
        *latency,
        number(case["first_byte"], "p50"),
        f"{number(preview, 'p50')} / {number(preview, 'p95')}" if preview else "–",
        f"{100 * eta['p50']:.0f} % / {100 * eta['p95']:.0f} %" if eta else "–",
        *(str(case[result]) for result in ("rejected", "failed", "timeouts")),
        f"{usage['cpu_s'] / usage['seconds']:.1f}",
        f"{usage['peak_bytes'] / 1e6:.0f}",
        f"{case['pace']:.2f}",
    ]


def line(case: Case) -> str:
    """A case in a few words, for the terminal."""
    if "error" in case:
        return str(case["error"])
    bound = case["timeouts"] > 0
    lost = ", ".join(
        f"{case[result]} {result}" for result in ("rejected", "failed", "timeouts") if case[result]
    )
    latency = f"p50 {number(case['latency'], 'p50', bound)} s, p95 {number(case['latency'], 'p95', bound)} s"
    return f"{case['done']} of {case['requests']}, {case['rows_per_s']:.0f} rows/s, {latency}" + (
        lost and f", {lost}"
    )


def title(load: float | None) -> str:
    """Name a load."""
    return "all at once" if load is None else f"load {load}"


def _by_server(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: NAMES.index(case["server"]))


def saturation(cases: Sequence[Case], capacity: float) -> str:
    """Lay out the rows per second of each server when all requests come at once."""
    rows = []
    for server in dict.fromkeys(case["server"] for case in _by_server(cases)):
        cells = []
        for workload in WORKLOADS:
            done = [
                case["rows_per_s"]
                for case in cases
                if (case["server"], case["workload"], case["load"]) == (server, workload, None)
                and "error" not in case
            ]
            cells += [f"{each:.0f} ({100 * each / capacity:.0f} %)" for each in done] or ["–"]
        rows.append([server, *cells])
    header = "|".join(["server", *WORKLOADS])
    return table("Rows per second, all requests at once (share of capacity)", header, rows)


def markdown(content: Mapping[str, Any]) -> str:
    """Lay out everything: the machine, how it was measured, and a table for each workload and load."""
    machine, terms, capacity = content["machine"], content["terms"], content["capacity"]
    cases = content["cases"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    parts = [
        "# Comparison with other servers\n",
        "Generated by `python -m bench.report` from `comparison.json`.\n",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}, "
        f"Python {machine['python']}; {versions}.\n",
        HOW.format(
            capacity=capacity["rows_per_s"],
            rows=capacity["batch_size"],
            runtime=capacity["runtime"],
            dtype=capacity["dtype"],
            seconds=terms["seconds"],
            patience=terms["patience_s"],
            burst=terms["burst_s"],
        ),
        "![p95 latency over load](comparison.svg)\n",
        saturation(cases, capacity["rows_per_s"]),
        LEGEND,
    ]
    for workload in WORKLOADS:
        loads = {case["load"] for case in cases if case["workload"] == workload}
        for load in sorted(loads, key=lambda load: (load is None, load)):
            here = [case for case in cases if (case["workload"], case["load"]) == (workload, load)]
            parts.append(table(f"{workload}, {title(load)}", HEADER, map(row, _by_server(here))))
    errors = [
        f"- {case['server']}, {case['workload']}, {title(case['load'])}: `{' '.join(error.split())[:200]}`"
        for case in _by_server(cases)
        for error in case.get("errors", ())
    ]
    if errors:
        parts += ["#### Errors\n", "\n".join(errors) + "\n"]
    return "\n".join(parts)


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Draw p95 over the load, a panel for each workload; dashed over diffusers, solid over our runtime.

    Dotted: variants of our service.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "comparison"  # the same bytes every time
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(WORKLOADS), figsize=(12, 5), layout="constrained")
    peers = list(dict.fromkeys(name.partition("/")[0] for name in NAMES))
    for panel, workload in zip(axes, WORKLOADS, strict=True):
        for server in NAMES:
            points = sorted(
                (case["load"], case["latency"]["p95"])
                for case in content["cases"]
                if (case["server"], case["workload"]) == (server, workload)
                and case["load"] is not None
                and case.get("latency")
            )
            if not points:
                continue
            peer, _, pipeline = server.partition("/")
            lines = {"diffusers": "--", "ours": "-", "": "-"}
            style: dict[str, Any] = {"linestyle": lines.get(pipeline, ":"), "marker": "o"}
            width = 3 if server == "service" else 1
            loads, p95 = zip(*points, strict=True)
            panel.semilogy(
                loads,
                p95,
                label=server,
                color=f"C{peers.index(peer)}",
                linewidth=width,
                markersize=3,
                **style,
            )
        panel.set(title=workload, xlabel="load (share of capacity)", ylabel="p95 latency (s)")
        panel.grid(alpha=0.3)
    handles, labels = max(
        (panel.get_legend_handles_labels() for panel in axes), key=lambda found: len(found[1])
    )
    if labels:
        figure.legend(handles, labels, loc="outside right center")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(content: Mapping[str, Any], folder: Path) -> None:
    """Write comparison.md and comparison.svg."""
    (folder / "comparison.md").write_text(markdown(content))
    plot(content, folder / "comparison.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a folder's results."""
    parser = argparse.ArgumentParser("python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where comparison.json lies")
    folder = parser.parse_args(arguments).folder
    write(json.loads((folder / "comparison.json").read_text()), folder)


if __name__ == "__main__":
    main()
