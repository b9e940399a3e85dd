"""What waiting costs: the scheduler's time per step, and memory, as the number of waiting requests grows.

`python -m bench.growth` fills the service's scheduler with 10 … 100,000 requests of the mixed workload, half
of which have had a step, and times a step's own work (choosing, committing, drawing no previews) and an
arrival with its time to completion. The share is that of a step of the shipped network at the width that the
service chooses, timed in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from service.scheduler import Policy, Scheduler, StepTimes
from service.streams import Stream
from service.warmup import warm_up

from bench.simulation import draw, jobs_of, request
from bench.workload import trace
from model import checkpoint
from service.settings import Settings

WAITING = (10, 1_000, 100_000)
POLICIES: tuple[Policy, ...] = ("remaining", "fifo", "sharing")


def filled(policy: Policy, width: int, waiting: int) -> Scheduler:
    """A scheduler with so many requests of the mixed workload, half of which have had a step."""
    under = Scheduler(width, StepTimes([(1, 0.01), (width, 0.02)]), policy)
    for place, job in enumerate(jobs_of(trace("mix", 1.0, waiting, seed=0))):
        job.preview = "x0"
        under.add(job, 0.0)
        if place == waiting // 2:
            for _ in range(waiting // 2):
                under.commit(under.schedule(0.0), 0.0, draw)
    return under


def timed(action: Callable[[], object], times: int = 300) -> float:
    """Median seconds."""
    taken = []
    for _ in range(times):
        begun = perf_counter()
        action()
        taken.append(perf_counter() - begun)
    return median(taken)


def costs(policy: Policy, width: int, waiting: int) -> tuple[float, float]:
    """Median seconds of a step's own work and of an arrival."""
    under = filled(policy, width, waiting)
    arrivals = iter([request(f"late{i}", 0.0, 50, 4, 2) for i in range(300)])

    def step() -> None:
        under.commit(under.schedule(0.0), 0.0, draw)

    return timed(step), timed(lambda: under.add(next(arrivals), 0.0))


def size_of(make: Callable[[int], object], many: int = 10_000) -> float:
    """Bytes that one of many costs."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = [make(i) for i in range(many)]
    size = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    tracemalloc.stop()
    return size


def sizes(width: int) -> tuple[float, float]:
    """Bytes per waiting request of one image (job, chain and the scheduler's entries), and per stream."""
    under = Scheduler(width, StepTimes([(1, 0.01)]))
    loop = asyncio.new_event_loop()
    per_request = size_of(lambda i: under.add(request(str(i), 0.0, 50), 0.0))
    per_stream = size_of(lambda i: Stream(str(i), loop, None))
    loop.close()
    return per_request, per_stream


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--waiting", type=int, nargs="*", default=WAITING, help="requests")
    args = parser.parse_args(arguments)
    warm = warm_up(checkpoint.load(args.model), Settings(_env_file=None))
    width = warm.engine.scheduler.max_rows
    seconds = dict(warm.step_times)[width]
    print(f"A step of the network has {width} rows and takes {seconds * 1e3:.1f} ms.\n")
    print("|policy|requests waiting|scheduler per step|share of a step|arrival|")
    print("|---|--:|--:|--:|--:|")
    for policy in POLICIES:
        for waiting in args.waiting:
            step, arrival = costs(policy, width, waiting)
            times = f"{step * 1e6:.0f} µs|{step / seconds:.2%}|{arrival * 1e6:.0f} µs"
            print(f"|{policy}|{waiting:,}|{times}|", flush=True)
    per_request, per_stream = sizes(width)
    print(f"\n{per_request:,.0f} bytes per waiting request of one image, {per_stream:,.0f} per stream.")


if __name__ == "__main__":
    main()
