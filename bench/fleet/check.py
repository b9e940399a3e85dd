"""The simulation beside the real service: the same requests, one simulated device and two.

Two devices are two engines behind one API, which gives each request to the engine with the least remaining
work: `known work` in the simulation. A device takes the same time for every step (`bench.overload`'s), so the
curve is known, and what differs is HTTP, Python, and the machine. `--serve PORT` is the service itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import psutil

from bench.fleet.arrivals import arrivals
from bench.fleet.simulation import Fleet, simulate
from bench.load import Answer, Endpoint, drive
from bench.overload import ask
from bench.servers import ROOT, free_port
from bench.simulate import table
from service.app import create_app
from service.engine.connection import ProcessConnection
from service.server import serve
from service.settings import Settings
from service.startup import bind

ROWS, STEP_MS = 8, 25.0
CURVE = ((1, STEP_MS / 1000), (ROWS, STEP_MS / 1000))
PATIENCE_S, START_S, STOP_S = 120.0, 120.0, 30.0
LONGEST = 250
"""Steps; a chain of 1000 would take 25 s, and run for a while after the last arrival."""
LOADS = (0.7, 1.1)
"""Of the capacity, were the longest chains not left out."""


def check(duration_s: float) -> str:
    """Run both. Returns a table of their latencies, and the errors of the simulation."""
    rows: list[Sequence[object]] = []
    before = os.getloadavg()[0]
    for devices in (1, 2):
        fleet = Fleet(CURVE, devices, "known work", max_batch_size=ROWS)
        with served(devices) as url:
            for load in LOADS:
                drawn = arrivals(load * devices * fleet.capacity, duration_s, seed=devices)
                requests = [each for each in drawn if each.steps <= LONGEST]
                psutil.cpu_percent()
                measured = latencies(asyncio.run(drive(Endpoint(f"{url}/generate"), requests, PATIENCE_S)))
                busy = f"{psutil.cpu_percent():.0f} %"
                simulated = simulate(fleet, requests).latency.tolist()
                share = sum(each.evaluations for each in requests) / duration_s / devices / fleet.capacity
                rows.append([devices, f"{share:.2f}", len(requests), *compared(measured, simulated), busy])
    header = (
        "devices|load|requests|mean: measured|simulated|error|p50: measured|simulated|error"
        "|p95: measured|simulated|error|machine busy"
    )
    return table(f"check: load average before {before:.1f}, {os.cpu_count()} cores", header, rows)


def latencies(answers: Sequence[Answer]) -> list[float]:
    """Seconds, in order. Raises RuntimeError where one has not succeeded."""
    failed = [answer for answer in answers if answer.result != "done"]
    if failed:
        raise RuntimeError(f"{len(failed)} failed, the first: {failed[0].result} {failed[0].error}")
    return [answer.latency_s for answer in answers]


def compared(measured: Sequence[float], simulated: Sequence[float]) -> list[str]:
    """Measured, simulated and the error, a share of what was measured: of mean, p50 and p95."""
    found = []
    both = np.array([measured, simulated])
    for real, virtual in (both.mean(axis=1), *np.percentile(both, (50, 95), axis=1)):
        found += [f"{real:.2f}", f"{virtual:.2f}", f"{virtual / real - 1:+.0%}"]
    return found


def wait_until_ready(popen: subprocess.Popen[bytes], url: str) -> None:
    """Wait for a service, and for its other engines or replicas. Raises RuntimeError if it never is ready."""
    limit = time.monotonic() + START_S
    while ask(url, "/readyz") == float("inf"):
        if popen.poll() is not None or time.monotonic() > limit:
            raise RuntimeError("the service did not become ready")
        time.sleep(0.2)
    time.sleep(3.0)


@contextmanager
def served(devices: int, rows: int = ROWS, step_ms: float = STEP_MS) -> Iterator[str]:
    """The service over so many devices, once it is ready. Raises RuntimeError if it never is."""
    port = free_port()
    device = "--devices", str(devices), "--rows", str(rows), "--step-ms", str(step_ms)
    command = [sys.executable, "-m", "bench.fleet.check", *device, "--serve", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as popen:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(popen, url)
            yield url
        finally:
            popen.terminate()
            popen.wait(STOP_S)


def main() -> int:
    """Serve. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.fleet.check")
    parser.add_argument("--serve", type=int, required=True, metavar="PORT")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--step-ms", type=float, default=STEP_MS)
    args = parser.parse_args()
    names = ",".join(f"cuda:{place}" for place in range(args.devices))  # which only count
    settings = Settings(_env_file=None, port=args.serve, device=names, max_queue=4096)
    device = "--rows", str(args.rows), "--step-ms", str(args.step_ms)
    command = (sys.executable, "-m", "bench.overload", *device, "--engine")
    app = create_app(settings, lambda config: ProcessConnection(config, command))
    return serve(app, app.state.ddpm, settings, bind(settings.host, settings.port))


if __name__ == "__main__":
    sys.exit(main())
