"""What waiting costs: the scheduler's time per step, and memory, as the number of waiting requests grows.

`python -m bench.growth` fills the service's scheduler with 10 … 100,000 requests of the mixed workload, half
of which have had a step, and times a step's own work (choosing, committing, the ETA that every preview has)
and an arrival with its ETA. The share is that of a step of the shipped network at the batch size that the
service chooses, timed in the same run.
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from bench.simulation import job_of, jobs_of
from bench.workload import trace
from model import checkpoint
from service.engine.estimates import StepTimes
from service.engine.messages import EngineConfig
from service.engine.scheduler import Policy, Scheduler
from service.engine.streams import Stream
from service.engine.warmup import warm_up

WAITING = (10, 1_000, 100_000)
POLICIES: tuple[Policy, ...] = ("remaining", "fifo", "sharing")


def filled(policy: Policy, batch_size: int, waiting: int) -> Scheduler:
    """A scheduler with so many requests of the mixed workload, half of which have had a step."""
    scheduler = Scheduler(batch_size, StepTimes([(1, 0.01), (batch_size, 0.02)]), policy)
    for place, job in enumerate(jobs_of(trace("mix", 1.0, waiting, seed=0))):
        scheduler.add(job, 0.0)
        if place == waiting // 2:
            for _ in range(waiting // 2):
                step(scheduler)
    return scheduler


def step(scheduler: Scheduler) -> None:
    """The scheduler's part of a step after which every advanced job is due a preview."""
    for job in scheduler.commit(scheduler.schedule(0.0).samples):
        scheduler.eta(job)
        if scheduler.stage_done(job):
            scheduler.finish(job)


def timed(action: Callable[[], object], times: int = 300) -> float:
    """Median seconds."""
    taken = []
    for _ in range(times):
        begun = perf_counter()
        action()
        taken.append(perf_counter() - begun)
    return median(taken)


def costs(policy: Policy, batch_size: int, waiting: int) -> tuple[float, float]:
    """Median seconds of a step's own work and of an arrival."""
    scheduler = filled(policy, batch_size, waiting)
    arrivals = iter([job_of(f"late{i}", 0.0, 50, 4, 2) for i in range(300)])
    return timed(lambda: step(scheduler)), timed(lambda: scheduler.add(next(arrivals), 0.0))


def size_of(make: Callable[[int], object], many: int = 10_000) -> float:
    """Bytes that one of many costs."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = [make(i) for i in range(many)]
    size = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    tracemalloc.stop()
    return size


def sizes(batch_size: int) -> tuple[float, float]:
    """Bytes per waiting request of one image (job, chain and the scheduler's entries), and per stream."""
    scheduler = Scheduler(batch_size, StepTimes([(1, 0.01)]))
    per_request = size_of(lambda i: scheduler.add(job_of(str(i), 0.0, 50), 0.0))
    per_stream = size_of(lambda i: Stream(str(i), None))
    return per_request, per_stream


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--waiting", type=int, nargs="*", default=WAITING, help="requests")
    args = parser.parse_args(arguments)
    warm = warm_up(checkpoint.load(args.model), EngineConfig(model=str(args.model)))
    batch_size = warm.info.max_batch_size
    seconds = dict(warm.info.step_times)[batch_size]
    print(f"A step of the network has {batch_size} rows and takes {seconds * 1e3:.1f} ms.\n")
    print("|policy|requests waiting|scheduler per step|share of a step|arrival|")
    print("|---|--:|--:|--:|--:|")
    for policy in POLICIES:
        for waiting in args.waiting:
            per_step, arrival = costs(policy, batch_size, waiting)
            times = f"{per_step * 1e6:.0f} µs|{per_step / seconds:.2%}|{arrival * 1e6:.0f} µs"
            print(f"|{policy}|{waiting:,}|{times}|", flush=True)
    per_request, per_stream = sizes(batch_size)
    print(f"\n{per_request:,.0f} bytes per waiting request of one image, {per_stream:,.0f} per stream.")


if __name__ == "__main__":
    main()
