"""Routing, autoscaling and the cost of the front, on a real Ray Serve over simulated devices.

`python -m bench.fleet.real` prints the tables; `--only routing` one of them. The same requests for each way,
one after another in rounds, on devices of 8 rows in 25 ms: everything but the device's own time is real.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from bench.fleet.arrivals import Flash, arrivals
from bench.fleet.check import LONGEST, PATIENCE_S, ROWS, STEP_MS, latencies, served, wait_until_ready
from bench.http import saturate
from bench.load import Endpoint, drive
from bench.servers import ROOT, free_port
from bench.simulate import table
from bench.workload import Request

CAPACITY = ROWS / (STEP_MS / 1000)
STOP_S = 60.0
LOADS = (0.7, 0.95)
CLIENTS, STEPS, FAST_ROWS, FAST_MS = 96, 20, 64, 10.0
WAYS = {
    "random by hash": ("--routing", "hash"),
    "Ray's default": ("--routing", "ray"),
    "ours": ("--routing", "sessions"),
    "by work, 10 s": ("--routing", "work"),
    "by work, 1 s": ("--routing", "work", "--report-s", "1"),
    "ours, HAProxy": ("--routing", "sessions", "--haproxy"),
}


@contextmanager
def on_ray(*arguments: str) -> Iterator[str]:
    """The URL of a fleet, once it is ready. Raises RuntimeError if it never is."""
    port = free_port()
    given = [each for each in arguments if each != "--haproxy"]
    env = {
        **os.environ,
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if "--haproxy" in arguments else "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "DDPM_ACCESS_LOG": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "bench.fleet.on_ray", str(port), *given]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as popen:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(popen, url)
            yield url
        finally:
            whole = psutil.Process(popen.pid).children(recursive=True)
            assert popen.stdin is not None
            popen.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                popen.wait(STOP_S)
            psutil.wait_procs(whole, timeout=STOP_S)


def figures(values: Sequence[float]) -> list[str]:
    """Mean, p50 and p95, in seconds."""
    found = np.array(values)
    return [f"{each:.2f}" for each in (found.mean(), *np.percentile(found, (50, 95)))]


def drawn(load: float, duration_s: float, seed: int, **shape: Any) -> list[Request]:
    """Requests for devices of CAPACITY; `load` of one of them."""
    found = arrivals(load * CAPACITY, duration_s, seed=seed, **shape)
    return [each for each in found if each.steps <= LONGEST]


def sent(url: str, requests: Sequence[Request]) -> list[float]:
    """Seconds that each took. Raises RuntimeError where one has failed."""
    return latencies(asyncio.run(drive(Endpoint(f"{url}/generate"), requests, PATIENCE_S)))


def routing(duration_s: float, rounds: int) -> str:
    """Two replicas, by who chooses between them."""
    found: dict[tuple[str, float], list[float]] = {}
    for seed in range(rounds):
        for name, arguments in WAYS.items():
            with on_ray(*arguments) as url:
                for load in LOADS:
                    found.setdefault((name, load), []).extend(sent(url, drawn(2 * load, duration_s, seed)))
        with served(2) as url:
            for load in LOADS:
                one = found.setdefault(("one process, 2 devices", load), [])
                one.extend(sent(url, drawn(2 * load, duration_s, seed)))
    rows = [
        [name, load, len(each), *figures(each)] for (name, load), each in sorted(found.items(), key=_place)
    ]
    return table(f"routing: {rounds} rounds of {duration_s:.0f} s", "router|load|requests|mean|p50|p95", rows)


def _place(item: tuple[tuple[str, float], list[float]]) -> tuple[float, int]:
    (name, load), _ = item
    return load, [*WAYS, "one process, 2 devices"].index(name)


@dataclass
class Watch:
    """Counts replicas while a trace runs: seconds of them, and the most."""

    url: str
    seconds: float = 0.0
    most: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(1.0):
            number, now = replicas(self.url), time.monotonic()
            self.seconds += number * (now - last)
            self.most, last = max(self.most, number), now


def samples(url: str) -> Iterator[Sample]:
    """All metrics that there are."""
    with urlopen(f"{url}/metrics", timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            yield from family.samples


def replicas(url: str) -> int:
    """How many replicas have metrics."""
    return len({sample.labels.get("replica") for sample in samples(url)})


def scaling(duration_s: float, rounds: int) -> str:
    """A flash crowd on one to three replicas, by what their number follows."""
    rows = []
    for name in ("requests", "work"):
        times: list[float] = []
        seconds, most = 0.0, 0
        for seed in range(rounds):
            crowd = Flash(duration_s / 4, duration_s / 4)
            with on_ray("--scaling", name) as url, Watch(url) as watch:
                times += sent(url, drawn(0.5, duration_s, seed, rate=crowd))
            seconds, most = seconds + watch.seconds, max(most, watch.most)
        rows.append([name, len(times), *figures(times), most, f"{seconds / rounds:.0f}"])
    header = "follows|requests|mean|p50|p95|most replicas|replica-seconds"
    return table(
        f"scaling: {rounds} rounds of {duration_s:.0f} s, four times the load in its second quarter",
        header,
        rows,
    )


def cost(duration_s: float, rounds: int) -> str:
    """What one fast device delivers to clients that ask again at once."""
    ways: dict[str, list[float]] = {"service alone": [], "Ray": [], "Ray, HAProxy": []}
    device = "--rows", str(FAST_ROWS), "--step-ms", str(FAST_MS)
    body = {"num_inference_steps": STEPS, "sampler": "dpmpp_2m"}
    for _ in range(rounds):
        for name, found in ways.items():
            flag = ("--haproxy",) if "HAProxy" in name else ()
            ray = on_ray("--replicas", "1", *device, *flag)
            with served(1, FAST_ROWS, FAST_MS) if name == "service alone" else ray as url:
                found.append(saturate(url, "application/json", body, duration_s, CLIENTS))
    most = FAST_ROWS / FAST_MS * 1000
    rows = []
    for name, found in ways.items():
        each = " ".join(f"{rate:.0f}" for rate in found)
        rows.append([name, f"{np.median(found):.0f}", f"{np.median(found) / most:.0%}", each])
    device_s = f"{FAST_ROWS} rows in {FAST_MS:.0f} ms"
    title = f"cost: {device_s}, {CLIENTS} clients, {rounds} rounds of {duration_s:.0f} s"
    return table(title, "through|rows/s|of the device|each", rows)


SECTIONS = {"routing": routing, "scaling": scaling, "cost": cost}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the chosen tables."""
    parser = argparse.ArgumentParser(
        "python -m bench.fleet.real", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a table; repeatable")
    parser.add_argument("--duration", type=float, default=40.0, metavar="S", help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(arguments)
    for name, section in SECTIONS.items():
        if not args.only or name in args.only:
            print(section(args.duration, args.rounds), flush=True)


if __name__ == "__main__":
    main()
