"""The worker's thread: room is exact, every job ends, and it says when it is stuck."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from service.events import Cancelled, Event, Failed, Finished, Picture, Preview, Queued, Terminal
from service.jobs import Job, Sequel, State
from service.scheduler import StepTimes
from service.worker import Phase, Worker

from model.denoiser import Chain
from model.samplers import build_plan
from service.engine import Engine
from service.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    LoadingError,
    QueueFullError,
    WorkerDeadError,
)
from service.telemetry import Telemetry
from tests.service.fakes import PATIENCE_S, SCHEDULE, FakeDenoiser, fake_engine, job_of, until


class House:
    """A worker and what it published."""

    def __init__(
        self, capacity: int, build: Callable[[], Engine] | None, max_rows: int, stall_s: float
    ) -> None:
        self.denoiser = FakeDenoiser()
        self.gate = self.denoiser.gate
        self.telemetry = Telemetry()
        self.events: list[Event] = []
        self.engine = fake_engine(self.denoiser, max_rows)
        self.worker = Worker(
            build or (lambda: self.engine),
            self.events.append,
            self.telemetry,
            capacity=capacity,
            stall_s=stall_s,
        )
        self.worker.start()
        if build is None:
            until(lambda: self.worker.phase is Phase.READY)

    def end_of(self, job: Job) -> Terminal:
        until(lambda: any(isinstance(e, Terminal) and e.job_id == job.id for e in list(self.events)), job.id)
        (end,) = [e for e in self.events if isinstance(e, Terminal) and e.job_id == job.id]
        return end

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, labels) or 0.0


Start = Callable[..., House]


@pytest.fixture
def start() -> Iterator[Start]:
    running: list[House] = []

    def begin(
        capacity: int = 8,
        build: Callable[[], Engine] | None = None,
        max_rows: int = 8,
        stall_s: float = 60.0,
    ) -> House:
        running.append(House(capacity, build, max_rows, stall_s))
        return running[-1]

    yield begin
    for house in running:
        house.worker.abort(CancelledError("the test is over"))
        house.worker.drain()
        house.gate.open()
        house.worker.join(PATIENCE_S)
        assert house.worker.phase in (Phase.STOPPED, Phase.DEAD)


def test_a_job_is_queued_run_and_finished(start: Start) -> None:
    house = start()
    job = job_of("a", [1, 2], steps=3)
    house.worker.submit(job)
    assert isinstance(house.end_of(job), Finished)
    assert isinstance(house.events[0], Queued)
    until(lambda: house.worker.idle)
    assert house.denoiser.widths == [2, 2, 2]
    until(lambda: house.metric("ddpm_steps_total") == 6)
    assert house.metric("ddpm_images_generated_total", sampler="ddim") == 2
    assert house.metric("ddpm_batch_rows_sum") == 6
    assert house.metric("ddpm_step_duration_seconds_count") == 3
    assert house.metric("ddpm_queue_duration_seconds_count") == 1
    assert house.metric("ddpm_last_step_timestamp_seconds") == pytest.approx(time.time(), abs=60)


# ── Room ───────────────────────────────────────────────────────────────────────────────────────


def submit_at_once(house: House, jobs: list[Job]) -> tuple[list[Job], list[QueueFullError]]:
    """Submit from a thread each, all let go together."""
    barrier = threading.Barrier(len(jobs))
    admitted: list[Job] = []
    refused: list[QueueFullError] = []

    def submit(job: Job) -> None:
        barrier.wait(PATIENCE_S)
        try:
            house.worker.submit(job)
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


def test_exactly_as_many_are_admitted_as_there_is_room_for(start: Start) -> None:
    house = start(capacity=8)
    house.gate.shut()
    admitted, refused = submit_at_once(house, [job_of(f"job{i}", [i]) for i in range(80)])
    assert (len(admitted), len(refused)) == (8, 72)
    assert all(error.retry_after_s >= 1 for error in refused)
    assert house.metric("ddpm_rejected_total", reason="queue_full") == 72
    house.gate.open()
    for job in admitted:
        assert isinstance(house.end_of(job), Finished)
    until(lambda: house.worker.idle)
    ends = Counter(event.job_id for event in house.events if isinstance(event, Terminal))
    assert ends == Counter(job.id for job in admitted)


def test_room_counts_images_and_comes_back(start: Start) -> None:
    house = start(capacity=8)
    house.gate.shut()
    house.worker.submit(job_of("five", range(5)))
    with pytest.raises(QueueFullError, match="5 of 8 images"):
        house.worker.submit(job_of("four", range(4)))
    house.worker.submit(three := job_of("three", range(3)))
    house.worker.cancel("five")
    house.gate.open()
    house.end_of(three)
    until(lambda: house.worker.idle)
    house.worker.submit(eight := job_of("eight", range(8)))
    assert isinstance(house.end_of(eight), Finished)


def test_retry_after_follows_the_backlog(start: Start) -> None:
    house = start(capacity=8, max_rows=8)
    house.engine.scheduler.times = StepTimes([(8, 2.0)])
    house.gate.shut()
    house.worker.submit(job_of("work", range(8), steps=31))
    house.gate.allow(1)
    house.gate.wait_for_arrival(2)
    with pytest.raises(QueueFullError) as refused:
        house.worker.submit(job_of("more", range(4)))
    # 30 steps of nearly 2 s are left, and half of the images have to go.
    assert refused.value.retry_after_s == pytest.approx(30 * 2.0 / 2, rel=0.15)


# ── Jobs in two parts ──────────────────────────────────────────────────────────────────────────


def in_two_parts(deadline: float | None = None) -> tuple[Job, Job]:
    """Two images in three steps, then three in two, whose seeds the first ones' say."""
    first, last = (
        job_of("a", seeds, steps, deadline=deadline) for seeds, steps in (([1, 2], 3), ([0] * 3, 2))
    )

    def chains(pictures: Sequence[Picture]) -> list[Chain]:
        assert all(picture.latent is not None for picture in pictures)
        plan = build_plan(SCHEDULE, "ddim", 2)
        return [Chain(plan, 10 * pictures[1].seed + i) for i in range(3)]

    first.sequel = Sequel(last, chains)
    return first, last


def test_a_sequel_takes_its_jobs_place(start: Start) -> None:
    house = start()
    first, last = in_two_parts()
    house.worker.submit(first)
    finished = house.end_of(first)
    assert isinstance(finished, Finished)
    assert [picture.seed for picture in finished.pictures] == [20, 21, 22]
    assert [type(event) for event in house.events] == [Queued, Finished]
    assert house.denoiser.widths == [2, 2, 2, 3, 3]
    assert (first.state, last.state) == (State.FINISHED, State.FINISHED)
    until(lambda: house.worker.idle)
    assert house.metric("ddpm_images_generated_total", sampler="ddim") == 3
    assert house.metric("ddpm_queue_duration_seconds_count") == 1
    house.worker.submit(eight := job_of("eight", range(8)))  # all the room is back
    assert isinstance(house.end_of(eight), Finished)


def test_room_is_kept_for_a_sequel(start: Start) -> None:
    house = start(capacity=4)
    house.gate.shut()
    first, _ = in_two_parts()
    house.worker.submit(first)
    with pytest.raises(QueueFullError, match="3 of 4 images"):
        house.worker.submit(job_of("two", [1, 2]))
    house.gate.allow(3)
    house.gate.wait_for_arrival(4)
    with pytest.raises(QueueFullError, match="3 of 4 images"):
        house.worker.submit(job_of("two", [1, 2]))


def test_a_job_that_would_outgrow_its_room_is_not_begun(start: Start) -> None:
    house = start(capacity=4)
    house.gate.shut()
    house.worker.submit(job_of("two", [1, 2]))
    first, _ = in_two_parts()
    with pytest.raises(QueueFullError, match="3 more do not fit"):
        house.worker.submit(first)


def test_a_drain_waits_for_a_sequel(start: Start) -> None:
    house = start()
    house.gate.shut()
    first, _ = in_two_parts()
    house.worker.submit(first)
    house.gate.wait_for_arrival(1)
    house.worker.drain()
    house.gate.open()
    assert isinstance(house.end_of(first), Finished)
    until(lambda: house.worker.phase is Phase.STOPPED)
    assert len(house.denoiser.widths) == 5


@pytest.mark.parametrize("steps", [1, 4])
def test_a_job_is_cancelled_in_either_part(start: Start, steps: int) -> None:
    house = start()
    house.gate.shut()
    first, _ = in_two_parts()
    house.worker.submit(first)
    house.gate.allow(steps - 1)
    house.gate.wait_for_arrival(steps)
    house.worker.cancel("a")
    house.gate.open()
    assert house.end_of(first) == Cancelled("a")
    until(lambda: house.worker.idle)
    assert len(house.denoiser.widths) == steps
    assert house.metric("ddpm_cancelled_total") == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_a_deadline_ends_either_part(start: Start, steps: int) -> None:
    house = start()
    house.gate.shut()
    first, _ = in_two_parts(deadline := time.monotonic() + 0.3)
    house.worker.submit(first)
    house.gate.allow(steps - 1)
    house.gate.wait_for_arrival(steps)
    until(lambda: time.monotonic() > deadline, "the deadline")
    house.gate.open()
    failed = house.end_of(first)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DeadlineError)
    until(lambda: house.worker.idle)
    assert len(house.denoiser.widths) == steps


# ── Ends ───────────────────────────────────────────────────────────────────────────────────────


def test_a_job_cancelled_during_a_step_is_gone_after_it(start: Start) -> None:
    house = start()
    house.gate.shut()
    gone, mate = job_of("gone", [1], steps=9), job_of("mate", [2], steps=3)
    house.worker.submit(gone)
    house.gate.wait_for_arrival(1)
    house.worker.submit(mate)
    house.worker.cancel("gone")
    house.worker.cancel("gone")
    house.worker.cancel("never heard of")
    house.gate.open()
    assert house.end_of(gone) == Cancelled("gone")
    assert isinstance(house.end_of(mate), Finished)
    assert house.metric("ddpm_cancelled_total") == 1
    assert [seed for seed, _ in house.denoiser.seen] == [1, 2, 2, 2]


def test_the_gauges_fall_when_the_last_job_is_cancelled(start: Start) -> None:
    house = start()
    seen: list[float] = []

    def cancel_at_the_first_preview(event: Event) -> None:
        """Between two steps, so that there is none after it."""
        house.events.append(event)
        if isinstance(event, Preview):
            seen.append(house.metric("ddpm_samples_running"))
            house.worker.cancel(event.job_id)

    house.worker._publish = cancel_at_the_first_preview
    house.worker.submit(job := job_of("a", [1, 2], steps=9, preview="x0"))
    assert house.end_of(job) == Cancelled("a")
    assert seen == [2]
    until(lambda: house.metric("ddpm_samples_running") == 0)
    assert len(house.denoiser.widths) == 1


def test_a_hopeless_deadline_is_a_refusal(start: Start) -> None:
    house = start()
    job = job_of("late", [1], deadline=0.0)
    house.worker.submit(job)
    end = house.end_of(job)
    assert isinstance(end, Failed)
    assert isinstance(end.error, DeadlineError)
    assert house.metric("ddpm_rejected_total", reason="deadline_exceeded") == 1
    until(lambda: house.worker.idle)


def test_a_nan_is_counted(start: Start) -> None:
    house = start()
    house.denoiser.gives_nan = {1}
    house.worker.submit(job := job_of("a", [1]))
    end = house.end_of(job)
    assert isinstance(end, Failed)
    assert end.error.code == "non_finite"
    assert house.metric("ddpm_nonfinite_total") == 1


def test_abort_ends_everybody(start: Start) -> None:
    house = start(max_rows=1)
    house.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2])]
    for job in jobs:
        house.worker.submit(job)
    house.gate.wait_for_arrival(1)
    house.worker.abort(DrainingError("stopping", 5.0))
    house.gate.open()
    for job in jobs:
        end = house.end_of(job)
        assert isinstance(end, Failed)
        assert end.error.code == "draining"
    until(lambda: house.worker.idle)


# ── Life ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_taken_while_loading(start: Start) -> None:
    loaded = threading.Event()
    engine = fake_engine(FakeDenoiser())

    def build() -> Engine:
        assert loaded.wait(PATIENCE_S)
        return engine

    house = start(build=build)
    assert house.worker.phase is Phase.LOADING
    assert house.metric("ddpm_ready") == 0
    assert house.worker.alive()
    with pytest.raises(LoadingError) as refused:
        house.worker.submit(job_of("early", [1]))
    assert refused.value.retry_after_s > 0
    assert house.worker.idle
    loaded.set()
    until(lambda: house.worker.phase is Phase.READY)
    assert house.metric("ddpm_ready") == 1


def test_draining_finishes_what_has_begun_and_takes_nothing_new(start: Start) -> None:
    house = start(max_rows=1)
    house.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2])]
    for job in jobs:
        house.worker.submit(job)
    house.gate.wait_for_arrival(1)
    house.worker.drain()
    assert house.worker.phase is Phase.DRAINING
    assert house.metric("ddpm_ready") == 0
    with pytest.raises(DrainingError):
        house.worker.submit(job_of("late", [3]))
    house.gate.open()
    for job in jobs:
        assert isinstance(house.end_of(job), Finished)
    until(lambda: house.worker.phase is Phase.STOPPED)
    with pytest.raises(DrainingError):
        house.worker.submit(job_of("later", [4]))


def test_draining_an_idle_worker_stops_it(start: Start) -> None:
    house = start()
    house.worker.drain()
    house.worker.join(PATIENCE_S)
    assert house.worker.phase is Phase.STOPPED


def test_draining_while_loading_stops_it_too(start: Start) -> None:
    loaded = threading.Event()

    def build() -> Engine:
        assert loaded.wait(PATIENCE_S)
        return fake_engine(FakeDenoiser())

    house = start(build=build)
    house.worker.drain()
    loaded.set()
    house.worker.join(PATIENCE_S)
    assert house.worker.phase is Phase.STOPPED


def test_death_gives_every_job_an_end(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    house = start(max_rows=1)
    house.gate.shut()
    jobs = [job_of("running", [1]), job_of("waiting", [2]), job_of("in the inbox", [3])]
    house.worker.submit(jobs[0])
    house.gate.wait_for_arrival(1)
    house.worker.submit(jobs[1])
    house.gate.allow(1)
    house.gate.wait_for_arrival(2)
    house.worker.submit(jobs[2])
    house.denoiser.raises = dict.fromkeys((1, 2, 3), torch.AcceleratorError)
    house.gate.open()
    for job in jobs:
        end = house.end_of(job)
        assert isinstance(end, Failed)
        assert isinstance(end.error, WorkerDeadError)
    assert house.worker.phase is Phase.DEAD
    assert not house.worker.alive()
    assert house.metric("ddpm_ready") == 0
    assert "the worker has failed" in caplog.text
    with pytest.raises(WorkerDeadError):
        house.worker.submit(job_of("late", [4]))


def test_a_network_that_cannot_be_built_is_death(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Engine:
        raise RuntimeError("no such device")

    house = start(build=build)
    until(lambda: house.worker.phase is Phase.DEAD)
    assert "no such device" in caplog.text


def test_it_is_alive_unless_work_waits_too_long(start: Start) -> None:
    house = start(stall_s=60.0)
    idle_for_long = time.monotonic() + 10_000
    assert house.worker.alive(idle_for_long)
    house.gate.shut()
    house.worker.submit(job := job_of("a", [1], steps=2))
    house.gate.wait_for_arrival(1)
    now = time.monotonic()
    assert house.worker.alive(now + 59)
    assert not house.worker.alive(now + 61)
    house.gate.open()
    house.end_of(job)
    until(lambda: house.worker.idle)
    assert house.worker.alive(now + 10_000)


def test_being_idle_for_long_is_no_delay(start: Start) -> None:
    house = start(stall_s=60.0)
    house.worker._progress = time.monotonic() - 10_000
    house.gate.shut()
    house.worker.submit(job_of("a", [1]))
    assert house.worker.alive()
