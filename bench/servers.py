"""Servers as processes: started on a free loopback port, waited for, watched, and always stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import httpx
import psutil

from bench.load import Endpoint, drive
from bench.workload import Request
from service.settings import Settings

ROOT = Path(__file__).parent.parent
START_S = 180.0
"""How long a server may take to its first answer."""
STOP_S = 15.0
"""How long it may take after SIGTERM."""
SAMPLE_S = 0.2


class ServerError(RuntimeError):
    """A server did not come up; the message ends with what it last wrote."""


@dataclass(frozen=True)
class Kind:
    """How a server is started, and where requests go. In `command`, {port} stands for the port."""

    command: str
    path: str = "/generate"
    wrap: str = ""
    streams: bool = False
    ours: bool = False

    def argv(self, port: int) -> list[str]:
        """The command line, run by this interpreter."""
        return [sys.executable, *self.command.format(port=port).split()]

    def endpoint(self, port: int) -> Endpoint:
        """Where requests go when it listens on this port."""
        return Endpoint(f"http://127.0.0.1:{port}{self.path}", self.wrap, self.streams)


SERVICE = Kind("-m service --port {port}", streams=True, ours=True)
VARIANTS = {
    "json": replace(SERVICE, streams=False),
    "fifo": replace(SERVICE, command=f"{SERVICE.command} --policy fifo"),
    "sharing": replace(SERVICE, command=f"{SERVICE.command} --policy sharing"),
}
"""Of the service: clients who want one answer, as every peer's do; its other policies."""
PEERS = {
    "plain": Kind("-m uvicorn bench.peers.plain:app --port {port} --no-access-log"),
    "grouped": Kind("-m uvicorn bench.peers.grouped:app --port {port} --no-access-log"),
    "litserve": Kind("-m bench.peers.litserve_ {port}", "/predict"),
    "mosec": Kind("-m bench.peers.mosec_ --address 127.0.0.1 --port {port} --timeout 600000", "/inference"),
    "ray": Kind("-m bench.peers.ray_ {port}", "/"),
    "bentoml": Kind("-m bentoml serve bench.peers.bentoml_:Diffusion --port {port}", wrap="requests"),
}
PIPELINES = ("diffusers", "ours")
NAMES = (
    "service",
    *(f"service/{variant}" for variant in VARIANTS),
    *(f"{peer}/{pipeline}" for pipeline in PIPELINES for peer in PEERS),
)
"""Every server: ours, also in its variants, then each peer over each pipeline."""


@dataclass(frozen=True)
class Model:
    """What all servers serve; runtime and dtype are those of our service and of the peers that run it."""

    folder: Path
    runtime: str = "auto"
    dtype: str = "auto"

    def environment(self, pipeline: str) -> dict[str, str]:
        """Variables for the service and the peers alike; settings of this process's own are blanked."""
        blank = {f"DDPM_{name}".upper(): "" for name in Settings.model_fields}
        ours = {"MODEL": str(self.folder.resolve()), "RUNTIME": self.runtime, "DTYPE": self.dtype}
        ours["ACCESS_LOG"] = "false"  # as the peers
        return {
            **blank,
            **{f"DDPM_{name}": value for name, value in ours.items()},
            **{f"BENCH_{name}": value for name, value in ours.items()},
            "BENCH_PIPELINE": pipeline,
            # Nothing here is to be reported or fetched.
            "BENTOML_DO_NOT_TRACK": "True",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }


def find(name: str) -> tuple[Kind, str]:
    """(kind, pipeline) of a server by its name in NAMES. Raises KeyError for others."""
    if name == "service":
        return SERVICE, "ours"
    peer, _, pipeline = name.partition("/")
    if peer == "service":
        return VARIANTS[pipeline], "ours"
    if pipeline not in PIPELINES:
        raise KeyError(name)
    return PEERS[peer], pipeline


@dataclass(frozen=True)
class Usage:
    """What a server and its children took while it was watched.

    Memory is resident memory; shared pages count once for each process that has them.
    """

    seconds: float
    cpu_s: float
    mean_bytes: float
    peak_bytes: int


class Watch:
    """Samples CPU time and memory of a process and all that it starts, from a thread."""

    def __init__(self, pid: int) -> None:
        self.seen: dict[int, psutil.Process] = {}
        self._top = psutil.Process(pid)
        self._cpu_s: dict[int, float] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.reset()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Begin again."""
        with self._lock:
            self._sample()
            self._begun, self._before = time.monotonic(), sum(self._cpu_s.values())
            self._sizes: list[int] = []

    def usage(self) -> Usage:
        """What was taken since the last reset."""
        with self._lock:
            self._sizes.append(self._sample())
            cpu_s = sum(self._cpu_s.values()) - self._before
            mean = sum(self._sizes) / len(self._sizes)
            return Usage(time.monotonic() - self._begun, cpu_s, mean, max(self._sizes))

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            with self._lock:
                self._sizes.append(self._sample())

    def _sample(self) -> int:
        """Bytes now; CPU seconds are noted, and outlive their process."""
        size = 0
        try:
            family = [self._top, *self._top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0
        for process in family:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    size += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
            self.seen[process.pid] = process
            self._cpu_s[process.pid] = times.user + times.system
        return size


@dataclass
class Server:
    """A server that has answered."""

    endpoint: Endpoint
    watch: Watch
    ready_s: float
    popen: subprocess.Popen[bytes] = field(repr=False)

    def info(self) -> dict[str, Any]:
        """The answer of our service to /info."""
        url = self.endpoint.url.removesuffix("/generate") + "/info"
        found: dict[str, Any] = httpx.get(url, trust_env=False).raise_for_status().json()
        return found


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(kind: Kind, environment: Mapping[str, str], start_s: float = START_S) -> Iterator[Server]:
    """Start a server, wait until it answers a request, and stop it in the end. Raises ServerError."""
    port = free_port()
    begun = time.monotonic()
    with TemporaryFile() as log:
        popen = subprocess.Popen(
            kind.argv(port),
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watch = Watch(popen.pid)
        try:
            _await(lambda: _answers(kind.endpoint(port)), popen, begun + start_s, log)
            yield Server(kind.endpoint(port), watch, time.monotonic() - begun, popen)
        finally:
            watch.stop()
            _stop(popen, watch.seen)


def _answers(endpoint: Endpoint) -> bool:
    """Whether a small request is answered now."""
    (answer,) = asyncio.run(drive(endpoint, [Request(0.0, 1)], patience_s=20.0))
    return answer.result == "done"


def _await(
    answers: Callable[[], bool], popen: subprocess.Popen[bytes], give_up: float, log: IO[bytes]
) -> None:
    while not answers():
        code = popen.poll()
        if code is None and time.monotonic() < give_up:
            time.sleep(0.2)
            continue
        log.seek(0)
        tail = log.read().decode(errors="replace")[-4000:]
        what = f"it ended with {code}" if code is not None else "no answer came"
        raise ServerError(f"{' '.join(map(str, popen.args[1:]))}: {what}\n{tail}")  # type: ignore[index]


def _stop(popen: subprocess.Popen[bytes], seen: Mapping[int, psutil.Process]) -> None:
    """SIGTERM, a wait, SIGKILL; then every remaining process of its family."""
    if popen.poll() is None:
        popen.terminate()
        try:
            popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
    with suppress(ProcessLookupError):  # nobody is left in its group
        os.killpg(popen.pid, signal.SIGKILL)
    left = [process for process in seen.values() if process.is_running()]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_S)
