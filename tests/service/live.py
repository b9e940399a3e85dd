"""Real servers on loopback sockets: in a thread to gate a fake, as a process where signals matter."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvicorn

from service.app import create_app
from service.engine.jobs import JobSpec
from service.engine.messages import EngineConfig
from service.engine.warmup import Warm
from service.errors import CancelledError
from service.http.state import AppState
from service.protocol import http_protocol
from service.server import DrainingServer
from service.settings import Settings
from tests.service.fakes import PATIENCE_S, FakeDenoiser, fake_warm, until
from tests.service.threads import ThreadConnection

Result = TypeVar("Result")
ROOT = Path(__file__).parent.parent.parent


def settings(**values: Any) -> Settings:
    """Settings that neither the environment nor a .env file has a say in; any `Host` will do."""
    return Settings(_env_file=None, **{"port": 0, "allowed_hosts": ("*",), **values})


class Threaded:
    """The app on a real socket, its server in a thread of this process."""

    def __init__(
        self, denoiser: FakeDenoiser, warm: Callable[[EngineConfig], Warm], chosen: Settings
    ) -> None:
        self.denoiser, self.gate = denoiser, denoiser.gate
        self.app = create_app(chosen, lambda config: ThreadConnection(config, warm))
        self.state: AppState = self.app.state.ddpm
        config = uvicorn.Config(
            self.app,
            port=0,
            http=http_protocol(chosen),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        self.server = DrainingServer(config, self.state, chosen.drain_s)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        until(lambda: self.server.started, "the start")
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(
            base_url=self.url, timeout=PATIENCE_S, verify=False
        )  # no certificates on loopback

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.server.serve()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The function's result on the server's event loop."""

        async def called() -> Result:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(PATIENCE_S)

    def submit(self, spec: JobSpec) -> None:
        """Submit a job whose events nobody reads."""
        self.call(self.state.engine.submit, spec)

    def ready(self) -> Threaded:
        until(lambda: self.client.get("/readyz").status_code == 200, "readiness")
        return self

    def metric(self, name: str, **labels: str) -> float:
        """What it counts, read on its loop: a client has an answer before it is counted there."""

        def read() -> float:
            return self.state.telemetry.registry.get_sample_value(name, labels) or 0.0

        apart = self._thread.is_alive() and threading.current_thread() is not self._thread
        return self.call(read) if apart else read()

    def wait_for_exit(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        if self._thread.is_alive():
            self.call(self.state.engine.abort, CancelledError("the test is over"))
        self.gate.open()
        self.server.should_exit = True
        self.client.close()
        self.wait_for_exit()


Serve = Callable[..., Threaded]


def serving() -> Iterator[Serve]:
    """Body of the fixture: a function that starts servers, all of which are stopped afterwards."""
    running: list[Threaded] = []

    def serve(
        denoiser: FakeDenoiser | None = None, warm: Any = None, max_batch_size: int = 8, **values: Any
    ) -> Threaded:
        denoiser = denoiser or FakeDenoiser()
        started = Threaded(denoiser, warm or fake_warm(denoiser, max_batch_size), settings(**values))
        running.append(started)
        return started if warm is not None else started.ready()

    yield serve
    for server in running:
        server.stop()


@dataclass(frozen=True)
class Sse:
    """One server-sent event."""

    name: str
    id: str
    data: dict[str, Any]


def sse(response: httpx.Response) -> Iterator[Sse]:
    """Parse a stream. An event that is not ended by an empty line is none."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            yield Sse(fields["event"], fields["id"], json.loads(fields["data"]))
            fields = {}


@dataclass
class Process:
    """`python -m service`, or another command for Python, with these flags, on a free port."""

    flags: list[str]
    env: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] = ("-m", "service")

    def __post_init__(self) -> None:
        self.lines: list[str] = []
        # Variables of the tests' own environment are blanked, so that a developer's .env changes nothing.
        blank = {f"DDPM_{name}".upper(): "" for name in Settings.model_fields}
        self.popen = subprocess.Popen(
            [sys.executable, *self.command, "--port", "0", *self.flags],
            env={**os.environ, **blank, "OMP_NUM_THREADS": "1", **self.env},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def connect(self, timeout_s: float = 2 * PATIENCE_S) -> httpx.Client:
        """A client, once the service is ready."""
        until(lambda: "Uvicorn running on" in self.log or self.popen.poll() is not None, "the listener")
        found = re.search(r"Uvicorn running on (http://\S+)", self.log)
        assert found, self.log
        client = httpx.Client(base_url=found[1], timeout=timeout_s, verify=False)
        until(lambda: client.get("/readyz").status_code == 200, "readiness")
        return client

    def wait(self) -> int:
        """The exit code."""
        code = self.popen.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        return code

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.wait()
