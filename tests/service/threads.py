"""An engine in a thread of the tests' process, where a fake can be gated. Messages go through bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue

from service.engine.messages import Command, EngineConfig, Report, Stopped
from service.engine.process import EngineLoop
from service.engine.warmup import Warm
from service.engine.wire import from_frames, to_frames

KILLED = -9


class ThreadConnection:
    """What the API sees of an engine. build: makes it, on its thread, from its configuration."""

    def __init__(self, config: EngineConfig, build: Callable[[EngineConfig], Warm]) -> None:
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._api = asyncio.get_running_loop()
        self._code: int | None = None
        self._ended = threading.Event()
        sent = from_frames([bytes(frame) for frame in to_frames(config)], EngineConfig)
        loop = EngineLoop(lambda: build(sent), self._inbox, self._report)
        threading.Thread(target=self._run, args=(loop,), name="ddpm-engine", daemon=True).start()

    def send(self, command: Command) -> None:
        self._inbox.put(from_frames([bytes(frame) for frame in to_frames(command)], Command))  # type: ignore[arg-type]

    def _run(self, loop: EngineLoop) -> None:
        try:
            loop.run()
        except SystemExit as stop:
            self._code = self._code or int(stop.code or 0)
        self._ended.set()
        self._put(None)

    def _report(self, report: Report) -> None:
        if self._code != KILLED:
            if isinstance(report, Stopped):
                self._code = int(report.failed)
            self._put(from_frames([bytes(frame) for frame in to_frames(report)], Report))  # type: ignore[arg-type]

    def _put(self, report: Report | None) -> None:
        try:
            self._api.call_soon_threadsafe(self._reports.put_nowait, report)
        except RuntimeError:  # the loop is closed
            return

    async def receive(self) -> Report | None:
        return await self._reports.get()

    def kill(self) -> None:
        """As far as the API can tell; the thread goes on until it ends by itself."""
        self._code = KILLED
        self._ended.set()
        self._put(None)

    async def wait(self) -> int:
        await asyncio.to_thread(self._ended.wait)
        return self._code or 0
