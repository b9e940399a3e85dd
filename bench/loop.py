"""What the service adds to the bare network: rows per second at saturation, side by side.

`python -m bench.loop` measures in rotation, for seconds each and a dozen rounds,

runtime   the network alone, called again and again at the service's batch size
denoiser  whole steps: noise, network, guidance, table; each queued before the one before it is read
engine    the scheduler around it
json      the service, API and engine processes, kept busy over HTTP by clients who want JSON
streams   the same with clients who watch previews

and prints the medians of each, and of its share of the first. Clients run on the same cores, and their
time counts against the last two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter

from bench.http import saturate
from bench.roofline import inputs
from bench.servers import SERVICE, Model, Server, running
from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser
from model.samplers import build_plan
from model.state import Row
from service.engine.engine import Engine
from service.engine.jobs import JobSpec, Stage
from service.engine.messages import AbortAll, AddJob, EngineConfig
from service.engine.process import tune
from service.engine.warmup import warm_up

CLIENTS = 6
IMAGES = 4
STEPS = 50


def per_second(action: Callable[[], int], seconds: float) -> float:
    """Rows per second of an action that returns how many it computed."""
    rows, begun = 0, perf_counter()
    while perf_counter() - begun < seconds:
        rows += action()
    return rows / (perf_counter() - begun)


def steps_per_second(denoiser: Denoiser, rows: Sequence[Row], seconds: float) -> float:
    """Rows per second of a step that is made again and again, the next one queued before one is read."""
    flight = denoiser.launch([replace(row, step=0) for row in rows])  # so that the samples have begun

    def step() -> int:
        nonlocal flight
        before, flight = flight, denoiser.launch(rows)
        before.read()
        return len(rows)

    rate = per_second(step, seconds)
    flight.read()
    return rate


def engine_per_second(
    engine: Engine, next_job: Callable[[], JobSpec], in_flight: int, seconds: float
) -> float:
    """Rows per second of an engine that always has so many jobs. Leaves it idle."""

    def step() -> int:
        while len(engine.scheduler) < in_flight:
            engine.handle(AddJob(next_job()))
        report = engine.step()
        return report.batch_size if report is not None else 0

    rate = per_second(step, seconds)
    engine.handle(AbortAll())
    while not engine.idle:
        engine.step()
    return rate


def contenders(
    model: Checkpoint, engine: Engine, sampler: str, seconds: float, server: Server
) -> dict[str, Callable[[], float]]:
    """What to measure, by name: each gives rows per second."""
    denoiser = engine.denoiser
    assert isinstance(denoiser, Denoiser)
    batch_size = engine.scheduler.max_batch_size
    plan = build_plan(model.schedule, sampler, STEPS)
    label = 0 if denoiser.conditional else None
    chains = [Chain(plan, seed, label) for seed in range(batch_size)]
    rows = [Row(chain, slot, 1) for slot, chain in enumerate(chains)]
    batch = inputs(model, batch_size)

    def network() -> int:
        denoiser.runtime.forward(*batch)
        return batch_size

    numbers = count()

    def next_job() -> JobSpec:
        return JobSpec(f"job{next(numbers)}", sampler, (Stage("denoise", tuple(chains[:IMAGES])),))

    body = {"n": IMAGES, "num_inference_steps": STEPS, "sampler": sampler, "class_label": label}
    body |= {"guidance_scale": 1.0}
    url = server.endpoint.url.removesuffix("/generate")
    return {
        "runtime": lambda: per_second(network, seconds),
        "denoiser": lambda: steps_per_second(denoiser, rows, seconds),
        "engine": lambda: engine_per_second(engine, next_job, CLIENTS, seconds),
        "json": lambda: saturate(url, "application/json", body, seconds, CLIENTS),
        "streams": lambda: saturate(url, "text/event-stream", body, seconds, CLIENTS),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.loop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"))
    parser.add_argument("--sampler", default="ddim", help="ddpm draws noise in every step, ddim in none")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args(arguments)
    model = checkpoint.load(args.model)
    tune()
    engine = warm_up(model, EngineConfig(model=str(args.model))).engine
    environment = {**Model(args.model).environment("ours"), "DDPM_STREAM_GRACE_S": "0"}
    environment["DDPM_MAX_BATCH"] = str(engine.scheduler.max_batch_size)  # the same batch size for all
    with running(SERVICE, environment) as server:
        measures = contenders(model, engine, args.sampler, args.seconds, server)
        rates: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(args.rounds):
            for name, measure in measures.items():
                rates[name].append(measure())
    print(f"{engine.scheduler.max_batch_size} rows a step\n")
    print("||rows/s|of the runtime alone in the same round|min and max|")
    print("|---|--:|--:|---|")
    for name, found in rates.items():
        shares = [rate / alone for rate, alone in zip(found, rates["runtime"], strict=True)]
        spread = f"{min(shares):.1%} … {max(shares):.1%}"
        print(f"|{name}|{median(found):.0f}|{median(shares):.1%}|{spread}|")


if __name__ == "__main__":
    main()
