"""Whatever happens, in whatever order: no sample is lost, made twice or starved, and every count is right."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.engine.engine import Engine
from service.engine.jobs import Job, JobSpec, PreviewKind, State
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Cancelled,
    Event,
    Failed,
    Finished,
    Preview,
    Queued,
    Terminal,
)
from service.engine.scheduler import Batch, Policy
from service.errors import ComputeError, DeadlineError
from tests.service.engine.driven import Device, drain, engine_with, nothing_is_held, results
from tests.service.engine.test_scheduler import STEP_S, read, scheduler, step
from tests.service.fakes import FakeDenoiser, counting_stage, job_of


class Life(RuleBasedStateMachine):
    """Jobs come, are cancelled, fail and expire while none, one or two steps are on their way."""

    @initialize(
        max_batch_size=st.integers(1, 9),
        policy=st.sampled_from(["remaining", "fifo", "sharing"]),
        fifo_interval=st.integers(2, 5),
    )
    def begin(self, max_batch_size: int, policy: Policy, fifo_interval: int) -> None:
        self.under = scheduler(max_batch_size, policy, fifo_interval)
        self.now = 0.0
        self.names: list[str] = []
        self.jobs: dict[str, Job] = {}  # those that were accepted
        self.ends: Counter[str] = Counter()
        self.flights: list[Batch] = []  # launched and not read
        self.bounds: dict[str, tuple[int, float]] = {}  # (step of arrival, how many later it is finished)

    def bound(self, jobs: list[Job]) -> float:
        """Steps until the last of these is finished, whatever comes later: docs/scheduling.md has the proof.

        None is known where stages follow one another, which takes reading results, nor when sharing.
        """
        if self.under.policy == "sharing" or any(len(job.spec.stages) > 1 for job in jobs):
            return math.inf
        rows = self.under.max_batch_size
        guided = any(sample.evaluations == 2 for job in jobs for sample in job.samples)
        rows -= guided and rows > 1
        work = sum(job.remaining for job in jobs)
        longest = max(sample.steps - sample.step for job in jobs for sample in job.samples)
        steps = math.floor(work / rows + longest * (1 - 1 / rows))
        return steps + 1 if self.under.policy == "fifo" else self.under.fifo_interval * steps + 1

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Terminal):
                self.ends[event.job_id] += 1
                assert event.job_id not in self.jobs or self.jobs[event.job_id].over

    @rule(
        stages=st.lists(
            st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 2)), min_size=1, max_size=3
        ),
        patience=st.none() | st.floats(0, 40),
    )
    def add(self, stages: list[tuple[int, int, int]], patience: float | None) -> None:
        older = [job for job in self.jobs.values() if not job.over]
        name = f"job{len(self.names)}"
        deadline = None if patience is None else self.now + patience
        spec = JobSpec(name, "ddim", tuple(counting_stage(*shape) for shape in stages), deadline)
        events = self.under.add(spec, self.now)
        assert len(events) == 1
        assert isinstance(events[0], Queued | Failed)
        self.names.append(name)
        if isinstance(events[0], Queued):
            self.jobs[name] = self.under._jobs[name]
            self.bounds[name] = self.under._steps, self.bound([*older, self.jobs[name]])
        self.take(events)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        was_over = name not in self.jobs or self.jobs[name].over
        events = self.under.cancel(name)
        assert events == ([] if was_over else [Cancelled(name)])
        self.take(events)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        was_over = name not in self.jobs or self.jobs[name].over
        events = self.under.fail(name, ComputeError("on request"))
        assert len(events) == (not was_over)
        self.take(events)

    @rule()
    def cancel_all(self) -> None:
        alive = [name for name, job in self.jobs.items() if not job.over]
        events = self.under.cancel_all()
        assert events == [Cancelled(name) for name in alive]
        self.take(events)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.under.expire(self.now))
        for job in self.jobs.values():
            assert job.over or job.spec.deadline is None or job.spec.deadline >= self.now

    @rule(seconds=st.floats(-1000, 1000))
    def jump(self, seconds: float) -> None:
        """The clock, either way, as that of a machine that was suspended does."""
        self.wait(seconds)

    @rule(rows=st.integers(1, 9))
    def change_the_batch_limit(self, rows: int) -> None:
        if rows < self.under.max_batch_size:
            self.bounds.clear()
        self.under.max_batch_size = rows

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def cancel_between_schedule_and_commit(self) -> None:
        batch = self.under.schedule(self.now)
        for name in dict.fromkeys(sample.job.id for sample in batch.samples[:1]):
            self.take(self.under.cancel(name))
        left = [sample for sample in batch.samples if not sample.job.over]
        backlog = self.under.backlog
        self.under.commit(batch.samples)
        assert backlog - self.under.backlog == sum(s.chain.plan.evaluations[s.step - 1] for s in left)
        self.under.in_flight = batch.size
        self.flights.append(batch)

    @precondition(lambda self: len(self.flights) < 2)
    @rule()
    def launch(self) -> None:
        to_do = [job for job in self.jobs.values() if not job.over and not self.under.stage_done(job)]
        done = len(self.under) - len(to_do)
        before = {sample: sample.step for job in self.jobs.values() for sample in job.samples}
        batch = self.under.schedule(self.now)
        assert batch.size == sum(sample.evaluations for sample in batch.samples)
        alone_at_one = self.under.max_batch_size == 1 and len(batch.samples) == 1
        assert batch.size <= self.under.max_batch_size or (alone_at_one and batch.size == 2)
        assert len(set(batch.samples)) == len(batch.samples) == self.under.running
        assert all(s.step < s.steps and s.job.state is State.RUNNING for s in batch.samples)
        # The look ahead is bounded: jobs that wait for their results can fill it where the limit has fallen.
        assert bool(batch.samples) == bool(to_do) or done >= 4 * self.under.max_batch_size
        backlog = self.under.backlog
        advanced = self.under.commit(batch.samples)
        assert [sample for its in advanced.values() for sample in its] == sorted(
            batch.samples, key=lambda sample: list(advanced).index(sample.job)
        )
        assert backlog - self.under.backlog == batch.size
        self.under.in_flight = batch.size
        self.flights.append(batch)
        for sample, made in before.items():
            assert sample.step == made + (sample in batch.samples)

    @precondition(lambda self: self.flights)
    @rule()
    def read(self) -> None:
        before = self.under.backlog, self.under._steps
        batch = self.flights.pop(0)
        for name in read(self.under, batch, self.flights):
            self.ends[name] += 1
            assert self.jobs[name].state is State.FINISHED
            assert self.jobs[name].remaining == 0
        assert (self.under.backlog, self.under._steps) == before  # it has been counted

    @invariant()
    def counters_equal_a_recount(self) -> None:
        if not hasattr(self, "jobs"):
            return
        alive = [job for job in self.jobs.values() if not job.over]
        unfinished = [s for job in alive for s in job.samples if s.step < s.steps]
        assert len(self.under) == len(alive)
        assert self.under.backlog == sum(job.remaining for job in alive)
        assert self.under.running + self.under.waiting == len(unfinished)
        assert min(self.under.running, self.under.waiting) >= 0
        for job in alive:
            later = sum(stage.evaluations for stage in job.spec.stages[job.place + 1 :])
            assert job.remaining == sum(s.remaining for s in job.samples) + later
            assert self.under.stage_done(job) == all(s.step == s.steps for s in job.samples)
            if self.under.stage_done(job):  # then a step of it has not been read
                assert any(sample.job is job for batch in self.flights for sample in batch.samples)
            arrived, bound = self.bounds.get(job.id, (0, math.inf))
            assert self.under.stage_done(job) or self.under._steps - arrived <= bound, "it starves"
            assert self.under.eta(job) > 0 or job.remaining == self.under.in_flight == 0
            assert self.under.eta(job) >= (STEP_S if self.under.in_flight else 0.0)
        assert self.ends == Counter(
            name for name in self.names if name not in self.jobs or self.jobs[name].over
        )

    def teardown(self) -> None:
        if not hasattr(self, "jobs"):
            return
        while self.flights:
            self.read()
        for _ in range(self.under.backlog):
            self.ends.update(step(self.under, self.now))
        assert len(self.under) == self.under.backlog == 0
        assert self.ends == Counter(dict.fromkeys(self.names, 1))


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


# ── The engine ─────────────────────────────────────────────────────────────────────────────────

FINE, RAISE, TOO_LARGE, NAN = range(24), (100, 101), (110,), (120, 121)
"""Seeds, by what becomes of their samples."""
BROKEN = frozenset((*RAISE, *TOO_LARGE, *NAN))


@cache
def pictures(seed: int, steps: int) -> bytes:
    """What a chain leaves when it is made alone."""
    (found,) = results(drain(engine_with(FakeDenoiser(), job_of("a", [seed], steps)))).values()
    return found[0]


class Watched(Device):
    """Notes what is launched under which limit."""

    def launch(self, rows: Any) -> Any:
        size = sum(row.chain.plan.evaluations[row.step] for row in rows)
        assert size <= self.limit() or (len(rows) == 1 and size == 2)
        assert len({row.slot for row in rows}) == len({id(row.chain) for row in rows}) == len(rows) > 0
        return super().launch(rows)

    def limit(self) -> int:
        raise NotImplementedError


class EngineLife(RuleBasedStateMachine):
    """Jobs come and go while steps fail, memory runs out, the clock jumps and engines die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.clock = patch("service.engine.engine.monotonic", lambda: self.now)
        self.clock.start()
        self.specs: dict[str, JobSpec] = {}
        self.alive: dict[str, JobSpec] = {}
        self.shown: Counter[tuple[str, int]] = Counter()  # previews since the engine began, by job and step
        self.fit = 16
        self.prompt = False
        self.engine = self.started()

    @initialize(prompt=st.booleans())
    def begin(self, prompt: bool) -> None:
        self.prompt = prompt
        self.engine = self.started()

    def started(self) -> Engine:
        faults = {**dict.fromkeys(RAISE, ValueError), **dict.fromkeys(TOO_LARGE, torch.OutOfMemoryError)}
        device = Watched(prompt=self.prompt, raises=faults, gives_nan=set(NAN), rows_that_fit=self.fit)
        engine = engine_with(device, max_batch_size=8)
        # What was launched before the limit fell may be launched again as it was.
        limits = [8]
        engine.on_batch_limit = limits.append
        device.limit = lambda: max(limits)  # type: ignore[method-assign]
        return engine

    def take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Preview):
                assert event.job_id in self.alive
                self.shown[event.job_id, event.step] += len(event.pictures)
                chains = self.specs[event.job_id].stages[0].chains
                assert self.shown[event.job_id, event.step] <= len(chains), "a step was shown twice"
            elif isinstance(event, Terminal):
                self.end(self.alive.pop(event.job_id), event)

    def end(self, spec: JobSpec, event: Event) -> None:
        chains = spec.stages[0].chains
        match event:
            case Failed(_, error):
                if isinstance(error, DeadlineError):
                    assert spec.deadline is not None
                    assert spec.deadline < self.now + 1
                else:
                    assert any(chain.seed in BROKEN for chain in chains), f"{error!r}, but nothing was wrong"
            case Finished(_, made):
                assert not any(chain.seed in BROKEN for chain in chains)
                expected = [pictures(chain.seed, len(chain.plan)) for chain in chains]
                assert [picture.pixels.tobytes() for picture in made] == expected

    @rule(
        seeds=st.lists(st.sampled_from([*FINE, *BROKEN]), min_size=1, max_size=5, unique=True),
        steps=st.integers(1, 5),
        guided=st.booleans(),
        preview=st.sampled_from(["none", "x0"]),
        patience=st.none() | st.floats(0.0, 30),
    )
    def add(
        self, seeds: list[int], steps: int, guided: bool, preview: PreviewKind, patience: float | None
    ) -> None:
        name = f"job{len(self.specs)}"
        deadline = None if patience is None else self.now + patience
        spec = job_of(name, seeds, steps, 2.0 if guided else 1.0, preview, deadline)
        self.specs[name] = self.alive[name] = spec
        events = self.engine.handle(AddJob(spec))
        assert len(events) == 1
        assert isinstance(events[0], Queued | Failed)
        self.take(events)

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.specs)))
        events = self.engine.handle(CancelJob(name))
        assert events == ([Cancelled(name)] if name in self.alive else [])
        self.take(events)

    @rule()
    def abort(self) -> None:
        assert self.engine.handle(AbortAll()) == [Cancelled(name) for name in self.alive]
        self.alive.clear()

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            report = self.engine.step()
            self.take(report.events if report is not None else [])

    @rule(seconds=st.floats(-100, 100))
    def jump(self, seconds: float) -> None:
        self.now += seconds

    @rule(rows=st.integers(2, 16))
    def have_memory(self, rows: int) -> None:
        assert isinstance(self.engine.denoiser, Watched)
        self.fit = self.engine.denoiser.rows_that_fit = rows

    @rule(prompt=st.booleans())
    def die(self, prompt: bool) -> None:
        """And be replaced by an engine that gets the specs of all jobs in flight."""
        self.prompt = prompt
        self.engine = self.started()
        self.shown.clear()
        for spec in list(self.alive.values()):
            self.take(self.engine.handle(AddJob(spec)))

    @invariant()
    def counters_equal_a_recount(self) -> None:
        jobs = self.engine.scheduler._jobs
        assert list(jobs) == list(self.alive) == list(self.engine._progress)
        samples = [sample for job in jobs.values() for sample in job.samples if sample.step < sample.steps]
        load = self.engine.load
        assert load.running + load.waiting == len(samples)
        assert load.backlog == sum(sample.remaining for sample in samples)
        held = [sample.slot for each in self.engine._progress.values() for sample in each.begun]
        slots = [slot for slot in held if slot is not None]
        assert sorted([*slots, *self.engine._free]) == list(range(self.engine._slots))

    def teardown(self) -> None:
        try:
            for _ in range(200):
                self.steps(1)
            assert not self.alive, "it was lost"
            assert nothing_is_held(self.engine)
        finally:
            self.clock.stop()


TestEngineLife = EngineLife.TestCase
TestEngineLife.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
