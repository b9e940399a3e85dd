"""What the service adds to the bare network: rows per second at saturation, side by side.

`python -m bench.loop` measures in rotation, for seconds each and a dozen rounds,

runtime   the network alone, called again and again at the service's batch size
denoiser  whole steps: noise, network, guidance, table
engine    the scheduler and the commit around it
json      the service as a process, kept busy over HTTP by clients who want JSON
streams   the same with clients who watch previews of every second step

and prints the medians of each, and of its share of the first. Clients run on the same cores, and their
time counts against the last two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.roofline import inputs
from bench.servers import SERVICE, Model, Server, running
from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser
from model.samplers import build_plan
from service.engine.engine import Engine
from service.engine.jobs import JobSpec, Stage
from service.engine.messages import AddJob
from service.engine.warmup import warm_up
from service.settings import Settings

CLIENTS = 6
IMAGES = 4
STEPS = 50


def per_second(action: Callable[[], int], seconds: float) -> float:
    """Rows per second of an action that returns how many it computed."""
    rows, begun = 0, perf_counter()
    while perf_counter() - begun < seconds:
        rows += action()
    return rows / (perf_counter() - begun)


async def request(url: httpx.URL, accept: str, body: dict[str, object]) -> None:
    """Send a request and read its answer to the end, as cheaply as can be: the cores are the network's.

    Raises RuntimeError for an answer that is not a success.
    """
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {url.host}\r\nAccept: {accept}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        writer.write(head.encode() + content)
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            raise RuntimeError(status.decode(errors="replace"))
        while await reader.read(1 << 16):
            pass
    finally:
        writer.close()


async def saturate(
    url: str, accept: str, body: dict[str, object], seconds: float, clients: int = CLIENTS
) -> float:
    """Rows per second that the service counts while clients keep it busy, after a second of that."""
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, verify=False) as client:

        async def keep_requesting() -> None:
            while True:
                await request(client.base_url, accept, body)

        async def metric(name: str) -> float:
            families = text_string_to_metric_families((await client.get("/metrics")).text)
            samples = [sample for family in families for sample in family.samples]
            return next(sample.value for sample in samples if sample.name == name)

        requesting = [asyncio.create_task(keep_requesting()) for _ in range(clients)]
        await asyncio.sleep(1.0)
        before, begun = await metric("ddpm_batch_rows_sum"), perf_counter()
        await asyncio.sleep(seconds)
        rate = (await metric("ddpm_batch_rows_sum") - before) / (perf_counter() - begun)
        for task in requesting:
            if task.done():
                task.result()  # a client that failed says why
            task.cancel()
        await asyncio.gather(*requesting, return_exceptions=True)
        while await metric("ddpm_samples_running") + await metric("ddpm_samples_waiting"):
            pass  # cancelled requests are in flight for another step
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
    latents = [denoiser.start(chain) for chain in chains]
    batch = inputs(model, batch_size)

    def network() -> int:
        denoiser.runtime.forward(*batch)
        return batch_size

    def step() -> int:
        denoiser.step(chains, latents, [0] * batch_size)
        return batch_size

    numbers = count()

    def engine_step() -> int:
        while len(engine.scheduler) < CLIENTS:
            stage = Stage("denoise", tuple(chains[:IMAGES]))
            engine.handle(AddJob(JobSpec(f"job{next(numbers)}", sampler, (stage,))))
        report = engine.step()
        return report.batch_size if report is not None else 0

    body = {"n": IMAGES, "num_inference_steps": STEPS, "sampler": sampler, "class_label": label}
    body |= {"guidance_scale": 1.0}
    url = server.endpoint.url.removesuffix("/generate")
    return {
        "runtime": lambda: per_second(network, seconds),
        "denoiser": lambda: per_second(step, seconds),
        "engine": lambda: per_second(engine_step, seconds),
        "json": lambda: asyncio.run(saturate(url, "application/json", body, seconds)),
        "streams": lambda: asyncio.run(saturate(url, "text/event-stream", body, seconds)),
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
    engine = warm_up(model, Settings(_env_file=None)).engine
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
