"""An engine's process: commands in, reports out. It shares nothing else with the side that serves HTTP.

`python -m service.engine.process FD` is started by the API with one end of a socket pair, at descriptor FD.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty
from socket import socket
from typing import Any, Protocol

from msgspec.structs import replace

from model import hub
from model.checkpoint import Checkpoint, CheckpointError
from model.runtimes import RuntimeUnavailableError
from service.engine.messages import (
    Command,
    Drain,
    EngineConfig,
    Event,
    Forecast,
    Loaded,
    Locate,
    Progress,
    Ready,
    Report,
    StepReport,
    Stopped,
)
from service.engine.warmup import Warm, load, warm_up
from service.engine.wire import Channel
from service.heap import freeze_heap
from service.telemetry import configure_logging

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""As in malloc.h."""
KEPT, KEPT_PIECES = 512 << 20, 32 << 20
"""Bytes of free memory that are not given back, and of the largest piece of it: glibc's own limit."""
FAILED, UNUSABLE = 1, 3
"""Exit codes: the engine has failed; the model, the device or the runtime cannot be used."""
FORECAST_S = 1.0
"""How often it is said when the jobs in flight should end."""
SWITCH_S = 0.0001
"""A thread that waits for the interpreter gets it after so long: a step is only a few milliseconds."""


class Inbox(Protocol):
    """Where commands come from. EOFError: nobody is left to send any."""

    def get(self, *, timeout: float | None = None) -> Any:
        """The next command. Raises queue.Empty after so many seconds without."""

    def get_nowait(self) -> Any:
        """The next command. Raises queue.Empty where there is none."""


class EngineLoop:
    """Runs an engine until it is drained.

    build: makes a warm engine, which takes a while. send: receives every report.
    """

    def __init__(self, build: Callable[[], Warm], inbox: Inbox, send: Callable[[Report], None]) -> None:
        self._build, self._inbox, self._send = build, inbox, send
        self._draining = False
        self._launched: tuple[str, ...] = ()
        self._next_forecast = 0.0

    def run(self) -> None:
        """Build, then step until drained. The last report says how it ended.

        Raises nothing, but for SystemExit, and EOFError from the inbox.
        """
        try:
            warm = self._build()
            self._engine = warm.engine
            self._send(Ready(warm.info, warm.model, warm.devices))
            while not (self._draining and self._engine.idle):
                self._tick()
        except (EOFError, SystemExit):
            raise
        except BaseException:  # libraries written in Rust panic with one
            logger.exception("the engine has failed")
            self._send(Stopped(failed=True))
        else:
            self._send(Stopped(failed=False))

    def _tick(self) -> None:
        """Handle what has arrived, launch a step, read the one before. Waits if there is nothing to do."""
        engine = self._engine
        events = [] if not engine.idle else self._handle(self._inbox.get())
        while (spare := engine.spare_s()) > 0:  # commands that come meanwhile are in the next step
            try:
                events += self._handle(self._inbox.get(timeout=spare))
            except Empty:
                break
        events += self._poll() + engine.expire()
        before = engine.launch()
        # Before the results as well: should the step hang or end the process, it is known what was in it.
        launched = engine.launched
        changed = launched if launched != self._launched else None
        self._launched = launched
        if events or changed is not None:
            self._send(Progress(StepReport(events), engine.load, changed))
        if before is not None:
            self._send(Progress(engine.read(before), engine.load))
            if (now := time.monotonic()) >= self._next_forecast:
                self._next_forecast = now + FORECAST_S
                self._send(Forecast(tuple(engine.scheduler.forecast())))

    def _poll(self) -> list[Event]:
        """Handle every command in the inbox."""
        events: list[Event] = []
        while True:
            try:
                events += self._handle(self._inbox.get_nowait())
            except Empty:
                return events

    def _handle(self, command: Command) -> list[Event]:
        if isinstance(command, Drain):
            self._draining = True
            return []
        if isinstance(command, Locate):
            located = self._engine.locate(command.job_id)
            if located is not None:
                self._send(located)
            return []
        return self._engine.handle(command)


def run(
    connection: socket,
    load: Callable[[EngineConfig], Checkpoint] = load,
    warm: Callable[[Checkpoint, EngineConfig], Warm] = warm_up,
) -> int:
    """Serve an engine over a connection until it is drained, or the other end is gone. Returns the exit code.

    load, warm: make a warm engine. Raises SystemExit where the model or the device cannot be used.
    """
    # These reach every process of a terminal or a service unit. The API decides what becomes of running work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    tune()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    channel = Channel(connection)
    ended: list[Report] = []

    def send(report: Report) -> None:
        ended[:] = [report]
        channel.send(report)

    try:
        config = channel.get()
        assert isinstance(config, EngineConfig)
        configure_logging(config.log_format)

        def build() -> Warm:
            try:
                located = replace(config, model=str(hub.locate(config.model)))
                model = load(located)
                send(Loaded(located.model))
                warmed = warm(model, config)
                freeze_heap()
                return warmed
            except (CheckpointError, RuntimeUnavailableError) as error:
                print(error, file=sys.stderr)
                raise SystemExit(UNUSABLE) from error

        EngineLoop(build, channel, send).run()
        channel.close()
    except EOFError:
        return 0  # the API is gone: nobody is left to compute for
    return FAILED if ended == [Stopped(failed=True)] else 0


def tune() -> None:
    """Suit the interpreter and the C library to short steps.

    A thread hands over the interpreter's lock soon. Memory that is freed is kept: tensors would be mapped,
    cleared and unmapped in every step.
    """
    sys.setswitchinterval(SWITCH_S)
    with suppress(OSError, AttributeError):  # not every system has this
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_PIECES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def _end_with_parent(parent: int) -> None:
    """End this process once its parent has, even in a step that hangs, where the loop would not notice."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main(serve: Callable[[socket], int] = run, arguments: Sequence[str] | None = None) -> None:
    """Run as a process. Ends it without waiting for threads that may be inside the network."""
    (fd,) = sys.argv[1:] if arguments is None else arguments
    code = FAILED
    try:
        code = serve(socket(fileno=int(fd)))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else FAILED
    except BaseException:
        logger.exception("the engine's process has failed")
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
