"""The engine's loop: commands in, reports out. It shares nothing else with the side that serves HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty, SimpleQueue

from service.engine.messages import Command, Drain, Event, Progress, Ready, Report, StepReport, Stopped
from service.engine.warmup import Warm

logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs an engine until it is drained.

    build: makes a warm engine, which takes a while. send: receives every report.
    """

    def __init__(
        self, build: Callable[[], Warm], inbox: SimpleQueue[Command], send: Callable[[Report], None]
    ) -> None:
        self._build, self._inbox, self._send = build, inbox, send
        self._draining = False

    def run(self) -> None:
        """Build, then step until drained. Never raises: the last report says how it ended."""
        try:
            warm = self._build()
            self._engine = warm.engine
            self._send(Ready(warm.info))
            while not (self._draining and len(self._engine.scheduler) == 0):
                self._tick()
        except Exception:
            logger.exception("the engine has failed")
            self._send(Stopped(failed=True))
        else:
            self._send(Stopped(failed=False))

    def _tick(self) -> None:
        """Handle what has arrived, then make a step. Waits when there is nothing to do."""
        engine = self._engine
        events: list[Event] = []
        if len(engine.scheduler) == 0:
            events += self._handle(self._inbox.get())
        events += self._poll()
        # Before the step as well: should it hang, it can be seen what is in flight.
        self._send(Progress(StepReport(events), engine.load))
        report = engine.step(self._poll)
        if report is not None:
            self._send(Progress(report, engine.load))

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
        return self._engine.handle(command)
