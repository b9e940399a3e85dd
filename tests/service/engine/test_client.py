"""The API's end of the engines: slots are exact, every job ends, and it says when it is stuck."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from model.chain import Chain, InitialLatent, SphericalMix
from service import __version__
from service.engine import worker
from service.engine.client import LOCATE_S, EngineClient
from service.engine.engine import Engine
from service.engine.estimates import StepTimes
from service.engine.jobs import JobSpec, Stage
from service.engine.messages import (
    Cancelled,
    EngineConfig,
    Event,
    Failed,
    Finished,
    Preview,
    Queued,
    Terminal,
)
from service.engine.warmup import Warm
from service.engine.worker import Phase
from service.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    EngineDeadError,
    LoadingError,
    QueueFullError,
    ServiceError,
)
from service.telemetry import Telemetry
from tests.service.fakes import PATIENCE_S, FakeDenoiser, fake_engine, fake_info, fake_model, job_of, until
from tests.service.threads import ThreadConnection

Build = Callable[[], Warm]


class OnLoop:
    """A client whose methods are called on the event loop, from anywhere else."""

    def __init__(self, client: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client, self._loop = client, loop

    def __getattr__(self, name: str) -> Any:
        async def called(*arguments: Any) -> Any:
            result = getattr(self._client, name)(*arguments)
            return await result if inspect.isawaitable(result) else result

        def call(*arguments: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(called(*arguments), self._loop).result(PATIENCE_S)

        found = getattr(self._client, name)
        return call if callable(found) else found


class Served:
    """A client with its engines, and what was published."""

    def __init__(self, capacity: int, build: Build | None, max_batch_size: int, stall_s: float) -> None:
        self.denoiser = FakeDenoiser()
        self.gate = self.denoiser.gate
        self.telemetry = Telemetry()
        self.events: list[Event] = []
        self.engines: list[Engine] = []
        self.connections: list[ThreadConnection] = []

        def by_default() -> Warm:
            self.engines.append(fake_engine(self.denoiser, max_batch_size))
            return Warm(self.engines[-1], fake_info(max_batch_size), fake_model())

        def connect(config: EngineConfig) -> ThreadConnection:
            self.connections.append(ThreadConnection(config, lambda _config: (build or by_default)()))
            return self.connections[-1]

        self.publish = self.events.append
        self.of_client = EngineClient(
            connect,
            [EngineConfig("tiny")],
            lambda event: self.publish(event),
            self.telemetry,
            capacity=capacity,
            stall_s=stall_s,
        )
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.client: Any = OnLoop(self.of_client, self.loop)
        self.client.start()
        if build is None:
            until(lambda: self.client.phase is Phase.READY)

    def stop(self) -> None:
        self.client.abort(CancelledError("the test is over"))
        self.gate.open()
        self.client.stop()
        assert self.client.phase in (Phase.STOPPED, Phase.DEAD)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE_S)
        self.loop.close()

    def end_of(self, job: JobSpec) -> Terminal:
        until(lambda: any(isinstance(e, Terminal) and e.job_id == job.id for e in list(self.events)), job.id)
        (end,) = [e for e in self.events if isinstance(e, Terminal) and e.job_id == job.id]
        return end

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0


Start = Callable[..., Served]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[Served] = []

    def begin(
        capacity: int = 8, build: Build | None = None, max_batch_size: int = 8, stall_s: float = 60.0
    ) -> Served:
        running.append(Served(capacity, build, max_batch_size, stall_s))
        return running[-1]

    yield begin
    for served in running:
        served.stop()


def test_a_job_is_queued_run_and_finished(start: Start) -> None:
    served = start()
    job = job_of("a", [1, 2], steps=3)
    served.client.submit(job)
    assert isinstance(served.end_of(job), Finished)
    assert isinstance(served.events[0], Queued)
    until(lambda: served.client.idle)
    assert served.denoiser.widths == [2, 2, 2]
    until(lambda: served.metric("ddpm_steps_total") == 6)
    assert served.metric("ddpm_images_generated_total", sampler="ddim") == 2
    assert served.metric("ddpm_batch_rows_sum") == 6
    assert served.metric("ddpm_network_evaluations_total") == 6
    assert (served.metric("ddpm_slots"), served.metric("ddpm_slots_in_use")) == (8, 0)
    assert served.metric("ddpm_step_duration_seconds_count") == 3
    assert served.metric("ddpm_queue_duration_seconds_count") == 1
    assert served.metric("ddpm_last_step_timestamp_seconds") == pytest.approx(time.time(), abs=60)


def test_guided_steps_count_as_two_network_evaluations(start: Start) -> None:
    served = start()
    served.client.submit(job := job_of("a", [1], steps=3, guidance_scale=2.0))
    assert isinstance(served.end_of(job), Finished)
    until(lambda: served.metric("ddpm_steps_total") == 3)
    assert served.metric("ddpm_network_evaluations_total") == 6


def test_slots_in_use_are_those_of_jobs_in_flight(start: Start) -> None:
    served = start()
    served.gate.shut()
    for job in (first := job_of("a", [1, 2, 3]), second := job_of("b", [4, 5])):
        served.client.submit(job)
    assert served.metric("ddpm_slots_in_use") == 5
    served.client.cancel(first.id)
    served.gate.allow()  # takes effect after the step
    until(lambda: served.metric("ddpm_slots_in_use") == 2)
    served.gate.open()
    assert isinstance(served.end_of(second), Finished)
    until(lambda: served.metric("ddpm_slots_in_use") == 0)


def test_what_can_be_refused_or_fail_is_counted_from_zero(start: Start) -> None:
    served = start()
    value = served.telemetry.registry.get_sample_value
    assert value("ddpm_rejected_total", {"reason": "queue_full"}) == 0
    assert value("ddpm_jobs_failed_total", {"reason": "engine_killed"}) == 0
    reasons = {
        code
        for kind in ServiceError.__subclasses__()
        for code in (kind.code, *(c.code for c in kind.__subclasses__()))
    }
    for name in ("ddpm_rejected", "ddpm_jobs_failed"):
        (family,) = [each for each in served.telemetry.registry.collect() if each.name == name]
        assert {sample.labels["reason"] for sample in family.samples} <= reasons


def test_a_job_that_fails_is_counted_by_its_reason(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    served = start()
    served.denoiser.gives_nan.add(7)
    served.client.submit(job := job_of("a", [7]))
    assert isinstance(served.end_of(job), Failed)
    assert served.metric("ddpm_jobs_failed_total", reason="non_finite") == 1
    assert served.metric("ddpm_rejected_total", reason="non_finite") == 0
    assert "job a failed, non_finite: " in caplog.text
    assert "sampler ddim, seeds 7" in caplog.text


# ── Slots ──────────────────────────────────────────────────────────────────────────────────────


def submit_at_once(served: Served, jobs: list[JobSpec]) -> tuple[list[JobSpec], list[QueueFullError]]:
    """Submit from a thread each, all let go together."""
    barrier = threading.Barrier(len(jobs))
    admitted: list[JobSpec] = []
    refused: list[QueueFullError] = []

    def submit(job: JobSpec) -> None:
        barrier.wait(PATIENCE_S)
        try:
            served.client.submit(job)
        except QueueFullError as error:
            refused.append(error)
        else:
            admitted.append(job)

    threads = [threading.Thread(target=submit, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return admitted, refused


def test_exactly_as_many_are_admitted_as_there_are_slots(start: Start) -> None:
    served = start(capacity=8)
    served.gate.shut()
    admitted, refused = submit_at_once(served, [job_of(f"job{i}", [i]) for i in range(80)])
    assert (len(admitted), len(refused)) == (8, 72)
    assert all(error.retry_after_s >= 1 for error in refused)
    assert served.metric("ddpm_rejected_total", reason="queue_full") == 72
    served.gate.open()
    for job in admitted:
        assert isinstance(served.end_of(job), Finished)
    until(lambda: served.client.idle)
    ends = Counter(event.job_id for event in served.events if isinstance(event, Terminal))
    assert ends == Counter(job.id for job in admitted)


def test_slots_count_images_and_are_freed(start: Start) -> None:
    served = start(capacity=8)
    served.gate.shut()
    served.client.submit(job_of("five", range(5)))
    with pytest.raises(QueueFullError, match="5 of 8 images"):
        served.client.submit(job_of("four", range(4)))
    served.client.submit(three := job_of("three", range(3)))
    served.client.cancel("five")
    served.gate.open()
    served.end_of(three)
    until(lambda: served.client.idle)
    served.client.submit(eight := job_of("eight", range(8)))
    assert isinstance(served.end_of(eight), Finished)


def test_retry_after_follows_the_backlog(start: Start) -> None:
    served = start(capacity=8, max_batch_size=8)
    served.engines[0].scheduler.times = StepTimes([(8, 2.0)])
    served.gate.shut()
    served.client.submit(job_of("work", range(8), steps=31))
    served.gate.allow(1)
    served.gate.wait_for_arrival(2)
    with pytest.raises(QueueFullError) as refused:
        served.client.submit(job_of("more", range(4)))
    # 30 steps of nearly 2 s are left, and no image gives its slot back before the others of its request.
    assert refused.value.retry_after_s == pytest.approx(30 * 2.0, rel=0.15)


# ── Jobs of two stages ─────────────────────────────────────────────────────────────────────────


def two_stages(deadline: float | None = None) -> JobSpec:
    """Two images in three steps, then three in two, from what the first ones left."""
    first = job_of("a", [1, 2], 3).stages[0]
    plan = job_of("a", [0], 2).stages[0].chains[0].plan
    starts = [InitialLatent(carried=SphericalMix(0, 1, share)) for share in (0.0, 0.5, 1.0)]
    second = tuple(Chain(plan, 20 + i, start=start) for i, start in enumerate(starts))
    stages = Stage("invert", first.chains), Stage("denoise", second)
    return JobSpec("a", "ddim", stages, deadline, created=time.monotonic())


def test_a_stage_takes_the_slots_of_the_one_before_it(start: Start) -> None:
    served = start()
    served.client.submit(spec := two_stages())
    finished = served.end_of(spec)
    assert isinstance(finished, Finished)
    assert [picture.seed for picture in finished.pictures] == [20, 21, 22]
    assert [type(event) for event in served.events] == [Queued, Finished]
    assert served.denoiser.widths == [2, 2, 2, 3, 3]
    until(lambda: served.client.idle)
    assert served.metric("ddpm_images_generated_total", sampler="ddim") == 3
    assert served.metric("ddpm_queue_duration_seconds_count") == 1
    served.client.submit(eight := job_of("eight", range(8)))  # all slots are free again
    assert isinstance(served.end_of(eight), Finished)


def test_slots_are_kept_for_the_largest_stage(start: Start) -> None:
    served = start(capacity=4)
    served.gate.shut()
    served.client.submit(two_stages())
    with pytest.raises(QueueFullError, match="3 of 4 images"):
        served.client.submit(job_of("two", [1, 2]))
    served.gate.allow(3)
    served.gate.wait_for_arrival(4)
    with pytest.raises(QueueFullError, match="3 of 4 images"):
        served.client.submit(job_of("two", [1, 2]))


def test_a_job_whose_later_stage_does_not_fit_is_not_begun(start: Start) -> None:
    served = start(capacity=4)
    served.gate.shut()
    served.client.submit(job_of("two", [1, 2]))
    with pytest.raises(QueueFullError, match="3 more do not fit"):
        served.client.submit(two_stages())


def test_a_drain_waits_for_later_stages(start: Start) -> None:
    served = start()
    served.gate.shut()
    served.client.submit(spec := two_stages())
    served.gate.wait_for_arrival(1)
    served.client.drain()
    served.gate.open()
    assert isinstance(served.end_of(spec), Finished)
    until(lambda: served.client.phase is Phase.STOPPED)
    assert len(served.denoiser.widths) == 5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_job_is_cancelled_in_either_stage(start: Start, steps: int) -> None:
    served = start()
    served.gate.shut()
    served.client.submit(spec := two_stages())
    served.gate.allow(steps - 1)
    served.gate.wait_for_arrival(steps)
    served.client.cancel("a")
    served.gate.open()
    assert served.end_of(spec) == Cancelled("a")
    until(lambda: served.client.idle)
    until(lambda: served.engines[0].idle)
    assert len(served.denoiser.widths) <= steps + 1  # the one that had been launched
    assert served.metric("ddpm_cancelled_total") == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_a_deadline_ends_either_stage(start: Start, steps: int) -> None:
    served = start()
    served.gate.shut()
    served.client.submit(spec := two_stages(deadline := time.monotonic() + 0.3))
    served.gate.allow(steps - 1)
    served.gate.wait_for_arrival(steps)
    until(lambda: time.monotonic() > deadline, "the deadline")
    served.gate.open()
    failed = served.end_of(spec)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DeadlineError)
    until(lambda: served.engines[0].idle)
    assert len(served.denoiser.widths) <= steps + 1


# ── Ends ───────────────────────────────────────────────────────────────────────────────────────


def test_a_job_cancelled_during_a_step_is_gone_after_it(start: Start) -> None:
    served = start()
    served.gate.shut()
    gone, neighbour = job_of("gone", [1], steps=9), job_of("neighbour", [2], steps=3)
    served.client.submit(gone)
    served.gate.wait_for_arrival(1)
    served.client.submit(neighbour)
    served.client.cancel("gone")
    served.client.cancel("gone")
    served.client.cancel("never heard of")
    served.gate.open()
    assert served.end_of(gone) == Cancelled("gone")
    assert isinstance(served.end_of(neighbour), Finished)
    assert served.metric("ddpm_cancelled_total") == 1
    assert Counter(seed for seed, _ in served.denoiser.seen) == {1: 2, 2: 3}


def test_the_gauges_fall_when_the_last_job_is_cancelled(start: Start) -> None:
    served = start()
    seen: list[float] = []

    def cancel_at_the_first_preview(event: Event) -> None:
        served.events.append(event)
        if isinstance(event, Preview) and not seen:
            running = served.metric("ddpm_samples_running")
            served.of_client.cancel(event.job_id)
            seen.append(running)

    served.publish = cancel_at_the_first_preview
    served.gate.shut()
    served.client.submit(job := job_of("a", [1, 2], steps=9, preview="x0"))
    served.gate.allow(1)
    until(lambda: seen)
    served.gate.open()
    assert served.end_of(job) == Cancelled("a")
    assert seen == [2]
    until(lambda: served.metric("ddpm_samples_running") == 0)


def test_a_hopeless_deadline_is_a_refusal(start: Start) -> None:
    served = start()
    job = job_of("late", [1], deadline=0.0)
    served.client.submit(job)
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineError)
    assert served.metric("ddpm_rejected_total", reason="deadline_exceeded") == 1
    until(lambda: served.client.idle)


def test_a_nan_is_counted(start: Start) -> None:
    served = start()
    served.denoiser.gives_nan = {1}
    served.client.submit(job := job_of("a", [1]))
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert end.error.code == "non_finite"
    assert served.metric("ddpm_nonfinite_total") == 1


def test_abort_ends_all_jobs(start: Start) -> None:
    served = start(max_batch_size=1)
    served.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2])]
    for job in jobs:
        served.client.submit(job)
    served.gate.wait_for_arrival(1)
    served.client.abort(DrainingError("stopping", 5.0))
    served.gate.open()
    for job in jobs:
        end = served.end_of(job)
        assert isinstance(end, Failed)
        assert end.error.code == "draining"
    until(lambda: served.client.idle)


# ── Life ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_accepted_while_loading(start: Start) -> None:
    loaded = threading.Event()
    engine = fake_engine(FakeDenoiser())

    def build() -> Warm:
        assert loaded.wait(PATIENCE_S)
        return Warm(engine, fake_info(), fake_model())

    served = start(build=build)
    assert served.client.phase is Phase.LOADING
    assert served.metric("ddpm_ready") == 0
    assert served.client.alive()
    with pytest.raises(LoadingError) as refused:
        served.client.submit(job_of("early", [1]))
    assert refused.value.retry_after_s > 0
    assert served.client.idle
    loaded.set()
    until(lambda: served.client.phase is Phase.READY)
    assert served.metric("ddpm_ready") == 1


def test_draining_finishes_what_is_in_flight_and_accepts_nothing_new(start: Start) -> None:
    served = start(max_batch_size=1)
    served.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2])]
    for job in jobs:
        served.client.submit(job)
    served.gate.wait_for_arrival(1)
    served.client.drain()
    assert served.client.phase is Phase.DRAINING
    assert served.metric("ddpm_ready") == 0
    with pytest.raises(DrainingError):
        served.client.submit(job_of("late", [3]))
    served.gate.open()
    for job in jobs:
        assert isinstance(served.end_of(job), Finished)
    until(lambda: served.client.phase is Phase.STOPPED)
    with pytest.raises(DrainingError):
        served.client.submit(job_of("later", [4]))


def test_draining_an_idle_engine_stops_it(start: Start) -> None:
    served = start()
    served.client.drain()
    until(lambda: served.client.phase is Phase.STOPPED)


def test_draining_while_loading_stops_it_too(start: Start) -> None:
    loaded = threading.Event()

    def build() -> Warm:
        assert loaded.wait(PATIENCE_S)
        return Warm(fake_engine(FakeDenoiser()), fake_info(), fake_model())

    served = start(build=build)
    served.client.drain()
    until(lambda: served.client.phase is Phase.STOPPED)  # without waiting for it
    loaded.set()


def test_an_engine_that_is_given_up_gives_every_job_an_end(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DEATHS", 1)
    served = start(max_batch_size=1)
    served.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2]), job_of("in the inbox", [3])]
    served.client.submit(jobs[0])
    served.gate.wait_for_arrival(1)
    served.client.submit(jobs[1])
    served.gate.allow(1)
    served.gate.wait_for_arrival(2)
    served.client.submit(jobs[2])
    served.denoiser.raises = dict.fromkeys((1, 2, 3), torch.AcceleratorError)
    served.gate.open()
    for job in jobs:
        end = served.end_of(job)
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineDeadError)
    assert served.client.phase is Phase.DEAD
    assert served.client.exit_code == 1
    assert not served.client.alive()
    assert served.metric("ddpm_ready") == 0
    assert "the engine has failed" in caplog.text
    with pytest.raises(EngineDeadError):
        served.client.submit(job_of("late", [4]))


def test_a_network_that_cannot_be_built_is_a_failed_engine(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> Warm:
        raise RuntimeError("no such device")

    served = start(build=build)
    until(lambda: served.client.phase is Phase.DEAD)
    assert "no such device" in caplog.text


def test_it_is_alive_unless_work_waits_too_long(start: Start) -> None:
    served = start(stall_s=60.0)
    idle_for_long = time.monotonic() + 10_000
    assert served.client.alive(idle_for_long)
    served.gate.shut()
    served.client.submit(job := job_of("a", [1], steps=2))
    served.gate.wait_for_arrival(1)
    now = time.monotonic()
    assert served.client.alive(now + 179)
    assert not served.client.alive(now + 181)
    served.gate.open()
    served.end_of(job)
    until(lambda: served.client.idle)
    assert served.client.alive(now + 10_000)


def test_being_idle_for_long_is_no_delay(start: Start) -> None:
    served = start(stall_s=60.0)
    served.of_client._workers[0].heard = time.monotonic() - 10_000
    served.gate.shut()
    served.client.submit(job_of("a", [1]))
    assert served.client.alive()


# ── Reports ────────────────────────────────────────────────────────────────────────────────────


def test_what_runs_is_known_once_the_engine_is_warm(start: Start) -> None:
    served = start()
    info = fake_info()
    assert served.client.info == info
    labels = {"model": "tiny", "runtime": "fake", "device": "cpu", "dtype": "float32", "version": __version__}
    assert served.metric("ddpm_model_info", **labels) == 1


def test_a_job_that_fails_while_it_runs_is_not_counted_as_rejected(start: Start) -> None:
    served = start()
    served.denoiser.raises = {1: ValueError}
    served.client.submit(job := job_of("a", [1]))
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert end.started
    assert served.metric("ddpm_rejected_total", reason="compute_failed") == 0


# ── How far a job is ───────────────────────────────────────────────────────────────────────────


def test_a_job_is_located_by_its_engine(start: Start) -> None:
    served = start(max_batch_size=1)
    served.gate.shut()
    first, second = job_of("a", [1], steps=5), job_of("b", [2], steps=9)
    served.client.submit(first)
    served.gate.wait_for_arrival(1)
    served.client.submit(second)
    asked = asyncio.run_coroutine_threadsafe(served.of_client.locate("b"), served.loop)
    until(lambda: served.of_client._in_flight["b"].located, "the question")
    served.gate.allow(1)
    found = asked.result(PATIENCE_S)
    assert found is not None
    assert (found.job_id, found.position, found.running) == ("b", 1, False)
    served.gate.open()
    served.end_of(second)
    until(lambda: served.client.idle)
    assert served.client.locate("b") is None


def test_a_job_that_ends_while_it_is_asked_for_is_not_in_flight(start: Start) -> None:
    served = start()
    served.gate.shut()
    served.client.submit(job_of("a", [1], steps=1))
    served.gate.wait_for_arrival(1)
    asked = asyncio.run_coroutine_threadsafe(served.of_client.locate("a"), served.loop)
    until(lambda: served.of_client._in_flight["a"].located, "the question")
    served.gate.open()
    assert asked.result(PATIENCE_S) is None


def test_an_engine_that_does_not_answer_leaves_what_was_last_heard(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.client.LOCATE_S", 0.02)
    served = start(max_batch_size=1)
    served.gate.shut()
    served.client.submit(job_of("a", [1], steps=5))
    served.gate.wait_for_arrival(1)
    served.client.submit(job_of("b", [2], steps=9))
    assert served.client.locate("a").running
    found = served.client.locate("b")
    assert (found.running, found.position, found.eta_s) == (False, None, None)  # the engine is in its step
    assert served.client.has("b")
    assert not served.client.has("c")


def test_no_engine_is_asked_while_it_is_being_replaced(start: Start) -> None:
    served = start()
    served.gate.shut()
    served.client.submit(job_of("a", [1], steps=5))
    served.gate.wait_for_arrival(1)
    (only,) = served.of_client._workers
    only._ready = False
    begun = time.monotonic()
    assert served.client.locate("a").job_id == "a"
    assert time.monotonic() - begun < LOCATE_S
    only._ready = True
