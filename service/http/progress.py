"""Jobs that are asked about while they run: how far they are, what they show, and an early end with that.

For a wire format whose clients poll instead of reading a stream. The handler that answers a request follows
its job's events here; requests that come meanwhile look at what it has kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import Request

from service.engine.messages import Cancelled, Event, Picture, Preview, Queued, Terminal
from service.http.respond import finished, while_connected
from service.http.state import AppState, app_state
from service.tasks.sampling import PreparedRequest


@dataclass(eq=False)
class Run:
    """A job that is running. task: what its request was called; owner: the credentials it came with.

    step: of each image the steps that are done, of `steps`. pictures: the latest x₀ prediction of each.
    """

    task: str
    owner: str
    prepared: PreparedRequest
    interrupted: bool = False
    steps: int = 0
    step: dict[int, int] = field(default_factory=dict)
    pictures: dict[int, Picture] = field(default_factory=dict)
    _due: float | None = None

    def hear(self, event: Event) -> None:
        """Keep what an event says."""
        if isinstance(event, Queued | Preview):
            self._due = time.monotonic() + event.eta_s
        if isinstance(event, Preview):
            self.steps = event.steps
            for picture in event.pictures:
                self.step[picture.index], self.pictures[picture.index] = event.step, picture

    @property
    def images(self) -> int:
        """How many there will be."""
        return len(self.prepared.spec.stages[-1].chains)

    @property
    def fraction(self) -> float:
        """How much of it is done, from 0 to 1."""
        return sum(self.step.values()) / (self.images * self.steps) if self.steps else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds until it should be finished; 0 as long as that is not known."""
        return 0.0 if self._due is None else max(0.0, self._due - time.monotonic())


class Runs:
    """The jobs that are running, in order of arrival."""

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def of(self, owner: str) -> Sequence[Run]:
        """Those of a client."""
        return [run for run in self._runs if run.owner == owner]

    def interrupt(self, owner: str, state: AppState) -> None:
        """End a client's jobs where they are."""
        for run in self.of(owner):
            run.interrupted = True
            state.engine.cancel(run.prepared.spec.id)

    async def run(self, task: str, prepared: PreparedRequest, request: Request) -> Sequence[Picture]:
        """Run a job to its end: its pictures, or the latest x₀ predictions of one that was interrupted.

        Raises the error of a job that does not finish. A client that disconnects cancels it.
        """
        state, spec = app_state(request), prepared.spec  # whose previews show x₀ by default
        run = Run(task, owner_of(request), prepared)
        self._runs.append(run)
        try:
            async with state.streams.subscribe(spec.id, None) as events, while_connected(request.receive):
                state.engine.submit(spec)
                async for item in events:
                    run.hear(item.event)
                    if isinstance(item.event, Terminal):
                        return _pictures(item.event, run)
        finally:
            self._runs.remove(run)
        raise AssertionError("a stream ends with its last event")


def owner_of(request: Request) -> str:
    """Whose jobs a request is about: clients with the same credentials see each other's, and no others."""
    return request.headers.get("authorization", "")


def _pictures(event: Terminal, run: Run) -> Sequence[Picture]:
    if isinstance(event, Cancelled) and run.interrupted:
        return [run.pictures[index] for index in sorted(run.pictures)]
    return finished(event).pictures
