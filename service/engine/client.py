"""The API's end of the engines: admission, commands, events, health.

A client owns a worker for each engine and everything that has to be exact on this side: how many slots are
taken, which jobs are in flight and what their readers have seen, whether there is anybody to run them. All
of it happens on the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from service import __version__
from service.engine.admission import Slots
from service.engine.connection import Connection
from service.engine.jobs import JobSpec
from service.engine.messages import (
    AbortAll,
    Cancelled,
    EngineConfig,
    EngineInfo,
    Event,
    Failed,
    Finished,
    Forecast,
    Located,
    ModelInfo,
    Picture,
    Preview,
    Progress,
    Queued,
    Ready,
    Report,
    StepReport,
    Terminal,
)
from service.engine.tracing import JobSpan
from service.engine.worker import RETRY_UNFIT_S, SELF_TEST_FAILED, Phase, Worker
from service.errors import (
    ClientLimitError,
    ComputeError,
    DeadlineError,
    DrainingError,
    EngineDeadError,
    EngineKilledError,
    LoadingError,
    NonFiniteError,
    QueueFullError,
    RefusedError,
    SelfTestError,
    ServiceError,
)
from service.telemetry import Telemetry, owner, submitted_job

logger = logging.getLogger(__name__)

LOCATE_S = 2.0
"""How long to wait for an engine to say how far a job is."""
STOP_S = 5.0
"""How long engines get to end before they are killed."""
OTHERS = "none"
"""In metrics, all clients without a key."""
REFUSALS = (
    QueueFullError,
    ClientLimitError,
    DeadlineError,
    LoadingError,
    DrainingError,
    EngineDeadError,
    SelfTestError,
)
FAILURES = (DeadlineError, NonFiniteError, ComputeError, EngineKilledError, EngineDeadError, DrainingError)
"""What is counted from zero: of a counter whose first value is 1, Prometheus sees no increase."""


@dataclass(eq=False)
class _InFlight:
    """A job from submit to its last event.

    place: how far it was when that was last heard of; located: who waits to hear of it. span: where its
    request is traced. queued, shown: what its readers have got, of the pictures the latest step by image and
    kind.
    """

    spec: JobSpec
    worker: Worker
    place: Located
    span: JobSpan | None = None
    located: list[asyncio.Future[None]] = field(default_factory=list)
    queued: bool = False
    shown: dict[tuple[int, str], int] = field(default_factory=dict)

    def is_new(self, picture: Picture, step: int) -> bool:
        """Whether no reader has seen this or a later step of the image. From now on one has."""
        key = picture.index, picture.kind
        new = step > self.shown.get(key, 0)
        if new:
            self.shown[key] = step
        return new


class EngineClient:
    """Runs engines and talks to them.

    start: starts an engine. configs: of each engine; a single one for any device is followed by one for each
    further device of its kind. publish: receives every event. capacity: slots, which is how many samples may
    be in flight. most_of_an_owner: how many of them one may have; 0: all. owners: those that have
    metrics of their own. stall_s: an engine that says nothing for so long, with work in flight, is replaced.
    hurry: called when there are no slots; says which jobs will be given up, and in how many seconds.
    """

    def __init__(
        self,
        start: Callable[[EngineConfig], Connection],
        configs: Sequence[EngineConfig],
        publish: Callable[[Event], None],
        telemetry: Telemetry,
        *,
        capacity: int,
        most_of_an_owner: int = 0,
        owners: Sequence[str] = (),
        stall_s: float = 60.0,
        hurry: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._start, self._publish, self._telemetry, self._hurry = start, publish, telemetry, hurry
        self._slots, self._stall_s = Slots(capacity, most_of_an_owner or capacity), stall_s
        self._owners = frozenset(owners)
        telemetry.slots.set(capacity)
        for counter, errors in ((telemetry.rejected, REFUSALS), (telemetry.failed, FAILURES)):
            for error in errors:
                counter.labels(error.code)
        for name in owners or (OTHERS,):
            telemetry.client_slots.labels(name)
            telemetry.client_rejected.labels(name)
        self._in_flight: dict[str, _InFlight] = {}
        self._draining = False
        self._restarts = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.info: EngineInfo | None = None  # once an engine is warm
        self.model: ModelInfo | None = None
        self._workers: list[Worker] = []
        self._phase = Phase.LOADING
        for config in configs:
            self._add_worker(config)

    def start(self) -> None:
        """Begin loading; READY follows by itself. Called on the event loop."""
        self._tasks = [asyncio.create_task(worker.run()) for worker in self._workers]

    @property
    def phase(self) -> Phase:
        """Where the engines are in their life: ready once any is."""
        return self._phase

    @property
    def exit_code(self) -> int:
        """What the service should end with: 0, or why an engine was given up."""
        return max(worker.exit_code for worker in self._workers)

    @property
    def idle(self) -> bool:
        """Whether no job is in flight."""
        return not self._in_flight

    @property
    def pressed(self) -> bool:
        """Whether anybody has been refused slots who may still come back."""
        return self._slots.pressed(time.monotonic())

    def check_room(self, slots: int = 1) -> None:
        """Raise the RefusedError that a job of so many slots would meet now, and count it."""
        refusal = self.refusal() or self._full(owner.get(), slots)
        if refusal is not None:
            self._telemetry.rejected.labels(refusal.code).inc()
            raise refusal

    def submit(self, spec: JobSpec) -> None:
        """Reserve slots for a job and hand it over. Raises a RefusedError, and keeps nothing then."""
        if who := owner.get():
            spec = dataclasses.replace(spec, owner=who)
        self.check_room(spec.slots)
        ready = [worker for worker in self._workers if worker.phase is Phase.READY]
        worker = min(ready, key=lambda each: each.backlog)
        self._in_flight[spec.id] = _InFlight(spec, worker, Located(spec.id), JobSpan.begin(spec))
        submitted_job.set(spec.id)
        self._slots.take(spec.id, spec.owner, spec.slots, self._last_due(worker, spec))
        self._show_slots(spec.owner)
        worker.add(spec)

    def has(self, job_id: str) -> bool:
        """Whether a job is in flight."""
        return job_id in self._in_flight

    def cancel(self, job_id: str) -> None:
        """Stop a job; nothing happens when it is already over."""
        found = self._in_flight.get(job_id)
        if found is not None:
            found.worker.cancel(job_id)

    async def locate(self, job_id: str) -> Located | None:
        """How far a job is; None when it is not in flight.

        Its engine answers between two steps. From one that takes long, or is being replaced, it is what was
        last heard.
        """
        found = self._in_flight.get(job_id)
        if found is not None and found.worker.locate(job_id):
            answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            found.located.append(answered)
            done, _ = await asyncio.wait([answered], timeout=LOCATE_S)
            if done and self.has(job_id):
                return found.place
        if found is None or not self.has(job_id):
            return None
        running = found.place.running or found.worker.has_begun(job_id)
        return replace(found.place, running=running)

    def drain(self) -> None:
        """Accept nothing new; stop once everything in flight is finished."""
        self._draining = True
        for worker in self._workers:
            worker.drain()
        self._update_phase()

    def abort(self, error: ServiceError) -> None:
        """End every job with an error, now."""
        for worker in self._workers:
            worker.send(AbortAll())
        for job_id in list(self._in_flight):
            self._deliver(Failed(job_id, error, started=True))

    async def stop(self) -> None:
        """End the engines, whatever is in flight; after this no process is left."""
        self.drain()
        _, running = await asyncio.wait(self._tasks, timeout=0 if self._in_flight else STOP_S)
        if running:
            self.kill()
            await asyncio.wait(running, timeout=STOP_S)

    def kill(self) -> None:
        """End the engines now, whatever is in flight."""
        for worker in self._workers:
            worker.kill()

    def alive(self, now: float | None = None) -> bool:
        """False when the engines are dead, or one has been silent for long, and was not replaced for it."""
        if self._phase is Phase.DEAD:
            return False
        now = time.monotonic() if now is None else now
        return not any(len(worker) and now - worker.heard > 3 * self._stall_s for worker in self._workers)

    def refusal(self) -> RefusedError | None:
        """Why nothing new is accepted in this phase, if so."""
        match self._phase:
            case Phase.LOADING:
                return LoadingError("The network is being loaded.", 2.0)
            case Phase.UNFIT:
                return SelfTestError(SELF_TEST_FAILED, RETRY_UNFIT_S)
            case Phase.DRAINING | Phase.STOPPED:
                return DrainingError("The service is shutting down.", 5.0)
            case Phase.DEAD:
                return EngineDeadError("The engine has failed.", 10.0)
        return None

    def _full(self, who: str, slots: int) -> RefusedError | None:
        now = time.monotonic()
        refusal = self._slots.refusal(who, slots, now)
        if refusal is not None:
            for job_id, seconds in self._hurry().items():
                self._slots.expect(job_id, now + seconds)
            refusal = self._slots.refusal(who, slots, now)
            self._telemetry.client_rejected.labels(self._label(who)).inc()
        return refusal

    def _last_due(self, worker: Worker, spec: JobSpec) -> float:
        """When a job would be done that comes after all others, at the full batch's rate."""
        load = worker.load
        pace = load.backlog_s / load.backlog if load.backlog else 0.0
        if not pace and self.info is not None:
            size, seconds = self.info.step_times[-1]
            pace = seconds / size
        return time.monotonic() + (worker.backlog + spec.evaluations) * pace

    @property
    def left(self) -> tuple[int, int]:
        """Network evaluations that remain, and slots that are free."""
        return sum(each.backlog for each in self._workers), self._slots.capacity - self._slots.taken

    def _show_slots(self, who: str) -> None:
        self._telemetry.slots_in_use.set(self._slots.taken)
        label = self._label(who)
        taken = self._slots.of(who) if label is not OTHERS else self._slots.taken
        self._telemetry.client_slots.labels(label).set(taken)

    def _label(self, who: str) -> str:
        """What an owner is called in metrics, whose labels are a closed set."""
        return who if who in self._owners else OTHERS

    def _add_worker(self, config: EngineConfig) -> Worker:
        def on_report(report: Report) -> None:
            self._receive(worker, report)

        worker = Worker(
            self._start,
            config,
            on_report,
            self._update_phase,
            self._deliver,
            stall_s=self._stall_s,
            on_replay=self._replayed,
        )
        self._workers.append(worker)
        return worker

    # ── What workers say ───────────────────────────────────────────────────────────────────────

    def _receive(self, worker: Worker, report: Report) -> None:
        match report:
            case Ready(info, model, devices):
                self._welcome(worker, info, model, devices)
            case Located(job_id):
                if job_id in self._in_flight:
                    self._in_flight[job_id].place = report
                    self._answer(self._in_flight[job_id])
            case Forecast(ends):
                now = time.monotonic()
                for job_id, seconds in ends:
                    self._slots.expect(job_id, now + seconds)
            case Progress(step):
                self._show_load()
                self._count(step)
                for event in step.events:
                    self._deliver(event)

    def _welcome(self, worker: Worker, info: EngineInfo, model: ModelInfo, devices: int) -> None:
        first = self.info is None
        self.info, self.model = self.info or info, self.model or model
        labels = info.model, info.runtime, info.device, info.dtype, __version__
        self._telemetry.model.labels(*labels).set(1)
        if first and worker.config.device == "auto" and devices > 1:
            worker.config = replace(worker.config, device=f"{info.device.partition(':')[0]}:0")
            for index in range(1, devices):
                other = self._add_worker(
                    replace(worker.config, device=f"{info.device.partition(':')[0]}:{index}")
                )
                self._tasks.append(asyncio.create_task(other.run()))

    def _deliver(self, event: Event) -> None:
        """Pass on an event, but for what readers have had before an engine died."""
        found = self._in_flight.get(event.job_id)
        if found is None:
            return
        match event:
            case Queued():
                if found.queued:
                    return
                found.queued = True
                found.place = Located(event.job_id, False, event.position, event.eta_s)
                self._slots.expect(event.job_id, time.monotonic() + event.eta_s)
            case Preview():
                news = [each for each in event.pictures if found.is_new(each, event.step)]
                if not news:
                    return
                if len(news) < len(event.pictures):
                    event = replace(event, pictures=tuple(news))
            case _:
                self._release(event)
        self._publish(event)

    def _release(self, event: Terminal) -> None:
        """Free a job's slots and count how it ended."""
        found = self._in_flight.pop(event.job_id)
        self._slots.give_back(event.job_id)
        self._show_slots(found.spec.owner)
        found.worker.remove(event.job_id)
        self._answer(found)
        if found.span is not None:
            found.span.end(event)
        match event:
            case Finished():
                if found.spec.stages[-1].kind == "denoise":
                    self._telemetry.images.labels(found.spec.sampler).inc(len(event.pictures))
                self._telemetry.queue_duration.observe(event.queue_s)
            case Cancelled():
                self._telemetry.cancelled.inc()
            case Failed(_, error, started):
                counter = self._telemetry.failed if started else self._telemetry.rejected
                counter.labels(error.code).inc()
                if isinstance(error, ComputeError):
                    _log_failure(found.spec, error)

    def _replayed(self, job_id: str) -> None:
        """Count a job whose engine has died and which is run again."""
        self._telemetry.replayed.inc()
        if (span := self._in_flight[job_id].span) is not None:
            span.replayed()

    def _answer(self, found: _InFlight) -> None:
        """Wake those who have asked how far a job is."""
        for waiting in found.located:
            if not waiting.done():
                waiting.set_result(None)
        found.located.clear()

    def _show_load(self) -> None:
        loads = [each.load for each in self._workers]
        self._telemetry.running.set(sum(load.running for load in loads))
        self._telemetry.waiting.set(sum(load.waiting for load in loads))

    def _count(self, step: StepReport) -> None:
        telemetry = self._telemetry
        if step.batch_size:
            telemetry.last_step.set_to_current_time()
            telemetry.steps.inc(step.samples)
            telemetry.step_duration.observe(step.seconds)
            telemetry.batch_rows.observe(step.batch_size)
            telemetry.evaluations.inc(step.batch_size)
            telemetry.nonfinite.inc(step.nonfinite)

    def _update_phase(self) -> None:
        """Dead as soon as one is given up; otherwise as ready as the most ready of them."""
        phases = {worker.phase for worker in self._workers}
        order = (Phase.DEAD, Phase.DRAINING, Phase.READY, Phase.LOADING, Phase.UNFIT, Phase.STOPPED)
        found = next(phase for phase in order if phase in phases)
        if self._draining and found in (Phase.READY, Phase.LOADING, Phase.UNFIT):
            found = Phase.DRAINING
        if found is Phase.DEAD and self._phase is not Phase.DEAD:
            error = EngineDeadError("The engine has failed; the process is about to be replaced.", 10.0)
            for job_id in list(self._in_flight):
                self._deliver(Failed(job_id, error, started=True))
        self._phase = found
        self._show_load()  # an engine that has died does nothing
        self._telemetry.ready.set(found is Phase.READY)
        restarts = sum(worker.restarts for worker in self._workers)
        self._telemetry.restarts.inc(restarts - self._restarts)
        self._restarts = restarts


def _log_failure(spec: JobSpec, error: ComputeError) -> None:
    """What it takes to see the same failure again."""
    seeds = ", ".join(str(chain.seed) for chain in spec.stages[-1].chains)
    logger.error(
        "job %s failed, %s: %s sampler %s, seeds %s", spec.id, error.code, error, spec.sampler, seeds
    )
