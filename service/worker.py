"""The one thread that computes: inbox, step, wake, drain, watchdog, death.

Everything about the engine and the scheduler happens on this thread. Other threads reserve room, put
commands into the inbox, and read a few published numbers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue

from service.engine import Engine, StepReport
from service.errors import (
    DrainingError,
    LoadingError,
    QueueFullError,
    RefusedError,
    ServiceError,
    WorkerDeadError,
)
from service.events import Cancelled, Event, Failed, Finished, Queued, Terminal
from service.jobs import Job
from service.telemetry import Telemetry

logger = logging.getLogger(__name__)


class Phase(Enum):
    """The worker's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class Worker:
    """Runs an engine on a thread of its own.

    build: makes the engine, on the worker's thread (loading and warming up take a while). publish: receives
    every event, on the worker's thread. capacity: samples in the house at once. stall_s: a step that takes
    longer counts as hung.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        publish: Callable[[Event], None],
        telemetry: Telemetry,
        *,
        capacity: int,
        stall_s: float = 60.0,
    ) -> None:
        self._build, self._publish, self._telemetry = build, publish, telemetry
        self._capacity, self._stall_s = capacity, stall_s
        self._inbox: SimpleQueue[Callable[[], list[Event]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._held: dict[str, Job] = {}  # every job from submit to its last event
        self._samples = 0
        self._phase = Phase.LOADING
        self._progress = time.monotonic()
        self._backlog_s = 0.0
        self._thread = threading.Thread(target=self._run, name="ddpm-worker", daemon=True)

    # ── Called from other threads ──────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin loading; READY follows by itself."""
        self._thread.start()

    @property
    def phase(self) -> Phase:
        """Where the worker is in its life."""
        return self._phase

    @property
    def idle(self) -> bool:
        """Whether no job is in the house."""
        return not self._held

    def submit(self, job: Job) -> None:
        """Reserve room for a job and put it into the inbox. Raises a RefusedError, and keeps nothing then."""
        with self._lock:
            refusal = self.refusal() or self._full(job.room)
            if refusal is None:
                if not self._held:
                    self._progress = time.monotonic()  # being idle was no delay
                self._held[job.id] = job
                self._samples += job.room
        if refusal is not None:
            self._telemetry.rejected.labels(refusal.code).inc()
            raise refusal
        self._inbox.put(lambda: self._engine.scheduler.add(job, time.monotonic()))

    def cancel(self, job_id: str) -> None:
        """Stop a job; nothing when it is over already."""
        self._inbox.put(lambda: self._engine.scheduler.cancel(job_id))

    def drain(self) -> None:
        """Take nothing new; stop once everybody is served."""
        with self._lock:
            if self._phase in (Phase.LOADING, Phase.READY):
                self._set_phase(Phase.DRAINING)
        self._inbox.put(list)  # wakes an idle worker, which then sees that it may stop

    def abort(self, error: ServiceError) -> None:
        """End every job with an error, now."""
        self._inbox.put(lambda: self._engine.scheduler.fail_all(error))

    def alive(self, now: float | None = None) -> bool:
        """False when the worker is dead, or has work but made no step for `stall_s`. now: monotonic clock."""
        if self._phase is Phase.DEAD:
            return False
        late = (time.monotonic() if now is None else now) - self._progress > self._stall_s
        return self.idle or not late

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread's end. Returns whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def refusal(self) -> RefusedError | None:
        """Why nothing new is taken in this phase, if so."""
        match self._phase:
            case Phase.LOADING:
                return LoadingError("The network is being loaded.", 2.0)
            case Phase.DRAINING | Phase.STOPPED:
                return DrainingError("The service is shutting down.", 5.0)
            case Phase.DEAD:
                return WorkerDeadError("The worker has failed.", 10.0)
        return None

    def _full(self, samples: int) -> RefusedError | None:
        if self._samples + samples <= self._capacity:
            return None
        room = f"{self._samples} of {self._capacity} images are in the house; {samples} more do not fit."
        # When enough of the work in the way should be done, at the pace measured so far.
        excess = min(1.0, (self._samples + samples - self._capacity) / max(self._samples, 1))
        return QueueFullError(room, max(1.0, self._backlog_s * excess))

    # ── The worker's thread ────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            self._engine = self._build()
            with self._lock:
                if self._phase is Phase.LOADING:
                    self._set_phase(Phase.READY)
            while not (self._phase is Phase.DRAINING and self.idle and self._inbox.empty()):
                self._tick()
            self._set_phase(Phase.STOPPED)
        except Exception:
            logger.exception("the worker has failed")
            self._die()

    def _tick(self) -> None:
        """One turn of the loop: what has arrived, then a step. Waits when there is nothing to do."""
        if len(self._engine.scheduler) == 0:
            self._deliver(self._inbox.get()())
            self._progress = time.monotonic()
        self._deliver(self._poll())
        self._show_load()  # before the step too: should it hang, the work in hand can be seen
        report = self._engine.step(self._poll)
        self._show_load()
        if report is not None:
            self._record(report)
            self._deliver(report.events)

    def _poll(self) -> list[Event]:
        """Carry out every command in the inbox."""
        events: list[Event] = []
        while True:
            try:
                events += self._inbox.get_nowait()()
            except Empty:
                return events

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            job = self._held.get(event.job_id)
            if isinstance(event, Finished) and job is not None and job.sequel is not None:
                self._deliver(self._go_on(job, event))
                continue
            if isinstance(event, Terminal):
                self._release(event)
            self._publish(event)

    def _go_on(self, job: Job, event: Finished) -> list[Event]:
        """Put a job's sequel in its place. Returns its events; that it is queued, its reader knows."""
        following = job.go_on(event.pictures)
        with self._lock:
            self._held[job.id] = following
            self._samples += following.room - job.room
        events = self._engine.scheduler.add(following, time.monotonic())
        return [event for event in events if not isinstance(event, Queued)]

    def _release(self, event: Terminal) -> None:
        """Give a job's room back and count how it ended."""
        with self._lock:
            job = self._held.pop(event.job_id, None)
            if job is None:
                return
            self._samples -= job.room
        match event:
            case Finished():
                self._telemetry.images.labels(job.sampler).inc(len(job.samples))
                self._telemetry.queue_duration.observe(event.queue_s)
            case Cancelled():
                self._telemetry.cancelled.inc()
            case Failed() if job.started is None:
                self._telemetry.rejected.labels(event.error.code).inc()

    def _show_load(self) -> None:
        scheduler = self._engine.scheduler
        self._backlog_s = scheduler.backlog * scheduler.times.at(scheduler.max_rows) / scheduler.max_rows
        self._telemetry.running.set(scheduler.running)
        self._telemetry.waiting.set(scheduler.waiting)

    def _record(self, report: StepReport) -> None:
        self._progress = time.monotonic()
        telemetry = self._telemetry
        if report.rows:
            telemetry.last_step.set_to_current_time()
            telemetry.steps.inc(report.samples)
            telemetry.step_duration.observe(report.seconds)
            telemetry.batch_rows.observe(report.rows)
            telemetry.nonfinite.inc(report.nonfinite)

    def _die(self) -> None:
        """Refuse what comes, and give every job that is still held an end."""
        with self._lock:
            self._set_phase(Phase.DEAD)
            held = list(self._held)
        error = WorkerDeadError("The worker has failed; the process is about to be replaced.", 10.0)
        self._deliver([Failed(job_id, error) for job_id in held])

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._telemetry.ready.set(phase is Phase.READY)
