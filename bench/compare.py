"""Our service and other servers side by side, under the same loads on the same machine, one at a time.

`python -m bench.compare --out docs` measures the machine's capacity, then runs every server, workload and
load (hours), and writes comparison.json, comparison.md and comparison.svg there. What is in the file
already is not run again, so it can be stopped and resumed at any time. `--quick` is a small version of
everything, in minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from bench import report
from bench.load import Endpoint, drive, summarise
from bench.machine import describe
from bench.servers import NAMES, ROOT, Model, ServerError, find, running
from bench.workload import MAX_IMAGES, MEAN_EVALUATIONS, WORKLOADS, Request, trace

LOADS = (0.7, None, 0.3, 0.5, 0.9, 1.1, 1.5)  # the most important first; None: all at once
BURST_PATIENCE_S = 600.0
FAIR_PACE = 0.85
"""Below this share of the capacity a case would measure the machine's other guests."""
PATIENCE_FOR_PACE = 20


@dataclass(frozen=True)
class Case:
    """One server under one load, as a share of capacity; None: a burst, everything at once.

    Only a burst measures a server's throughput: no client gives up, so everything that it computes counts.
    """

    server: str
    workload: str
    load: float | None


@dataclass(frozen=True)
class Terms:
    """What all cases have in common; a file of results holds cases of one kind only.

    seconds: of a trace on average. patience_s: how long a client waits. seed: of the trace. burst_s: of
    capacity, requested at once.
    """

    model: str
    runtime: str
    dtype: str
    seconds: float
    patience_s: float
    seed: int
    burst_s: float = 20.0

    def requests(self, case: Case, capacity: float) -> list[Request]:
        """The trace of a case."""
        rate = capacity if case.load is None else case.load * capacity
        seconds = self.burst_s if case.load is None else self.seconds
        arrivals = max(1, round(rate * seconds / MEAN_EVALUATIONS[case.workload]))
        requests = trace(case.workload, rate, arrivals, self.seed)
        return [replace(each, created=0.0) for each in requests] if case.load is None else requests

    def patience(self, case: Case) -> float:
        """How long a client waits, in seconds."""
        return BURST_PATIENCE_S if case.load is None else self.patience_s


class TermsError(ValueError):
    """A file holds results on other terms."""


class Results:
    """A JSON file that is whole at any time: terms, machine, capacity, and the cases so far."""

    def __init__(self, path: Path, terms: Terms) -> None:
        self.path = path
        self.content: dict[str, Any] = {"terms": asdict(terms), "cases": []}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["terms"] != asdict(terms):
                raise TermsError(f"{path} holds results on other terms: {self.content['terms']}")

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the file has under a name; made and kept when it has nothing."""
        if name not in self.content:
            self.content[name] = make()
            self._write()
        found: dict[str, Any] = self.content[name]
        return found

    def has(self, case: Case) -> bool:
        """Whether the case is done; one that went wrong is not."""
        return any(_is(found, case) and "error" not in found for found in self.content["cases"])

    def add(self, case: Case, figures: dict[str, Any]) -> None:
        """Keep a case, in place of an earlier try."""
        others = [found for found in self.content["cases"] if not _is(found, case)]
        self.content["cases"] = [*others, {**asdict(case), **figures}]
        self._write()

    def _write(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def _is(found: dict[str, Any], case: Case) -> bool:
    return {name: found[name] for name in asdict(case)} == asdict(case)


def measure_capacity(terms: Terms, seconds: float) -> dict[str, Any]:
    """Run `bench.capacity` in a process of its own, which leaves nothing behind in this one."""
    options = ["--model", terms.model, "--runtime", terms.runtime, "--dtype", terms.dtype]
    command = [sys.executable, "-m", "bench.capacity", *options, "--seconds", str(seconds), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def warm(endpoint: Endpoint, patience_s: float) -> None:
    """Request every number of images, guided and not, one step each, first one by one, then all at once.

    A runtime compiles every batch size when it first sees it, and an adaptive batcher has to see some.
    """
    requests = [Request(0.0, 1, n, guided) for guided in (False, True) for n in range(1, MAX_IMAGES + 1)]
    for together in (*([each] for each in requests), requests):
        asyncio.run(drive(endpoint, together, patience_s))


def run(case: Case, terms: Terms, capacity: float) -> dict[str, Any]:
    """Start the server, warm it up, put the load on it, stop it. A failure is reported under `error`.

    Before that the capacity is measured again, briefly: a shared machine is not always as fast.
    """
    pace = steady(lambda: float(measure_capacity(terms, 0.5)["rows_per_s"]) / capacity)
    requests = terms.requests(case, capacity)
    kind, pipeline = find(case.server)
    model = Model(Path(terms.model), terms.runtime, terms.dtype)
    try:
        with running(kind, model.environment(pipeline)) as server:
            warm(server.endpoint, terms.patience_s)
            server.watch.reset()
            answers = asyncio.run(drive(server.endpoint, requests, terms.patience(case)))
            usage = server.watch.usage()
            ready_s, info = server.ready_s, server.info() if kind.ours else None
    except ServerError as error:
        return {"error": str(error)}
    evaluations = sum(request.evaluations for request in requests)
    offered = None if case.load is None else evaluations / requests[-1].created
    return {
        "pace": pace,
        "offered": offered,
        "ready_s": ready_s,
        "info": info,
        **asdict(summarise(answers)),
        "usage": asdict(usage),
    }


def steady(measure: Callable[[], float], wait: Callable[[float], None] = time.sleep) -> float:
    """The machine's pace, once it is no longer slowed down by others; the last one when that does not end."""
    pace = measure()
    for _ in range(PATIENCE_FOR_PACE):
        if pace >= FAIR_PACE:
            break
        wait(30.0)
        pace = measure()
    return pace


def cases(servers: Sequence[str], workloads: Sequence[str], loads: Sequence[float | None]) -> Iterator[Case]:
    """All of them, load by load, so that whatever is there when it is stopped can be compared."""
    for load, workload, server in product(loads, workloads, servers):
        yield Case(server, workload, load)


def _load(text: str) -> float | None:
    return None if text == "burst" else float(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the results")
    parser.add_argument("--model", default="weights/fashion-mnist", help="model folder")
    parser.add_argument("--runtime", default="auto", help="of our service and of the peers that run it")
    parser.add_argument("--dtype", default="auto", help="the same")
    parser.add_argument("--server", action="append", choices=NAMES, help="repeatable; all by default")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="repeatable; all by default")
    parser.add_argument("--load", action="append", type=_load, help="share of capacity, or burst; repeatable")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals in a case")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds that a client waits")
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--quick", action="store_true", help="seconds of arrivals and one load")
    args = parser.parse_args(arguments)
    if args.quick:
        args.seconds, args.load = min(args.seconds, 5.0), args.load or [0.7]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the report."""
    args = parse(arguments)
    terms = Terms(args.model, args.runtime, args.dtype, args.seconds, args.patience, args.seed)
    if args.quick:
        terms = replace(terms, burst_s=2.0)
    try:
        results = Results(args.out / "comparison.json", terms)
    except TermsError as error:
        sys.exit(str(error))
    results.once("machine", describe)
    capacity = results.once("capacity", lambda: measure_capacity(terms, 0.2 if args.quick else 5.0))
    print(f"capacity: {capacity['rows_per_s']:.0f} rows/s at {capacity['batch_size']} rows", flush=True)
    for case in cases(args.server or NAMES, args.workload or WORKLOADS, args.load or LOADS):
        if results.has(case):
            continue
        print(f"{case.server}, {case.workload}, {report.title(case.load)}: ", end="", flush=True)
        figures = run(case, terms, capacity["rows_per_s"])
        results.add(case, figures)
        print(report.line(figures), flush=True)
    report.write(results.content, args.out)


if __name__ == "__main__":
    main()
