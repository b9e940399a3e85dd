"""One step: choose the samples, launch it, and read the results of the step before, which has run meanwhile.

The device always has the next step queued while the host deals with the results of the last one. What changes
between the two, a cancellation or a failure, takes effect one step later: rows of a job that has ended are
dropped when they are read.

A fault reaches the job that causes it and no other. A step that raises changes nothing and is retried in
halves until the culprit alone fails; so is the measuring that follows it. Running out of memory also lowers
the batch size for a while, unless a sample does alone. Batch neighbours of a failed sample continue, bit for
bit as without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from traceback import clear_frames

from msgspec.structs import replace

from model.chain import Image
from model.denoiser import Stepped
from model.runtimes import SkippedError
from model.state import Row
from model.state import SnapshotKind as Shown
from service.engine.flight import Denoises, Flight, Raised, Reads, size_of
from service.engine.isolation import isolate
from service.engine.jobs import Job, Sample, SnapshotKind
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Event,
    Finished,
    Load,
    Located,
    Measurement,
    Picture,
    Preview,
    StepReport,
    Terminal,
)
from service.engine.scheduler import Scheduler
from service.engine.width import BatchLimit
from service.errors import NonFiniteError

logger = logging.getLogger(__name__)

PREVIEW_INTERVAL_S = 0.1
"""Between a job's previews where it does not ask for certain steps; more where there are many jobs."""
PREVIEWS_PER_CHAIN = 25
"""And about as many at most, where a chain is slow: they cost a processor time that its network needs."""
PREVIEWS_PER_S = 1000
"""Of all such jobs together: more than an API process can send beside its other work helps nobody."""
LEAD_S = 0.002
"""How long before the device is expected to be free the next step is launched, beside what that takes and how
far the expectation may be off."""


@dataclass
class _Progress:
    """What the engine holds of a job in flight, by sample of its current stage.

    begun: those that have had a slot. previewed: when its latest preview was launched. pictures: of finished
    samples in the last stage. left: the latents of finished samples in an earlier one. carried: those that
    the previous stage left.
    """

    begun: list[Sample] = field(default_factory=list)
    previewed: float = -math.inf
    measurements: dict[Sample, list[Measurement]] = field(default_factory=dict)
    pictures: dict[Sample, Picture] = field(default_factory=dict)
    left: dict[Sample, Image] = field(default_factory=dict)
    carried: tuple[Image, ...] = ()


@dataclass
class Engine:
    """Carries out commands and runs the scheduler's batches. All of it happens on one thread.

    on_batch_limit: called with the most rows that a network call has from now on, whenever that changes.
    widest: what it may grow to while running, if more than the scheduler's at the start.
    """

    denoiser: Denoises
    scheduler: Scheduler
    on_batch_limit: Callable[[int], None] = lambda _size: None
    widest: int = 0
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _watched: set[str] = field(default_factory=set)  # jobs with previews
    _free: list[int] = field(default_factory=list)  # slots that were in use
    _slots: int = 0  # that have ever been in use
    _flight: Flight | None = None
    _read: float = 0.0  # when the latest results were there
    _launching_s: float = 0.0  # what a launch takes the host, on average

    def __post_init__(self) -> None:
        self._limit = BatchLimit(self.scheduler.max_batch_size, self.widest)

    @property
    def load(self) -> Load:
        """What is in flight now."""
        scheduler = self.scheduler
        return Load(scheduler.running, scheduler.waiting, scheduler.backlog, scheduler.backlog_s)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: no job, and no step on its way."""
        return self._flight is None and len(self.scheduler) == 0

    def handle(self, command: AddJob | CancelJob | AbortAll) -> list[Event]:
        """Carry out a command, between two steps."""
        match command:
            case AddJob(spec, again):
                events = self.scheduler.add(spec, monotonic(), again=again)
                self._progress[spec.id] = _Progress()
                if spec.preview != "none":
                    self._watched.add(spec.id)
            case CancelJob(job_id):
                events = self.scheduler.cancel(job_id)
            case AbortAll():
                events = self.scheduler.cancel_all()
        return self._ended(events)

    def locate(self, job_id: str) -> Located | None:
        """How far a job is; None when it is over."""
        return self.scheduler.locate(job_id)

    def step(self) -> StepReport | None:
        """Launch the next step, and read the one before it. None when there was neither."""
        if self.idle:
            return None
        events, before = self.expire(), self.launch()
        report = self.read(before) if before is not None else StepReport([])
        return replace(report, events=[*events, *report.events])

    def expire(self) -> list[Event]:
        """Fail what has become too late, before more is computed for it."""
        return self._ended(self.scheduler.expire(monotonic()))

    @property
    def launched(self) -> tuple[str, ...]:
        """The jobs of the step on its way."""
        rows = self._flight.rows if self._flight is not None else ()
        return tuple(dict.fromkeys(sample.job.id for sample in rows))

    def spare_s(self) -> float:
        """Seconds that are left until the next step has to be launched, so that the device does not wait.

        What comes before then can still be in it.
        """
        if self._flight is None:
            return 0.0
        begun = max(self._flight.launched, self._read)
        expected = self.scheduler.times.at(self._flight.size)
        lead = LEAD_S + 0.1 * expected + 2 * self._launching_s
        return begun + expected - lead - perf_counter()

    # ── Launching ──────────────────────────────────────────────────────────────────────────────

    def launch(self) -> Flight | None:
        """Queue the step that the scheduler chooses, which counts as made from here on.

        Returns the step before it, which is to be read next.
        """
        begun, before = perf_counter(), self._flight
        batch = self.scheduler.schedule(monotonic())
        self.scheduler.in_flight = batch.size
        self._flight = None
        if batch.samples:
            previews = self._due(batch.samples, begun)
            rows = {sample: self._row(sample, preview=sample in previews) for sample in batch.samples}
            # Behind a step that was not queued nothing may be either: it would run without it.
            behind = before is not None and isinstance(before.step, Raised)
            step = Raised(SkippedError()) if behind else self._begin(list(rows.values()))
            self._flight = Flight(rows, batch.size, previews, step, perf_counter())
            self.scheduler.commit(batch.samples)
            self._launching_s += 0.1 * (perf_counter() - begun - self._launching_s)
        return before

    def _begin(self, rows: Sequence[Row]) -> Reads:
        try:
            return self.denoiser.launch(rows)
        except Exception as error:  # noqa: BLE001 (as if it had happened on the device)
            return Raised(error)

    def _begin_again(self, flight: Flight) -> None:
        """Queue a step that was skipped once more, in its turn, for the jobs that have not ended."""
        flight.rows = {sample: row for sample, row in flight.rows.items() if not sample.job.over}
        if flight.rows:
            self.denoiser.recover()
            flight.step = self._begin(list(flight.rows.values()))
            flight.size, flight.launched = size_of(flight.rows.values()), perf_counter()

    def _due(self, samples: Sequence[Sample], now: float) -> set[Sample]:
        """Samples whose step somebody wants to see: the first, the last, and some of those between.

        Those are every `preview_every`-th, or else as many as an eye can follow.
        """
        due: set[Sample] = set()
        timely: dict[Job, bool] = {}
        interval_s = max(PREVIEW_INTERVAL_S, len(self._watched) / PREVIEWS_PER_S)
        for sample in samples:
            job, step = sample.job, sample.step + 1
            if job.spec.preview == "none" or not job.last_stage:
                continue
            if job not in timely:
                timely[job] = now - self._progress[job.id].previewed >= interval_s
            every = job.spec.preview_every
            shown = timely[job] or every is not None
            every = every or max(1, sample.steps // PREVIEWS_PER_CHAIN)
            if step in (1, sample.steps) or (shown and step % every == 0):
                due.add(sample)
                self._progress[job.id].previewed = now
        return due

    def _row(self, sample: Sample, *, preview: bool) -> Row:
        job = sample.job
        if sample.slot is None:
            sample.slot = self._free.pop() if self._free else self._slots
            self._slots += sample.slot == self._slots
            self._progress[job.id].begun.append(sample)
        last, measures = sample.step + 1 == sample.steps, job.stage.kind == "measure"
        carried = self._progress[job.id].carried if sample.step == 0 else ()
        if not (preview or last or measures):
            return Row(sample.chain, sample.slot, sample.step, carried)
        kinds = dict.fromkeys(_preview_kinds(job) if preview else ())
        if last and job.last_stage:
            kinds[job.stage.result] = None
        pictures = tuple(_shown(kind, job) for kind in kinds)
        arrays: tuple[Shown, ...] = ("x0",) if measures else ("xt",) if last and not job.last_stage else ()
        return Row(sample.chain, sample.slot, sample.step, carried, pictures, arrays)

    # ── Reading ────────────────────────────────────────────────────────────────────────────────

    def read(self, flight: Flight) -> StepReport:
        """Wait for a step, and deal with what it left for jobs that have not ended meanwhile."""
        events: list[Event] = []
        samples = [sample for sample in flight.rows if not sample.job.over]
        recovered = False
        ran_out: list[tuple[Sequence[Sample], int]] = []

        def recover() -> None:
            nonlocal recovered
            recovered = True
            self.denoiser.recover()

        def again(samples: Sequence[Sample]) -> Sequence[Stepped]:
            recover()
            return self._begin([flight.rows[sample] for sample in samples]).read()

        def probe() -> None:
            recover()
            self.denoiser.probe()

        def out_of_memory(samples: Sequence[Sample]) -> bool:
            size = size_of(flight.rows[sample] for sample in samples)
            # A lone sample may not have fitted because its call was padded to the limit.
            fits = max(1, size // 2) if len(samples) > 1 else size
            narrower = fits < self.scheduler.max_batch_size
            ran_out.append((samples, fits if narrower else 0))
            if narrower:  # for the next try, to begin with
                self._set_batch_limit(fits)
            return narrower

        def first(samples: Sequence[Sample]) -> Sequence[Stepped]:
            try:
                read = dict(zip(flight.rows, flight.step.read(), strict=True))
            except Exception as error:
                if len(samples) == len(flight.rows):
                    raise
                clear_frames(error.__traceback__)
            else:
                return [read[sample] for sample in samples]
            # It may be due to a row that nobody wants any more: without those it is as if skipped.
            raise SkippedError

        if not samples:  # cancelled, but the device is still at it
            with suppress(Exception):
                flight.step.read()
        try:
            done, failures = isolate(first, samples, out_of_memory, again, probe)
        except SkippedError:  # the step before it had failed, and has been dealt with
            done, failures = isolate(again, samples, out_of_memory, probe=probe)
        now = perf_counter()
        seconds = now - max(flight.launched, self._read)
        self._read = now
        if done and not failures:  # a step that was skipped for good took no time
            self.scheduler.times.observe(flight.size, seconds)
            self._limit.made(flight.size, seconds, more=self.scheduler.waiting > 0)
        # What a sample that does not fit alone was in does not say how many of the others do.
        alone = {together[0] for together, fits in ran_out if not fits}
        for together, fits in ran_out:
            if alone.isdisjoint(together):
                self._limit.ran_out(fits)
        self._set_batch_limit(self._limit.rows)

        broken = [sample for sample, stepped in done.items() if not stepped.finite]
        failures |= {each: NonFiniteError("The network gave a NaN or an infinity.") for each in broken}
        for sample in broken:
            del done[sample]
        measured = [sample for sample in done if sample.job.stage.kind == "measure"]
        found, faults = isolate(lambda some: self._measure(some, flight, done), measured)
        failures |= faults
        for sample, error in failures.items():
            events += self._ended(self.scheduler.fail(sample.job.id, error))
        looked_at = [sample for sample, row in flight.rows.items() if row.pictures or row.arrays]
        for job, its in _by_job(looked_at).items():
            if not job.over:
                events += self._advance(job, its, flight, done, found)
        if recovered and self._flight is not None:  # or what is launched next would run before it
            self._begin_again(self._flight)
        return StepReport(events, flight.size, len(done), seconds, len(broken))

    def _set_batch_limit(self, rows: int) -> None:
        if rows != self.scheduler.max_batch_size:
            logger.info("%d rows per step at most, not %d", rows, self.scheduler.max_batch_size)
            self.scheduler.max_batch_size = rows
            self.on_batch_limit(rows)

    def _measure(
        self, samples: Sequence[Sample], flight: Flight, done: dict[Sample, Stepped]
    ) -> list[Measurement]:
        """What the step of each sample found about its image."""
        steps = [flight.rows[sample].step for sample in samples]
        predictions = [done[sample].arrays["x0"] for sample in samples]
        values = self.denoiser.measure([sample.chain for sample in samples], steps, predictions)
        return [
            Measurement(sample.chain.plan.timesteps[step], *value)
            for sample, step, value in zip(samples, steps, values, strict=True)
        ]

    def _advance(
        self,
        job: Job,
        samples: Sequence[Sample],
        flight: Flight,
        done: dict[Sample, Stepped],
        found: dict[Sample, Measurement],
    ) -> Iterator[Event]:
        """Take over what a step left of a job's samples that something is wanted of."""
        progress = self._progress[job.id]
        shown: dict[int, list[Picture]] = {}
        for sample in samples:
            step, stepped, measured = flight.rows[sample].step + 1, done[sample], found.get(sample)
            if measured is not None:
                progress.measurements.setdefault(sample, []).append(measured)

            if sample in flight.previews:
                shown.setdefault(step, []).extend(
                    _picture(sample, kind, stepped, measured) for kind in _preview_kinds(job)
                )
            if step == sample.steps and job.last_stage:
                progress.pictures[sample] = _picture(sample, job.stage.result, stepped, measured)
            elif step == sample.steps:
                progress.left[sample] = stepped.arrays["xt"]
            if step == sample.steps:
                self._release(sample)
        finished = len(progress.pictures if job.last_stage else progress.left) == len(job.samples)
        eta = self.scheduler.eta(job) if shown and not finished else 0.0
        for step, pictures in shown.items():
            chain = next(sample for sample in samples if flight.rows[sample].step + 1 == step).chain
            yield Preview(job.id, step, len(chain.plan), chain.plan.timesteps[step - 1], eta, tuple(pictures))
        if finished:
            yield from self._finish_stage(job)

    def _finish_stage(self, job: Job) -> list[Event]:
        """Finish a job whose stage is done, or begin its next stage from what this one left."""
        progress = self._progress[job.id]
        if not job.last_stage:
            self._progress[job.id] = _Progress(carried=tuple(progress.left[sample] for sample in job.samples))
            self.scheduler.next_stage(job)
            return []
        now = monotonic()
        started = job.started if job.started is not None else now
        pictures = tuple(progress.pictures[sample] for sample in job.samples)
        measured = job.samples if job.stage.kind == "measure" else ()
        measurements = tuple(tuple(progress.measurements[sample]) for sample in measured)
        self.scheduler.finish(job)
        times = started - job.spec.created, now - started
        return self._ended([Finished(job.id, pictures, *times, measurements)])

    def _ended(self, events: list[Event]) -> list[Event]:
        """Let go of what is held for jobs that these events end."""
        for event in events:
            if isinstance(event, Terminal):
                self._watched.discard(event.job_id)
                progress = self._progress.pop(event.job_id, None)
                for sample in progress.begun if progress is not None else ():
                    self._release(sample)
        return events

    def _release(self, sample: Sample) -> None:
        """Give a slot back. A step on its way may still write there; those launched later come after it."""
        if sample.slot is not None:
            self._free.append(sample.slot)
            sample.slot = None


def _by_job(samples: Sequence[Sample]) -> dict[Job, list[Sample]]:
    jobs: dict[Job, list[Sample]] = {}
    for sample in samples:
        jobs.setdefault(sample.job, []).append(sample)
    return jobs


def _picture(sample: Sample, kind: SnapshotKind, stepped: Stepped, measured: Measurement | None) -> Picture:
    pixels = stepped.pictures[_shown(kind, sample.job)]
    return Picture(sample.index, sample.chain.seed, kind, pixels, measured)


def _preview_kinds(job: Job) -> tuple[SnapshotKind, ...]:
    match job.spec.preview:
        case "none":
            return ()
        case "both":
            return "x0", "xt"
        case kind:
            return (kind,)


def _shown(kind: SnapshotKind, job: Job) -> Shown:
    """After the step; but a measurement's x_t is the one that was measured, before it."""
    return "before" if kind == "xt" and job.stage.kind == "measure" else kind
