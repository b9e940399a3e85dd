"""How much of a device's time the host leaves to it: shares of a simulated device, layer by layer.

`python -m bench.device --rows 64 --step-ms 4 --size 32` prints rows per second as a share of what the device
could do, for

denoiser  `Denoiser.launch`, each step launched before the one before it is read
engine    `Engine.step`, without previews
previews  the same with previews of x₀, as many as a client gets by default
json      the service over HTTP, JSON, as many clients as fill a batch and a half
streams   the same with every client streaming

and what the processes of the last two took of a core meanwhile, the slowest answer of `/livez`, and the
memory of API and engine. `--only json,streams` and `--sampler ddpm` measure less; `--devices 2` has the
service run so many of them, and `--clients 1000` sends it more requests at once.

`python -m bench.device --serve PORT …` serves the real app over the device: unconditional, three channels.
Clients are bare sockets in a process of their own, on the same cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil

from bench.http import kept_busy, row_rate
from bench.servers import ROOT, free_port
from service.app import create_app
from service.engine.connection import ProcessConnection
from service.engine.messages import EngineConfig
from service.server import serve
from service.settings import Settings
from service.startup import bind

SAMPLERS = {"dpmpp_2m": 20, "ddpm": 50}
"""With their numbers of steps: the first draws no noise after its start, the second in every step."""
LAYERS = ("denoiser", "engine", "previews", "json", "streams")
HTTP = {"json": "application/json", "streams": "text/event-stream"}
"""The layers that are a process, by what their clients accept."""
QUEUE = 4096
WARM = "the simulated device is warm"
READY_S, STOP_S = 30.0, 30.0


@dataclass
class Service:
    """The service over the device, and its process."""

    url: str
    process: psutil.Process
    cores: dict[str, list[str]] = field(default_factory=dict)
    """What processes took of a core, by layer, in words: an entry for each sampler."""

    def rate(self, layer: str, sampler: str, clients: int, seconds: float) -> float:
        """Rows per second, kept busy over HTTP. Notes what it took."""
        body = {"sampler": sampler, "num_inference_steps": SAMPLERS[sampler]}
        with kept_busy(self.url, HTTP[layer], body, clients) as pid:
            watched = {"API": [self.process], "engine": self.process.children()}
            watched["clients"] = [psutil.Process(pid)]
            with ThreadPoolExecutor(1) as pool:
                probe = pool.submit(slowest_livez, self.url, seconds)
                before, begun = _cpu_s(watched), time.perf_counter()
                rate = row_rate(self.url, seconds)
                passed, after = time.perf_counter() - begun, _cpu_s(watched)
            held = [each.memory_info().rss / 2**20 for name in ("API", "engine") for each in watched[name]]
        shares = {
            name: " + ".join(
                f"{(end - start) / passed:.0%}" for start, end in zip(before[name], after[name], strict=True)
            )
            for name in watched
        }
        told = ", ".join(f"{name} {share}" for name, share in shares.items())
        told += f", /livez at most {probe.result() * 1e3:.0f} ms, " + " + ".join(
            f"{each:.0f}" for each in held
        )
        told += " MiB"
        self.cores.setdefault(layer, []).append(f"{sampler}: {told}")
        return rate


def slowest_livez(url: str, seconds: float) -> float:
    """The longest that `/livez` took to answer, asked twenty times a second."""
    slowest, end = 0.0, time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        with urlopen(f"{url}/livez", timeout=STOP_S) as answer:
            answer.read()
        slowest = max(slowest, time.perf_counter() - begun)
        time.sleep(0.05)
    return slowest


def await_ready(url: str) -> None:
    """Wait until `/readyz` says so. Raises RuntimeError if it never does."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with suppress(HTTPError), urlopen(f"{url}/readyz", timeout=READY_S):
            return
        time.sleep(0.05)
    raise RuntimeError("the service did not become ready")


def _cpu_s(processes: Mapping[str, Sequence[psutil.Process]]) -> dict[str, list[float]]:
    times = {name: [each.cpu_times() for each in some] for name, some in processes.items()}
    return {name: [each.user + each.system for each in some] for name, some in times.items()}


@contextmanager
def served(args: argparse.Namespace) -> Iterator[Service]:
    """The service over the device, once all its engines are warm. Raises RuntimeError if it never is."""
    port = free_port()
    command = [sys.executable, "-m", "bench.device", *_device(args), "--devices", str(args.devices)]
    with subprocess.Popen(
        [*command, "--serve", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as popen:
        try:
            assert popen.stdout is not None
            warm = sum(popen.stdout.readline().strip() == WARM for _ in range(args.devices))
            if warm < args.devices:
                raise RuntimeError("the service did not become ready")
            url = f"http://127.0.0.1:{port}"
            await_ready(url)  # the API has to hear of it
            yield Service(url, psutil.Process(popen.pid))
        finally:
            popen.terminate()
            popen.wait(STOP_S)


def _device(args: argparse.Namespace) -> list[str]:
    return ["--rows", str(args.rows), "--step-ms", str(args.step_ms), "--size", str(args.size)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown, or serve. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.device", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="rows of a network call")
    parser.add_argument("--step-ms", type=float, default=4.0, help="milliseconds it takes")
    parser.add_argument("--size", type=int, default=32, help="pixels per side, three channels")
    parser.add_argument("--clients", type=int, help="of the service; absent: a batch and a half")
    parser.add_argument("--devices", type=int, default=1, help="of the service, each with an engine")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--only", type=_layers, default=LAYERS, help=f"layers to measure: {','.join(LAYERS)}")
    parser.add_argument("--sampler", action="append", choices=SAMPLERS, help="to measure; repeatable")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the app over the device instead")
    parser.add_argument("--engine", metavar="FD", help="be an engine of that, which talks to it here")
    args = parser.parse_args(arguments)
    if args.engine is not None:
        _be_engine(args)
    if args.serve is not None:
        return _serve(args)
    samplers = args.sampler or list(SAMPLERS)
    found: dict[str, list[float]] = {}
    cores: dict[str, list[str]] = {}
    if inner := [layer for layer in args.only if layer not in HTTP]:
        found |= _inner(args, samplers, inner)
    if outer := [layer for layer in args.only if layer in HTTP]:
        clients = args.clients or args.rows * args.devices * 3 // 2
        with served(args) as service:
            for layer in outer:
                title = {"json": "JSON over HTTP", "streams": "every client streaming"}[layer]
                found[f"{title}, {clients} clients"] = [
                    service.rate(layer, sampler, clients, args.seconds) / args.devices for sampler in samplers
                ]
            cores = service.cores
    could = args.rows / (args.step_ms / 1000)
    devices = f"each of {args.devices} devices' " if args.devices > 1 else ""
    print(f"{args.rows} rows in {args.step_ms:g} ms, 3×{args.size}×{args.size}: share of {devices}", end="")
    print(f"{could:,.0f} rows/s\n")
    print("||" + "|".join(f"{sampler}, {SAMPLERS[sampler]} steps" for sampler in samplers) + "|")
    print("|---" + "|--:" * len(samplers) + "|")
    for title, rates in found.items():
        print(f"|{title}|" + "|".join(f"{rate / could:.0%}" for rate in rates) + "|")
    for layer, told in cores.items():
        print(f"\nof a core, {layer}: " + "; ".join(told))
    return 0


def _layers(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(LAYERS):
        raise argparse.ArgumentTypeError(f"no such layer: {', '.join(sorted(unknown))}")
    return [layer for layer in LAYERS if layer in chosen]


def _inner(
    args: argparse.Namespace, samplers: Sequence[str], layers: Sequence[str]
) -> dict[str, list[float]]:
    """Rows per second of the layers that need no process of their own, for each sampler."""
    from bench.simulated import build, denoiser_rate, engine_rate, model_of  # with torch
    from service.engine.process import tune

    tune()

    engine = build(model_of(args.size), args.rows, args.step_ms / 1000, EngineConfig("", slots=QUEUE)).engine
    seconds = args.seconds
    measures: dict[str, tuple[str, Callable[[str, int], float]]] = {
        "denoiser": ("`Denoiser.launch`", lambda name, steps: denoiser_rate(engine, name, steps, seconds)),
        "engine": (
            "`Engine.step`, no previews",
            lambda name, steps: engine_rate(engine, name, steps, "none", seconds),
        ),
        "previews": (
            "`Engine.step`, x₀ previews",
            lambda name, steps: engine_rate(engine, name, steps, "x0", seconds),
        ),
    }
    return {
        title: [measure(sampler, SAMPLERS[sampler]) for sampler in samplers]
        for title, measure in (measures[layer] for layer in layers)
    }


def _serve(args: argparse.Namespace) -> int:
    # Room for many idle clients; a stream that its client leaves is let go at once.
    devices = ",".join(f"cuda:{i}" for i in range(args.devices))  # which only count
    settings = Settings(_env_file=None, port=args.serve, device=devices, max_queue=QUEUE, stream_grace_s=0.0)
    command = (sys.executable, "-m", "bench.device", *_device(args), "--engine")
    app = create_app(settings, lambda config: ProcessConnection(config, command))
    return serve(app, app.state.ddpm, settings, bind(settings.host, settings.port))


def _be_engine(args: argparse.Namespace) -> None:
    """Run as an engine; does not return."""
    from bench.simulated import build, model_of  # with torch
    from model.checkpoint import Checkpoint
    from service.engine import process
    from service.engine.warmup import Warm

    def warm(model: Checkpoint, config: EngineConfig) -> Warm:
        engine = build(model, args.rows, args.step_ms / 1000, config)
        print(WARM, flush=True)
        return engine

    process.main(lambda fd: process.run(fd, lambda _: model_of(args.size), warm), [args.engine])


if __name__ == "__main__":
    sys.exit(main())
