"""How much of a device's time the host leaves to it: shares of a simulated device, layer by layer.

`python -m bench.device --rows 64 --step-ms 4 --size 32` prints rows per second as a share of what the device
could do, for

denoiser  `Denoiser.step`
engine    `Engine.step`, without previews and with one of every second step
json      the service over HTTP, JSON, as many clients as fill a batch and a half
streams   the same with every client streaming

`python -m bench.device --serve PORT …` serves the real app over the device: unconditional, three channels.
Clients are bare sockets on the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count

import httpx
import torch

from bench.loop import per_second, saturate
from bench.servers import ROOT, free_port
from bench.soak import tiny_model
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser
from model.runtimes.simulated import SimulatedRuntime
from model.samplers import build_plan
from service.app import create_app
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import AddJob, EngineInfo, Invariance
from service.engine.scheduler import Scheduler
from service.engine.warmup import Warm
from service.server import serve
from service.settings import Settings

SAMPLERS = {"dpmpp_2m": 20, "ddpm": 50}
"""With their numbers of steps: the first draws no noise after its start, the second in every step."""
START_S = 60.0


def build(rows: int, step_s: float, size: int) -> tuple[Checkpoint, Warm]:
    """A model whose network is never run, and an engine over the simulated device in its place."""
    model = tiny_model(size, channels=3)
    runtime = SimulatedRuntime(rows, step_s)
    denoiser = Denoiser.of(model, runtime)
    times = ((1, step_s), (rows, step_s))
    engine = Engine(denoiser, Scheduler(rows, StepTimes(times)))
    invariance = Invariance((), 0.0)  # x / 2 cannot depend on other rows
    info = EngineInfo(model.name, runtime.name, "cpu", runtime.dtype, rows, times, invariance)
    return model, Warm(engine, info)


def denoiser_rate(engine: Engine, sampler: str, seconds: float) -> float:
    """Rows per second of full steps."""
    denoiser, rows = engine.denoiser, engine.scheduler.max_batch_size
    assert isinstance(denoiser, Denoiser)
    schedule = denoiser.schedule
    assert schedule is not None
    plan = build_plan(schedule, sampler, SAMPLERS[sampler])
    chains = [Chain(plan, seed) for seed in range(rows)]
    latents = [denoiser.start(chain) for chain in chains]

    def step() -> int:
        denoiser.step(chains, latents, [0] * rows)
        return rows

    return per_second(step, seconds)


def engine_rate(engine: Engine, sampler: str, preview: PreviewKind, seconds: float) -> float:
    """Rows per second of the engine, kept busy by jobs of one image."""
    assert isinstance(engine.denoiser, Denoiser)
    assert engine.denoiser.schedule is not None
    plan = build_plan(engine.denoiser.schedule, sampler, SAMPLERS[sampler])
    numbers = count()

    def step() -> int:
        while len(engine.scheduler) < engine.scheduler.max_batch_size * 3 // 2:
            number = next(numbers)
            stage = Stage("denoise", (Chain(plan, number),))
            job = JobSpec(
                f"{sampler}-{preview}-{number}", sampler, (stage,), preview=preview, preview_every=2
            )
            engine.handle(AddJob(job))
        report = engine.step()
        return report.batch_size if report is not None else 0

    return per_second(step, seconds)


def served(args: argparse.Namespace, port: int) -> subprocess.Popen[bytes]:
    """The service over the device as a process, once it is ready. Raises RuntimeError if it never is."""
    size = ["--rows", str(args.rows), "--step-ms", str(args.step_ms), "--size", str(args.size)]
    command = [sys.executable, "-m", "bench.device", "--serve", str(port), *size]
    popen = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and popen.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return popen
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    popen.kill()
    popen.wait()
    raise RuntimeError("the service did not become ready")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown, or serve. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.device", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="rows of a network call")
    parser.add_argument("--step-ms", type=float, default=4.0, help="milliseconds it takes")
    parser.add_argument("--size", type=int, default=32, help="pixels per side, three channels")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the app over the device instead")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, warm = build(args.rows, args.step_ms / 1000, args.size)
    if args.serve is not None:
        return _serve(model, warm, args.serve)
    could = args.rows / (args.step_ms / 1000)
    port = free_port()
    popen = served(args, port)
    shares: dict[str, list[float]] = {}
    try:
        for sampler in SAMPLERS:
            for name, measure in _measures(warm.engine, sampler, port, args).items():
                shares.setdefault(name, []).append(measure() / could)
    finally:
        popen.terminate()
        popen.wait(30)
    print(
        f"{args.rows} rows in {args.step_ms:g} ms, 3×{args.size}×{args.size}: share of {could:,.0f} rows/s\n"
    )
    print("||" + "|".join(f"{sampler}, {steps} steps" for sampler, steps in SAMPLERS.items()) + "|")
    print("|---" + "|--:" * len(SAMPLERS) + "|")
    for name, found in shares.items():
        print(f"|{name}|" + "|".join(f"{share:.0%}" for share in found) + "|")
    return 0


def _measures(
    engine: Engine, sampler: str, port: int, args: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    url, seconds, clients = f"http://127.0.0.1:{port}", args.seconds, args.rows * 3 // 2
    body: dict[str, object] = {"sampler": sampler, "num_inference_steps": SAMPLERS[sampler]}

    def over_http(accept: str) -> float:
        return asyncio.run(saturate(url, accept, body, seconds, clients))

    return {
        "`Denoiser.step`": lambda: denoiser_rate(engine, sampler, seconds),
        "`Engine.step`, no previews": lambda: engine_rate(engine, sampler, "none", seconds),
        "`Engine.step`, x₀ previews": lambda: engine_rate(engine, sampler, "x0", seconds),
        f"JSON over HTTP, {clients} clients": lambda: over_http("application/json"),
        f"every client streaming, {clients} clients": lambda: over_http("text/event-stream"),
    }


def _serve(model: Checkpoint, warm: Warm, port: int) -> int:
    # Room for many idle clients; a stream that its client leaves is let go at once.
    settings = Settings(_env_file=None, port=port, max_queue=4096, stream_grace_s=0.0)
    app = create_app(model, settings, lambda _model, _settings: warm)
    return serve(app, app.state.ddpm, settings)


if __name__ == "__main__":
    sys.exit(main())
