"""The API's end of the engine: admission, commands, events, health.

A client owns the engine's loop and everything that has to be exact on this side: how many slots are taken,
which jobs are in flight, whether the engine is alive. Reports arrive on the loop's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue

from service import __version__
from service.engine.jobs import JobSpec
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Cancelled,
    Command,
    Drain,
    EngineInfo,
    Event,
    Failed,
    Finished,
    Load,
    Progress,
    Ready,
    Report,
    StepReport,
    Stopped,
    Terminal,
)
from service.engine.process import EngineLoop
from service.engine.warmup import Warm
from service.errors import (
    DrainingError,
    EngineDeadError,
    LoadingError,
    QueueFullError,
    RefusedError,
    ServiceError,
)
from service.telemetry import Telemetry


class Phase(Enum):
    """The engine's life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    DEAD = "dead"


class EngineClient:
    """Runs an engine on a thread of its own and talks to it.

    build: makes a warm engine, on its thread. publish: receives every event, on that thread too. capacity:
    slots, which is how many samples may be in flight. stall_s: a step that takes longer counts as hung.
    """

    def __init__(
        self,
        build: Callable[[], Warm],
        publish: Callable[[Event], None],
        telemetry: Telemetry,
        *,
        capacity: int,
        stall_s: float = 60.0,
    ) -> None:
        self._publish, self._telemetry = publish, telemetry
        self._capacity, self._stall_s = capacity, stall_s
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight: dict[str, JobSpec] = {}  # every job from submit to its last event
        self._slots = 0
        self._phase = Phase.LOADING
        self._progress = time.monotonic()
        self._load = Load()
        self.info: EngineInfo | None = None  # once the engine is warm
        loop = EngineLoop(build, self._inbox, self._receive)
        self._thread = threading.Thread(target=loop.run, name="ddpm-engine", daemon=True)

    def start(self) -> None:
        """Begin loading; READY follows by itself."""
        self._thread.start()

    @property
    def phase(self) -> Phase:
        """Where the engine is in its life."""
        return self._phase

    @property
    def idle(self) -> bool:
        """Whether no job is in flight."""
        return not self._in_flight

    def submit(self, spec: JobSpec) -> None:
        """Reserve slots for a job and hand it over. Raises a RefusedError, and keeps nothing then."""
        with self._lock:
            refusal = self.refusal() or self._full(spec.slots)
            if refusal is None:
                if not self._in_flight:
                    self._progress = time.monotonic()  # being idle was no delay
                self._in_flight[spec.id] = spec
                self._slots += spec.slots
                self._inbox.put(AddJob(spec))
        if refusal is not None:
            self._telemetry.rejected.labels(refusal.code).inc()
            raise refusal

    def cancel(self, job_id: str) -> None:
        """Stop a job; nothing happens when it is already over."""
        self._inbox.put(CancelJob(job_id))

    def drain(self) -> None:
        """Accept nothing new; stop once everything in flight is finished."""
        with self._lock:
            if self._phase in (Phase.LOADING, Phase.READY):
                self._set_phase(Phase.DRAINING)
            self._inbox.put(Drain())

    def abort(self, error: ServiceError) -> None:
        """End every job with an error, now."""
        self._inbox.put(AbortAll(error))

    def alive(self, now: float | None = None) -> bool:
        """False when the engine is dead, or has work but made no step for `stall_s`. now: monotonic clock."""
        if self._phase is Phase.DEAD:
            return False
        late = (time.monotonic() if now is None else now) - self._progress > self._stall_s
        return self.idle or not late

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the thread. Returns whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def refusal(self) -> RefusedError | None:
        """Why nothing new is accepted in this phase, if so."""
        match self._phase:
            case Phase.LOADING:
                return LoadingError("The network is being loaded.", 2.0)
            case Phase.DRAINING | Phase.STOPPED:
                return DrainingError("The service is shutting down.", 5.0)
            case Phase.DEAD:
                return EngineDeadError("The engine has failed.", 10.0)
        return None

    def _full(self, slots: int) -> RefusedError | None:
        if self._slots + slots <= self._capacity:
            return None
        reason = f"{self._slots} of {self._capacity} images are in flight; {slots} more do not fit."
        # When enough of the work in flight should be done, at the pace measured so far.
        excess = min(1.0, (self._slots + slots - self._capacity) / max(self._slots, 1))
        return QueueFullError(reason, max(1.0, self._load.backlog_s * excess))

    # ── Called on the engine's thread ──────────────────────────────────────────────────────────

    def _receive(self, report: Report) -> None:
        match report:
            case Ready(info):
                self.info = info
                labels = info.model, info.runtime, info.device, info.dtype, __version__
                self._telemetry.model.labels(*labels).set(1)
                with self._lock:
                    if self._phase is Phase.LOADING:
                        self._set_phase(Phase.READY)
            case Progress(step, load):
                self._progress = time.monotonic()
                self._load = load
                self._telemetry.running.set(load.running)
                self._telemetry.waiting.set(load.waiting)
                self._count(step)
                for event in step.events:
                    self._deliver(event)
            case Stopped(failed):
                self._stop(failed=failed)

    def _deliver(self, event: Event) -> None:
        if isinstance(event, Terminal):
            self._release(event)
        self._publish(event)

    def _release(self, event: Terminal) -> None:
        """Free a job's slots and count how it ended."""
        with self._lock:
            spec = self._in_flight.pop(event.job_id, None)
            if spec is None:
                return
            self._slots -= spec.slots
        match event:
            case Finished():
                if spec.stages[-1].kind == "denoise":
                    self._telemetry.images.labels(spec.sampler).inc(len(event.pictures))
                self._telemetry.queue_duration.observe(event.queue_s)
            case Cancelled():
                self._telemetry.cancelled.inc()
            case Failed(_, error, started) if not started:
                self._telemetry.rejected.labels(error.code).inc()

    def _count(self, step: StepReport) -> None:
        telemetry = self._telemetry
        if step.batch_size:
            telemetry.last_step.set_to_current_time()
            telemetry.steps.inc(step.samples)
            telemetry.step_duration.observe(step.seconds)
            telemetry.batch_rows.observe(step.batch_size)
            telemetry.nonfinite.inc(step.nonfinite)

    def _stop(self, *, failed: bool) -> None:
        """Refuse what comes; after a failure, give every job that is still in flight an end."""
        with self._lock:
            self._set_phase(Phase.DEAD if failed else Phase.STOPPED)
            left = list(self._in_flight)
        error = EngineDeadError("The engine has failed; the process is about to be replaced.", 10.0)
        for job_id in left if failed else ():
            self._deliver(Failed(job_id, error, started=True))

    def _set_phase(self, phase: Phase) -> None:
        self._phase = phase
        self._telemetry.ready.set(phase is Phase.READY)
