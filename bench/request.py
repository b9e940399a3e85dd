"""What a request costs in the API process: CPU time with an engine that answers at once.

`python -m bench.request` serves the real app over such an engine, on each event loop and by each HTTP parser,
keeps it busy by a few connections that stay open, and prints the processor time of the server's
process per request: an image as JSON, the same as a PNG, and a stream of `queued`, one `preview` and
`completed`. `--parts` prints what single parts of a JSON answer take, each called again and again.

The engine hands over the same picture each time: a smooth one, as the model's are.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import httpx
import numpy as np
import psutil
import uvicorn

from bench.servers import ROOT, free_port
from model.schedule import NoiseSchedule, linear_betas
from service.app import create_app
from service.engine.jobs import JobSpec
from service.engine.messages import (
    AddJob,
    Command,
    Drain,
    EngineInfo,
    Event,
    Finished,
    Invariance,
    Load,
    ModelInfo,
    Picture,
    Preview,
    Progress,
    Queued,
    Ready,
    Report,
    StepReport,
    Stopped,
)
from service.http.bodies import bodies_of
from service.http.negotiation import choose_media_type
from service.http.state import capabilities_of
from service.protocol import HttpProtocol
from service.server import DrainingServer
from service.settings import Settings
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.images import encode
from service.telemetry import Telemetry

KINDS = {"JSON": "application/json", "PNG": "image/png", "stream": "text/event-stream"}
LOOPS = ("asyncio", "uvloop")
PARSERS = ("h11", "httptools")
CLIENTS = 4
ROUNDS = 5
START_S = 60.0
BODY: dict[str, object] = {"seed": 7, "num_inference_steps": 20}


class InstantEngine:
    """Finishes every job when it is told of it. The picture is [size, size, channels] and always the same."""

    def __init__(self, size: int, channels: int) -> None:
        self.pixels = smooth(size, channels)
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        info = EngineInfo("instant", "none", "cpu", "float32", 8, ((1, 0.001),), Invariance((), 0.0))
        self._reports.put_nowait(Ready(info, model_of(size, channels)))

    def send(self, command: Command) -> None:
        """Report the events of a new job, all of them."""
        match command:
            case AddJob(spec):
                events = self.events(spec)
                self._reports.put_nowait(Progress(StepReport(events, 1, 1), Load()))
            case Drain():
                self._reports.put_nowait(Stopped(failed=False))
                self._reports.put_nowait(None)

    def events(self, spec: JobSpec) -> list[Event]:
        """All that happens to a job."""
        chains, pixels = list(enumerate(spec.stages[-1].chains)), self.pixels
        shown = tuple(Picture(i, c.seed, "x0", pixels) for i, c in chains)
        finished = Finished(spec.id, shown, 0.0, 0.0)
        previews = [Preview(spec.id, 1, 20, 951, 0.0, shown)] if spec.preview != "none" else []
        return [Queued(spec.id, 0, 0.0), *previews, finished]

    async def receive(self) -> Report | None:
        """The next report."""
        return await self._reports.get()

    def kill(self) -> None:
        """It ends."""
        self._reports.put_nowait(None)

    async def wait(self) -> int:
        """It has ended well."""
        return 0


def model_of(size: int, channels: int) -> ModelInfo:
    """A model that nobody runs."""
    return ModelInfo(
        name="instant",
        schedule=NoiseSchedule(linear_betas(1000)),
        shape=(channels, size, size),
        class_names=(),
        conditional=False,
        guided=False,
        classified=False,
        typicality=None,
        parameters=0,
    )


def smooth(size: int, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A picture that compresses about as a model's does: waves with a little noise."""
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(6 * x + c) + np.cos(5 * y - c) for c in range(channels)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 3, waves.shape)
    return np.clip(127.5 + 50 * waves + noise, 0, 255).astype(np.uint8)


def serve(args: argparse.Namespace) -> None:
    """Serve the app over an instant engine until terminated."""
    settings = Settings(_env_file=None, port=args.serve, max_queue=4096, stream_grace_s=0.0)
    app = create_app(settings, lambda _: InstantEngine(args.size, args.channels))
    http = HttpProtocol if args.http == "httptools" else args.http
    config = uvicorn.Config(
        app, port=args.serve, loop=args.loop, http=http, log_config=None, access_log=False
    )
    DrainingServer(config, app.state.ddpm, 1.0).run()


def served(args: argparse.Namespace, loop: str, http: str) -> tuple[subprocess.Popen[bytes], int]:
    """A server process, once it is ready, and its port. Raises RuntimeError if it never is."""
    port = free_port()
    flags = {"serve": port, "loop": loop, "http": http, "size": args.size, "channels": args.channels}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    popen = subprocess.Popen([sys.executable, "-m", "bench.request", *words], cwd=ROOT)
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and popen.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                return popen, port
        except httpx.TransportError:
            time.sleep(0.1)
    popen.kill()
    popen.wait()
    raise RuntimeError("the service did not become ready")


async def keep_requesting(port: int, accept: str, count: list[int]) -> None:
    """Send requests over one connection for ever, counting the answers. Raises RuntimeError for a refusal."""
    content = json.dumps(BODY).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: {accept}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    message = head.encode() + content
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            writer.write(message)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b" 200 " not in answer.partition(b"\r\n")[0]:
                raise RuntimeError(answer.decode())
            if b"content-length: " in answer:
                await reader.readexactly(int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0]))
            else:
                while (size := int(await reader.readline(), 16)) > 0:
                    await reader.readexactly(size + 2)
                await reader.readline()
            count[0] += 1
    finally:
        writer.close()


async def cost(popen: subprocess.Popen[bytes], port: int, accept: str, seconds: float) -> tuple[float, float]:
    """(µs of the process per request, requests per second), after a quarter of a second of warming up."""
    process, count = psutil.Process(popen.pid), [0]
    clients = [asyncio.create_task(keep_requesting(port, accept, count)) for _ in range(CLIENTS)]
    await asyncio.sleep(0.25)
    before, begun, used = count[0], time.perf_counter(), sum(process.cpu_times()[:2])
    await asyncio.sleep(seconds)
    answered, took = count[0] - before, time.perf_counter() - begun
    used = sum(process.cpu_times()[:2]) - used
    for client in clients:
        if client.done():
            client.result()  # one that failed says why
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return used / answered * 1e6, answered / took


def servers(args: argparse.Namespace) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Costs by (loop, parser) and kind of answer, in rotation, so that a slow minute is everybody's."""
    running = {f"{loop}, {http}": served(args, loop, http) for loop in LOOPS for http in PARSERS}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {kind: [] for kind in KINDS} for name in running
    }
    try:
        for _ in range(ROUNDS):
            for name, (popen, port) in running.items():
                for kind, accept in KINDS.items():
                    found[name][kind].append(asyncio.run(cost(popen, port, accept, args.seconds)))
    finally:
        for popen, _ in running.values():
            popen.terminate()
            popen.wait(30)
    return found


def parts(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What a JSON answer is made of, by name."""
    model = model_of(args.size, args.channels)
    capabilities = capabilities_of(model, Settings(_env_file=None))
    body = json.dumps(BODY)
    request = GenerateRequest.model_validate_json(body)
    prepared = prepare_generate(request, capabilities)
    spec: JobSpec = prepared.spec
    engine = InstantEngine(args.size, args.channels)
    result = engine.events(spec)[-1]
    assert isinstance(result, Finished)
    bodies, telemetry = bodies_of(prepared), Telemetry()
    picture = encode(engine.pixels, "png", {**prepared.parameters, "model": model.name})
    content = bodies.completed(result, model.name)

    def counted() -> None:
        telemetry.requests.labels("/generate", "2xx").inc()
        telemetry.request_duration.labels("/generate").observe(0.1)

    found: dict[str, Callable[[], object]] = {
        "parse the body": lambda: json.loads(body),
        "validate it": lambda: GenerateRequest.model_validate({**BODY}),
        "choose the media type": lambda: choose_media_type("application/json"),
        "`prepare_generate`": lambda: prepare_generate(request, capabilities),
        "PNG without parameters": lambda: encode(engine.pixels, "png"),
        "PNG with parameters": lambda: encode(engine.pixels, "png", prepared.parameters),
        "base64": lambda: base64.b64encode(picture).decode(),
        "the body of the answer, PNG included": lambda: bodies.completed(result, model.name),
        "`json.dumps`": lambda: json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode(),
        "two metrics, looked up by their labels": counted,
        "a random id": lambda: secrets.token_hex(8),
    }
    return found


def per_call(action: Callable[[], object], seconds: float) -> float:
    """Microseconds, the median of batches."""
    times, give_up = [], time.perf_counter() + seconds
    while time.perf_counter() < give_up:
        begun = time.perf_counter()
        for _ in range(50):
            action()
        times.append((time.perf_counter() - begun) / 50)
    return median(times) * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables as Markdown, or serve."""
    parser = argparse.ArgumentParser("python -m bench.request", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--parts", action="store_true", help="the parts of an answer instead")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the app instead")
    parser.add_argument("--loop", default="auto", help="of the served app: asyncio or uvloop")
    parser.add_argument("--http", default="auto", help="of the served app: h11 or httptools")
    args = parser.parse_args(arguments)
    if args.serve is not None:
        serve(args)
    elif args.parts:
        print("|part|µs|\n|---|--:|")
        for name, action in parts(args).items():
            print(f"|{name}|{per_call(action, args.seconds):.1f}|")
    else:
        print("||" + "|".join(f"{kind}, µs|{kind}/s" for kind in KINDS) + "|")
        print("|---" + "|--:|--:" * len(KINDS) + "|")
        for name, kinds in servers(args).items():
            cells = [
                f"{median(c for c, _ in all_):.0f}|{median(r for _, r in all_):.0f}"
                for all_ in kinds.values()
            ]
            print(f"|{name}|" + "|".join(cells) + "|")


if __name__ == "__main__":
    main()
