"""The service as a process: started, started again, looked at from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from bench.chaos import faults
from bench.chaos.api import TASKS
from bench.servers import ROOT, free_port

ENGINES = 2
START_S = 120.0
ASKING_S = 20.0
IN_FLIGHT = ("ddpm_slots_in_use", "ddpm_samples_running", "ddpm_samples_waiting", "ddpm_streams_open")
"""Metrics that are zero when nothing is in flight."""
POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads that asyncio starts when they are first needed, and keeps."""


@dataclass(frozen=True)
class Held:
    """What the service holds. Of the engines: the most of any."""

    in_flight: float
    tasks: int
    descriptors: int
    threads: int
    engines: int
    engine_descriptors: int
    engine_threads: int

    def excess(self, baseline: Held) -> dict[str, str]:
        """What is more, or other, than at the baseline: name → "baseline → now"."""
        pools = {"threads": POOL, "engine_threads": POOL}
        return {
            name: f"{before} → {now}"
            for name, before in vars(baseline).items()
            if (now := getattr(self, name)) > before + pools.get(name, 0)
            or (name == "engines" and now != before)
        }


@dataclass
class Service:
    """The service over two engines, whose log is a file in `folder`; restarted on the same port."""

    model: Path
    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.log = self.folder / "log"
        self.start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until both engines are warm. Raises RuntimeError if they never are."""
        command = [sys.executable, "-m", "bench.chaos.api", str(self.port), str(self.model), str(self.folder)]
        warm = self.warm_engines()
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.process = psutil.Process(self.popen.pid)
        give_up = time.monotonic() + START_S
        while self.warm_engines() < warm + ENGINES or self.get("/readyz") is None:
            if self.popen.poll() is not None or time.monotonic() > give_up:
                self.stop()
                raise RuntimeError(f"the service did not start\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def warm_engines(self) -> int:
        """How many engines have become warm since the first start."""
        return self.log.read_text().count("rows per step") if self.log.exists() else 0

    def stop(self) -> None:
        """End it and its engines, whatever state they are in."""
        left = [self.process, *self.engines()]
        for process in left:
            if process.is_running():
                process.kill()
        self.popen.wait()
        psutil.wait_procs(left, timeout=10)

    def engines(self) -> list[psutil.Process]:
        """The engines' processes."""
        try:
            return self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def fault(self, what: str) -> Path:
        """Have the next step fail so. Returns the file that is there until an engine has noticed."""
        return faults.throw(self.folder, faults.NEXT_STEP, what)

    def get(self, path: str) -> str | None:
        """The body of a 200; None for anything else."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ASKING_S)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            content = answer.read().decode()
            return content if answer.status == 200 else None
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """All without labels, by name. Raises RuntimeError where there is no answer."""
        text = self.get("/metrics")
        if text is None:
            raise RuntimeError("/metrics does not answer")
        lines = (line.split() for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines if "{" not in name}

    def held(self) -> Held:
        """What it holds now. Raises RuntimeError or psutil.Error where it cannot be asked."""
        metrics, tasks = self.metrics(), self.get(TASKS)
        if tasks is None:
            raise RuntimeError(f"{TASKS} does not answer")
        engines = self.engines()
        return Held(
            in_flight=sum(metrics[name] for name in IN_FLIGHT),
            tasks=int(tasks),
            descriptors=self.process.num_fds(),
            threads=self.process.num_threads(),
            engines=len(engines),
            engine_descriptors=max((each.num_fds() for each in engines), default=0),
            engine_threads=max((each.num_threads() for each in engines), default=0),
        )

    def settle(self, baseline: Held | None, patience_s: float) -> dict[str, str]:
        """Wait until nothing is in flight and no more is held than at the baseline; what is still, else."""
        excess: dict[str, str] = {}
        give_up = time.monotonic() + patience_s
        while time.monotonic() < give_up:
            try:
                held = self.held()
                excess = held.excess(baseline) if baseline else {"in_flight": ""} if held.in_flight else {}
            except (RuntimeError, psutil.Error) as error:
                excess = {"service": str(error)}
            if not excess:
                break
            time.sleep(0.1)
        return excess
