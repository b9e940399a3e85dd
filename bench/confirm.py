"""Does the real service do what the simulation says of it?

`python -m bench.confirm docs` takes the service's cases from comparison.json there, simulates the very same
requests under the same policy, with the batch size and the step times that the service measured at its start,
and prints both side by side, and the simulation's peer, which batches equal step counts and runs them to
their end. The simulation knows nothing of HTTP, of pictures, and of clients on the cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.load import Figures, figures
from bench.simulate import table
from bench.simulation import POLICIES, Case, curve_of, jobs_of
from bench.workload import trace

HEADER = (
    "workload|load|policy|latency: mean|p95|p99|simulated: mean|p95|p99"
    "|simulated peer: mean|p95|p99|first preview: mean|p95|simulated: mean|p95|ETA off by: median|p95"
)


def policy_of(found: Mapping[str, Any]) -> str:
    """The policy of a case."""
    variant = found["server"].partition("/")[2]
    return variant if variant in POLICIES else "remaining"


def simulated(
    found: Mapping[str, Any], content: Mapping[str, Any], policy: str = ""
) -> tuple[Figures, Figures]:
    """(latency, time to the first step) of a case's requests, in seconds of the virtual clock.

    policy: another than the case's; `peer` at its own usual batch size.
    """
    curve, info = curve_of(found["info"]), found["info"]
    size = 0 if policy == "peer" else info["limits"]["max_batch"]
    case = Case(curve, found["workload"], policy or policy_of(found), size)
    rate = found["load"] * content["capacity"]["rows_per_s"]
    requests = trace(found["workload"], rate, found["requests"], content["terms"]["seed"])
    outcomes = case.drive(jobs_of(requests))
    latency = figures(outcome.latency for outcome in outcomes)
    first = figures(outcome.first - outcome.created for outcome in outcomes)
    assert latency
    assert first
    return latency, first


def row(found: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    """Lay out a case beside its simulation."""
    latency, first = simulated(found, content)
    peer, _ = simulated(found, content, "peer")
    real, preview, eta = found["latency"], found["first_preview"], found["eta_error_share"]
    return [
        found["workload"],
        str(found["load"]),
        policy_of(found),
        *(f"{values[name]:.2f}" for values in (real, latency, peer) for name in ("mean", "p95", "p99")),
        *(f"{values[name]:.3f}" for values in (preview, first) for name in ("mean", "p95")),
        *(f"{eta[name]:.0%}" for name in ("p50", "p95")),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.confirm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where comparison.json lies")
    content = json.loads((parser.parse_args(arguments).folder / "comparison.json").read_text())
    cases = [found for found in content["cases"] if found.get("info") and found.get("first_preview")]
    cases = [found for found in cases if found["load"] is not None]
    cases.sort(key=lambda found: (found["workload"], found["load"]))
    print(table("Measured and simulated, in seconds", HEADER, [row(found, content) for found in cases]))


if __name__ == "__main__":
    main()
