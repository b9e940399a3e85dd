"""The service beyond what it can do: `python -m bench.overload` prints what it keeps to, and the aims.

rate         twice as many requests as its capacity, measured before, for --seconds, each sent when it is due
             whatever became of those before it. Every client streams, so that it has an estimate.
held         1,000 streams that wait, and 1,000 clients that never finish their request, all at once
descriptors  the service under `ulimit -n 256`, and more connections than that
shares       a client that asks for all there is beside a modest one, with a key each and with one for both

meanwhile `/livez` and `/metrics` are asked again and again. The device is simulated (`bench.device`), so that
the network does not compete with the clients for cores. Exits with 1 where an aim is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import numpy as np
import psutil

from bench.greedy import contest
from bench.http import metric, saturate
from bench.load import Answer, Endpoint, drive, summarise
from bench.servers import ROOT, free_port
from bench.workload import trace
from service.app import create_app
from service.engine.connection import ProcessConnection
from service.engine.messages import EngineConfig
from service.server import serve
from service.settings import Settings
from service.startup import bind

MODES = ("rate", "held", "descriptors", "shares")
CAPACITY_S = 5.0
PATIENCE_S = 60.0
CLIENTS_S = 330.0
"""How long a client waits for an answer: longer than any deadline, so that the service's word counts."""
ASK_S, ASKED_EVERY_S = 5.0, 0.1
"""A probe without an answer for so long has failed."""
HELD = 1000
DESCRIPTORS = 256
KEYS = ("greedy-0123456789", "modest-0123456789")
START_S = 120.0
GOODPUT, REJECTED_S, PROBE_S, GROWTH = 0.95, 0.05, 0.5, 1.0
"""Aims: of the capacity; the 99th percentile of a refusal; of a probe; MiB a minute of either process."""
SMALL = {"sampler": "ddim", "num_inference_steps": 4}
LONG = b'{"sampler": "ddpm", "num_inference_steps": 1000, "preview": "none"}'


@dataclass(frozen=True)
class Figure:
    """Something that was measured. met: whether it is what is aimed at; None where nothing is."""

    name: str
    found: str
    aim: str = "–"
    met: bool | None = None

    def __str__(self) -> str:
        verdict = {True: "yes", False: "**no**", None: "–"}[self.met]
        return f"|{self.name}|{self.found}|{self.aim}|{verdict}|"


# ── Watching ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watch:
    """Asks for health and metrics, and notes the memory of both processes, from a thread of its own.

    answers: seconds by path; inf for no answer. memory: (seconds, API's bytes, engine's bytes).
    """

    url: str
    process: psutil.Process
    answers: dict[str, list[float]] = field(default_factory=lambda: {"/livez": [], "/metrics": []})
    memory: list[tuple[float, int, int]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(ASKED_EVERY_S):
            for path, seconds in self.answers.items():
                seconds.append(ask(self.url, path))
            engine = sum(each.memory_info().rss for each in self.process.children())
            self.memory.append((time.monotonic(), self.process.memory_info().rss, engine))

    def figures(self) -> list[Figure]:
        """How probes were answered."""
        found = []
        for path, seconds in self.answers.items():
            slowest, lost = percentile(seconds, 99), sum(each == float("inf") for each in seconds)
            text = f"{slowest * 1e3:.0f} ms, {lost} of {len(seconds)} without an answer"
            found.append(
                Figure(f"`{path}`: p99", text, f"{PROBE_S * 1e3:.0f} ms", lost == 0 and slowest <= PROBE_S)
            )
        return found

    def growth(self) -> list[Figure]:
        """How memory grew over the second half: the slope of a line through it."""
        half = np.array(self.memory[len(self.memory) // 2 :], dtype=float)
        found = []
        for column, name in ((1, "API"), (2, "engine")):
            slope = float(np.polyfit(half[:, 0] - half[0, 0], half[:, column], 1)[0]) * 60 / 2**20
            now = half[-1, column] / 2**20
            found.append(
                Figure(
                    f"memory of the {name}, second half",
                    f"{now:.0f} MiB, {slope:+.2f} MiB/min",
                    f"{GROWTH:g} MiB/min",
                    slope <= GROWTH,
                )
            )
        return found


def ask(url: str, path: str) -> float:
    """Seconds until a 200 has been read; inf where none comes."""
    where, begun = urlsplit(url), time.perf_counter()
    connection = HTTPConnection(where.hostname or "", where.port, timeout=ASK_S)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
        return time.perf_counter() - begun if answer.status == 200 else float("inf")
    except (OSError, HTTPException):
        return float("inf")
    finally:
        connection.close()


def percentile(values: Sequence[float], percent: float) -> float:
    """Of values some of which may be infinite; nan of none."""
    return float(np.percentile(values, percent, method="higher")) if values else float("nan")


# ── Twice the capacity ─────────────────────────────────────────────────────────────────────────


def overload(url: str, process: psutil.Process, load: float, seconds: float, clients: int) -> list[Figure]:
    """Measure the capacity by so many clients, then send so many times as much for so many seconds."""
    form = {"num_inference_steps": 20}
    of_json = saturate(url, "application/json", form, CAPACITY_S, clients)
    capacity = saturate(url, "text/event-stream", form, CAPACITY_S, clients)
    requests = trace("mix", load * capacity, int(10 * seconds * load * capacity), seed=0)
    due = [each for each in requests if each.created < seconds]
    with Watch(url, process) as watch:
        before, begun = metric(url, "ddpm_batch_rows_sum"), time.perf_counter()
        answers = asyncio.run(drive(Endpoint(f"{url}/generate", streams=True), due, CLIENTS_S))
        computed = (metric(url, "ddpm_batch_rows_sum") - before) / (time.perf_counter() - begun)
    return [
        Figure("capacity, with streams as here", f"{capacity:,.0f} rows/s ({of_json:,.0f} with JSON)"),
        Figure("rows computed", f"{computed / capacity:.0%} of it"),
        *rated(answers, capacity, seconds),
        *watch.figures(),
        *watch.growth(),
    ]


def rated(answers: Sequence[Answer], capacity: float, seconds: float) -> list[Figure]:
    """What became of requests, and how the service kept its word.

    Goodput is that of the second half of the arrivals' time, when the queue is full.
    """
    summary = summarise(answers)
    half = seconds / 2
    ended = [(each.request.created + each.latency_s, each) for each in answers if each.result == "done"]
    goodput = sum(each.request.evaluations for end, each in ended if half <= end < seconds) / half / capacity
    refused = [
        each.first_byte_s - each.late_s for each in answers if each.result == "rejected" and each.first_byte_s
    ]
    slowest = percentile(refused, 99)
    late = [error for each in answers if (error := each.eta_error_s) is not None]
    eta = [f"p{p} {percentile([abs(error) for error in late], p):.2f} s" for p in (50, 95)]
    after = [f"p{p} {percentile(late, p):+.2f} s" for p in (50, 95)]
    counts = (
        f"{summary.done} done, {summary.rejected} rejected, {summary.failed} failed, {summary.timeouts} lost"
    )
    return [
        Figure(
            "requests", f"{summary.requests}: {counts}", "none failed", summary.failed + summary.timeouts == 0
        ),
        Figure("goodput", f"{goodput:.0%} of the capacity", f"{GOODPUT:.0%}", goodput >= GOODPUT),
        Figure(
            "rejections: p99", f"{slowest * 1e3:.0f} ms", f"{REJECTED_S * 1e3:.0f} ms", slowest < REJECTED_S
        ),
        Figure("ETA off by", ", ".join(eta)),
        Figure("finished after the ETA by", ", ".join(after)),
        Figure("sent late by the clients, at most", f"{summary.late_max * 1e3:.0f} ms"),
        *(Figure("an error", text[:200]) for text in summary.errors if not text.startswith("429")),
    ]


# ── Clients that hold on ───────────────────────────────────────────────────────────────────────


def connect(url: str, content: bytes) -> socket.socket:
    """A connection with something sent over it."""
    where = urlsplit(url)
    client = socket.create_connection((where.hostname, where.port), ASK_S)
    client.sendall(content)
    return client


def _post(accept: str, body: bytes, length: int) -> bytes:
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode() + body


def hold(url: str, process: psutil.Process, held: int) -> list[Figure]:
    """Open so many streams of long jobs, and as many requests that end in their head or in their body."""
    streaming = _post("text/event-stream", LONG, len(LONG))
    in_body = _post("application/json", LONG[:10], len(LONG))
    before = process.memory_info().rss, process.num_fds()
    with ExitStack() as stack:
        for number in range(held):
            stack.enter_context(connect(url, streaming))
            stack.enter_context(connect(url, in_body if number % 2 else in_body[:20]))
        _wait(lambda: metric(url, "ddpm_streams_open") >= held, PATIENCE_S)
        streams = metric(url, "ddpm_streams_open")
        memory, descriptors = process.memory_info().rss - before[0], process.num_fds() - before[1]
        with Watch(url, process) as watch:
            answers = small_requests(url, 20)
        begun = time.monotonic()
    idle = _wait(lambda: process.num_fds() <= before[1] and not metric(url, "ddpm_slots_in_use"), PATIENCE_S)
    return [
        Figure("streams open", f"{streams:.0f}", f"{held}", streams >= held),
        Figure("descriptors more", f"{descriptors}"),
        Figure("memory of the API more", f"{memory / 2**20:.0f} MiB"),
        _answered(answers),
        *watch.figures(),
        Figure(
            "all let go", f"{time.monotonic() - begun:.1f} s after they left", f"{PATIENCE_S:.0f} s", idle
        ),
    ]


def small_requests(url: str, number: int) -> list[float]:
    """Seconds of small requests, one after the other; inf for one without its picture."""
    found = []
    for _ in range(number):
        begun = time.perf_counter()
        where = urlsplit(url)
        connection = HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE_S / 4)
        try:
            connection.request("GET", "/generate?num_inference_steps=4", headers={"Connection": "close"})
            answer = connection.getresponse()
            answer.read()
            found.append(time.perf_counter() - begun if answer.status == 200 else float("inf"))
        except (OSError, HTTPException):
            found.append(float("inf"))
        finally:
            connection.close()
    return found


def _answered(seconds: Sequence[float]) -> Figure:
    lost = sum(each == float("inf") for each in seconds)
    text = f"p50 {percentile(seconds, 50):.2f} s, {lost} of {len(seconds)} not answered"
    return Figure("small requests meanwhile", text, "all answered", lost == 0)


def _wait(condition: Callable[[], bool], patience_s: float) -> bool:
    """Whether it comes to hold in so many seconds."""
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        if condition():
            return True
        time.sleep(0.1)
    return False


def exhaust(url: str, process: psutil.Process, limit: int) -> list[Figure]:
    """Open half as many connections again as the service can have, lose its engine meanwhile, and leave."""
    before, engines = process.num_fds(), process.children()
    with ExitStack() as stack:
        for _ in range(limit * 3 // 2):
            stack.enter_context(connect(url, b"GET /livez HTTP/1.1\r\n"))
        _wait(lambda: process.num_fds() >= limit - 1, 5.0)
        full, meanwhile = process.num_fds(), ask(url, "/livez")
        for each in engines:
            each.kill()
        time.sleep(2.0)  # it would be replaced by now
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    well = alive and _wait(lambda: ask(url, "/readyz") < ASK_S, PATIENCE_S)
    after = small_requests(url, 5) if well else []
    return [
        Figure("descriptors in use", f"{full} of {limit}, {before} before"),
        Figure("`/livez` meanwhile", f"{meanwhile * 1e3:.0f} ms", "an answer", meanwhile < ASK_S),
        Figure("the service, its engine killed meanwhile", "runs" if alive else "has ended", "runs", alive),
        Figure("ready, once they have left", "yes" if well else "no", "yes", well),
        *([_answered(after)] if after else []),
    ]


# ── One client beside another ──────────────────────────────────────────────────────────────────


def shared(url: str, seconds: float) -> list[Figure]:
    """A modest client's waits beside a greedy one, first with one key for both."""
    found = []
    for name, key in (("one key", KEYS[0]), ("a key each", KEYS[1])):
        greedy, modest = contest(url, seconds, KEYS[0], key)
        p50, p95 = (percentile(modest.seconds, p) for p in (50, 95))
        own = key != KEYS[0]
        text = f"{len(modest.seconds)} served, {modest.refused} refused, p50 {p50:.2f} s, p95 {p95:.2f} s"
        none = modest.refused + modest.failed == 0
        aim = ("none refused", none) if own else ("–", None)
        found.append(Figure(f"{name}: the modest client", text, *aim))
        found.append(
            Figure(f"{name}: the greedy client", f"{greedy.images} images, {greedy.refused} refused")
        )
    return found


# ── The service ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def served(args: argparse.Namespace, mode: str) -> Iterator[tuple[str, psutil.Process]]:
    """The service over the device, once it is ready. Raises RuntimeError if it never is."""
    port = free_port()
    command = [sys.executable, "-m", "bench.overload", *_device(args), "--serve", str(port)]
    if mode == "descriptors":
        command += ["--descriptors", str(args.descriptors)]
    command += ["--queue", str(2 * args.held if mode == "held" else args.queue)]
    if mode == "shares":
        command += ["--api-keys", ",".join(KEYS)]
    with subprocess.Popen(command, cwd=ROOT, stderr=None if args.log else subprocess.DEVNULL) as popen:
        url, process = f"http://127.0.0.1:{port}", psutil.Process(popen.pid)
        try:
            if (
                not _wait(lambda: popen.poll() is not None or ask(url, "/readyz") < ASK_S, START_S)
                or popen.poll()
            ):
                raise RuntimeError("the service did not become ready")
            yield url, process
        finally:
            engines = process.children() if popen.poll() is None else []
            popen.terminate()
            try:
                popen.wait(ASK_S)
            except subprocess.TimeoutExpired:
                popen.kill()
            psutil.wait_procs(engines, timeout=ASK_S)


def _device(args: argparse.Namespace) -> list[str]:
    return ["--rows", str(args.rows), "--step-ms", str(args.step_ms)]


def _serve(args: argparse.Namespace) -> int:
    if args.descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.descriptors, args.descriptors))
    settings = Settings(
        _env_file=None,
        port=args.serve,
        max_queue=args.queue,
        access_log=False,
        **({"api_keys": args.api_keys} if args.api_keys else {}),
        stream_grace_s=0.0,
        drain_s=0.0,
    )
    command = (sys.executable, "-m", "bench.overload", *_device(args), "--engine")
    app = create_app(settings, lambda config: ProcessConnection(config, command))
    return serve(app, app.state.ddpm, settings, bind(settings.host, settings.port))


def _be_engine(args: argparse.Namespace) -> None:
    """Run as an engine; does not return."""
    from bench.simulated import build  # with torch
    from bench.soak import tiny_model
    from model.checkpoint import Checkpoint
    from service.engine import process
    from service.engine.warmup import Warm

    def load(_: EngineConfig) -> Checkpoint:
        return replace(tiny_model(32, channels=3, class_names=tuple("abcdefghij")), name="simulated")

    def warm(model: Checkpoint, config: EngineConfig) -> Warm:
        # Recorded, every new kind of step would be compiled first, for seconds, in the middle of the load.
        return build(model, args.rows, args.step_ms / 1000, config, recorded=False)

    process.main(lambda fd: process.run(fd, load, warm), [args.engine])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables as Markdown, or serve. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m bench.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=MODES, help="one of the four")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the rate; of shares a tenth of it")
    parser.add_argument("--load", type=float, default=2.0, help="times the capacity")
    parser.add_argument("--held", type=int, default=HELD, help="streams, and senders")
    parser.add_argument("--rows", type=int, default=16, help="rows of a network call")
    parser.add_argument("--step-ms", type=float, default=10.0, help="milliseconds it takes")
    parser.add_argument("--log", action="store_true", help="show what the service logs")
    parser.add_argument("--queue", type=int, default=256, help="images that it takes")
    parser.add_argument(
        "--descriptors", type=int, default=0, help=f"that it may have; of that mode {DESCRIPTORS}"
    )
    parser.add_argument("--api-keys", default="", help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the app over the device instead")
    parser.add_argument("--engine", metavar="FD", help="be an engine of that, which talks to it here")
    args = parser.parse_args(arguments)
    if args.engine is not None:
        _be_engine(args)
    if args.serve is not None:
        return _serve(args)
    args.descriptors = args.descriptors or DESCRIPTORS
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    titles = {
        "rate": f"{args.load:g} times the capacity for {args.seconds:g} s",
        "held": f"{args.held} streams and {args.held} senders that do not finish",
        "descriptors": f"`ulimit -n {args.descriptors}`",
        "shares": f"a greedy client beside a modest one, {args.seconds / 10:g} s each time",
    }
    missed = False
    for mode in [args.only] if args.only else MODES:
        with served(args, mode) as (url, process):
            if mode == "rate":
                found = overload(url, process, args.load, args.seconds, min(args.queue, args.rows * 3 // 2))
            elif mode == "held":
                found = hold(url, process, args.held)
            elif mode == "descriptors":
                found = exhaust(url, process, args.descriptors)
            else:
                found = shared(url, args.seconds / 10)
        print(f"{titles[mode]}, {os.cpu_count()} cores\n\n|figure|found|aim|met|\n|---|---|---|---|")
        for figure in found:
            print(figure, flush=True)
        print()
        missed |= any(figure.met is False for figure in found)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
