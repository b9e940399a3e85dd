"""One engine, as the API sees it: a process that is started, watched, and replaced when it dies.

The jobs that were in flight when an engine died are run again from their specs, which gives the same results.
Those that were in a step at that moment may be what it died of, so each of these has the new engine to itself
until it is past that point. One that the engine dies of there again fails; all others come after it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from service.engine.connection import Connection
from service.engine.jobs import JobSpec
from service.engine.messages import (
    AddJob,
    CancelJob,
    Cancelled,
    Command,
    Drain,
    EngineConfig,
    Failed,
    Forecast,
    Load,
    Loaded,
    Locate,
    Located,
    Progress,
    Ready,
    Report,
    Stopped,
)
from service.errors import DeadlineError, EngineKilledError, SelfTestError

logger = logging.getLogger(__name__)

UNUSABLE = 3
"""Exit code of an engine whose model or device cannot be used: another try would end in the same way."""
DEATHS, WINDOW_S = 5, 600.0
"""After so many deaths of one engine in so many seconds it is given up."""
SELF_TEST_FAILED = "The self-test has failed: this machine does not compute what the model's maker did."
RETRY_UNFIT_S = 60.0
BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
"""Before the second start in that time; each further one waits twice as long."""
DEADLINE_S = 0.5
"""How long after its deadline a job is ended here: its engine does it between two steps, unless it hangs."""
RETRY_START_S = 1.0
UNANSWERED_S = 4.0
"""An engine that has not answered a command for so long when it is killed counts as hung."""


class Phase(Enum):
    """The life of an engine, and of all of them together. Unfit: warm, but its self-test has failed."""

    LOADING = "loading"
    READY = "ready"
    UNFIT = "unfit"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(eq=False)
class Assigned:
    """A job that a worker has to run.

    again: whether an engine that died had it. steps: how many it has been in since it was sent. suspect: how
    many it had been in when an engine died during one of them.
    """

    spec: JobSpec
    sent: bool = False
    again: bool = False
    cancelled: bool = False
    steps: int = 0
    in_step: bool = False
    suspect: int | None = None


@dataclass(eq=False)
class Worker:
    """Keeps an engine running and gives it its jobs.

    start: starts an engine. on_report: called with every report. on_phase: when the phase has changed.
    on_end: with the last event of a job that ends without an engine. stall_s: without a report for so long
    while there is work, the engine counts as hung, and is killed. on_replay: with the id of a job that is to
    be run again.
    """

    start: Callable[[EngineConfig], Connection]
    config: EngineConfig
    on_report: Callable[[Report], None]
    on_phase: Callable[[], None]
    on_end: Callable[[Cancelled | Failed], None]
    stall_s: float = 60.0
    on_replay: Callable[[str], None] = lambda _job_id: None
    phase: Phase = Phase.LOADING
    load: Load = field(default_factory=Load)
    exit_code: int = 0
    restarts: int = 0
    heard: float = field(default_factory=time.monotonic)
    _jobs: dict[str, Assigned] = field(default_factory=dict)  # in order of arrival, as the two below
    _unsent: dict[str, Assigned] = field(default_factory=dict)
    _suspects: dict[str, Assigned] = field(default_factory=dict)
    _deaths: list[float] = field(default_factory=list)
    _unreported: int = 0
    _asked: float | None = None  # when the first command was sent since the engine's latest report
    _abandoned: bool = False  # whether it has a job that was ended here, and has not been heard of since
    _drain_sent: bool = False
    _connection: Connection | None = None
    _ready: bool = False
    _draining: bool = False
    _killed: bool = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def backlog(self) -> int:
        """Network evaluations that are left, and those of jobs that came since the engine's latest report."""
        return self.load.backlog + self._unreported

    def add(self, spec: JobSpec) -> None:
        """Run a job."""
        if not self._jobs and not self._abandoned:
            self.heard = time.monotonic()  # being idle was no delay
        self._jobs[spec.id] = self._unsent[spec.id] = Assigned(spec)
        self._unreported += spec.evaluations
        self._feed()

    def cancel(self, job_id: str) -> None:
        """Stop a job that it has."""
        assigned = self._jobs[job_id]
        assigned.cancelled = True
        if assigned.sent and self._ready:
            self.send(CancelJob(job_id))  # an engine that has died may not get it
        else:
            self.on_end(Cancelled(job_id))

    def locate(self, job_id: str) -> bool:
        """Ask how far a job is that it has; False where there is nobody to ask."""
        asked = self._jobs[job_id].sent and self._ready
        if asked:
            self.send(Locate(job_id))
        return asked

    def has_begun(self, job_id: str) -> bool:
        """Whether a job that it has is known to have been in a step."""
        assigned = self._jobs[job_id]
        return assigned.in_step or assigned.steps > 0

    def remove(self, job_id: str) -> None:
        """Forget a job that has ended."""
        if self._jobs.pop(job_id, None) is not None:
            self._unsent.pop(job_id, None)
            self._suspects.pop(job_id, None)
            self._feed()

    def send(self, command: Command) -> None:
        """Pass a command on, if there is an engine; one that is being replaced has no jobs yet."""
        if self._connection is not None and self._ready:
            self._asked = self._asked or time.monotonic()
            self._connection.send(command)

    def drain(self) -> None:
        """End when the jobs have ended: at once where there are none."""
        self._draining = True
        if not self._jobs and self._connection is not None and not self._ready:
            self._connection.kill()
        self._feed()

    def kill(self) -> None:
        """End now, whatever is in flight."""
        self._draining = self._killed = True
        if self._asked is not None and time.monotonic() - self._asked > UNANSWERED_S:
            logger.error("the engine does not answer: it is killed")
            self.exit_code = self.exit_code or 1
        if self._connection is not None:
            self._connection.kill()

    async def run(self) -> None:
        """Keep an engine running until it has been drained or is given up."""
        deadlines = asyncio.create_task(self._keep_deadlines())
        try:
            while self.phase not in (Phase.STOPPED, Phase.DEAD):
                if self._over:
                    self._set(Phase.STOPPED)
                else:
                    await self._live()
        except BaseException as error:  # whatever it is: nobody would run what is accepted after it
            logger.exception("the engine's worker has failed")
            self.exit_code = 1
            self.kill()
            self._set(Phase.DEAD)
            if not isinstance(error, Exception):
                raise
        finally:
            deadlines.cancel()

    @property
    def _over(self) -> bool:
        """Whether no engine is needed any more."""
        return self._killed or (self._draining and not self._jobs)

    async def _live(self) -> None:
        """One engine, from its start to its end."""
        try:
            connection = self._connection = self.start(self.config)
        except OSError as error:  # no descriptor, process or memory is left, which may pass
            logger.error("no engine can be started: %s", error)
            await asyncio.sleep(RETRY_START_S)
            return
        self.heard = time.monotonic()
        self._asked, self._abandoned, self._drain_sent = None, False, False
        watch = asyncio.create_task(self._watch(connection))
        stopped: Stopped | None = None
        try:
            while (report := await connection.receive()) is not None:
                self.heard, self._asked, self._abandoned = time.monotonic(), None, False
                if isinstance(report, Stopped):
                    stopped = report
                else:
                    self._take(report)
                    # A report wakes many readers. They come first, or reports would hold up all else.
                    await asyncio.sleep(0)
        finally:
            watch.cancel()
        code = await connection.wait()
        loaded, self._ready, self._connection = self._ready, False, None
        if (stopped is not None and not stopped.failed and not self._jobs) or self._over:
            self._set(Phase.STOPPED)
        elif code == UNUSABLE and not loaded:
            self.exit_code = UNUSABLE
            self._set(Phase.DEAD)
        else:
            await self._died(code, loaded=loaded)

    def _take(self, report: Report) -> None:
        match report:
            case Ready(info) if not info.fit:  # it stays, so that it can be looked at, but gets no job
                self.on_report(report)
                self._set(Phase.UNFIT)
                for job_id, assigned in list(self._jobs.items()):
                    error = SelfTestError(SELF_TEST_FAILED, RETRY_UNFIT_S)
                    self.on_end(
                        Cancelled(job_id) if assigned.cancelled else Failed(job_id, error, started=True)
                    )
            case Ready():
                self._ready = True
                self.on_report(report)
                self._set(Phase.DRAINING if self._draining else Phase.READY)
                self._feed()
            case Loaded(
                folder
            ):  # whatever becomes of a branch on the Hub, the next engine has the same model
                self.config = replace(self.config, model=folder)
            case Located() | Forecast():
                self.on_report(report)
            case Progress(_, load, launched):
                self.load, self._unreported = load, 0
                if launched is not None:
                    for job_id, assigned in self._jobs.items():
                        assigned.in_step = job_id in launched
                if report.step.batch_size:
                    for assigned in self._jobs.values():
                        assigned.steps += assigned.in_step
                self.on_report(report)
                self._feed()

    def _feed(self) -> None:
        """Send what may be sent: suspects one at a time, all else after them, and last that it may end."""
        if not self._ready or self._connection is None:
            return
        for job_id, assigned in list(self._suspects.items()):
            if assigned.sent and assigned.suspect is not None:
                if assigned.steps <= assigned.suspect + 1:
                    return  # it is being tried
                assigned.suspect = None
                del self._suspects[job_id]
        for job_id, assigned in [*self._suspects.items()][:1] or [*self._unsent.items()]:
            assigned.sent = True
            del self._unsent[job_id]
            self.send(AddJob(assigned.spec, assigned.again))
        if self._draining and not self._unsent and not self._drain_sent:
            self._drain_sent = True
            self.send(Drain())

    async def _died(self, code: int, *, loaded: bool) -> None:
        """Blame, and wait before the next start; or give up."""
        self.restarts += loaded
        now = time.monotonic()
        self._deaths = [*(then for then in self._deaths if now - then < WINDOW_S), now]
        logger.error("the engine has ended with code %d and %d jobs in flight", code, len(self._jobs))
        if not loaded or len(self._deaths) >= DEATHS:
            self.exit_code = 1
            self._set(Phase.DEAD)
            return
        self.load = Load()
        self._set(Phase.DRAINING if self._draining else Phase.LOADING)
        for job_id, assigned in list(self._jobs.items()):
            if assigned.cancelled:
                self.on_end(Cancelled(job_id))
                continue
            if assigned.sent and assigned.suspect is not None:
                error = EngineKilledError("The engine died of this job, twice.")
                self.on_end(Failed(job_id, error, started=True))
                continue
            if assigned.sent:
                assigned.again = True
                self.on_replay(job_id)
            # One that has never been in a step may have been in the one that nobody was told of.
            if assigned.sent and (assigned.in_step or not assigned.steps):
                assigned.suspect = assigned.steps
            assigned.sent, assigned.steps, assigned.in_step = False, 0, False
        self._unsent = dict(self._jobs)
        self._unreported = sum(each.spec.evaluations for each in self._jobs.values())
        self._suspects = {name: each for name, each in self._jobs.items() if each.suspect is not None}
        again = len(self._deaths) - 2
        if again >= 0:
            await asyncio.sleep(min(LONGEST_BACKOFF_S, BACKOFF_S * 2**again))

    async def _keep_deadlines(self) -> None:
        """End jobs that have become too late, should their engine not do so."""
        while True:
            await asyncio.sleep(DEADLINE_S / 2)
            late = time.monotonic() - DEADLINE_S
            for job_id, assigned in list(self._jobs.items()):
                if assigned.spec.deadline is not None and assigned.spec.deadline < late:
                    if assigned.sent:
                        self._abandoned = self._ready
                        self.send(CancelJob(job_id))
                    error = DeadlineError("The deadline has passed.")
                    self.on_end(Failed(job_id, error, started=self.has_begun(job_id)))

    async def _watch(self, connection: Connection) -> None:
        """Kill an engine that has work but says nothing."""
        every = min(1.0, self.stall_s / 4)
        while True:
            before = time.monotonic()
            await asyncio.sleep(every)
            if time.monotonic() - before > self.stall_s / 2:  # it is this process that stood still
                self.heard = time.monotonic()
            if (
                self._ready
                and (self._jobs or self._abandoned)
                and time.monotonic() - self.heard > self.stall_s
            ):
                logger.error("the engine has not answered for %.0f s: it is killed", self.stall_s)
                connection.kill()
                return

    def _set(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            self.on_phase()
