"""Engines die: they are replaced, and the jobs that were in flight end as if nothing had happened."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from errno import EMFILE
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from service.engine import client, worker
from service.engine.jobs import JobSpec
from service.engine.messages import (
    Cancelled,
    EngineConfig,
    Event,
    Failed,
    Finished,
    Load,
    Preview,
    Progress,
    Queued,
    SelfTestResult,
    StepReport,
    Terminal,
)
from service.engine.warmup import Warm
from service.engine.worker import Phase, Worker
from service.errors import DeadlineError, DrainingError, EngineDeadError, LoadingError, SelfTestError
from tests.service.engine import test_client
from tests.service.engine.test_client import Served, Start, start
from tests.service.fakes import PATIENCE_S, FakeDenoiser, fake_engine, fake_info, fake_model, job_of, until
from tests.service.threads import ThreadConnection

__all__ = ["start"]


class Engines:
    """Makes every engine with a denoiser of its own. prepared: those of the first ones."""

    def __init__(self, *prepared: FakeDenoiser, devices: int = 1) -> None:
        self.prepared, self.devices = prepared, devices
        self.denoisers: list[FakeDenoiser] = []
        self.self_test: SelfTestResult | None = None
        self.may_be_made = threading.Event()
        self.may_be_made.set()

    def __call__(self) -> Warm:
        assert self.may_be_made.wait(PATIENCE_S)
        place = len(self.denoisers)
        self.denoisers.append(self.prepared[place] if place < len(self.prepared) else FakeDenoiser())
        info = replace(fake_info(), device="cuda:0") if self.devices > 1 else fake_info()
        info = replace(info, self_test=self.self_test)
        return Warm(fake_engine(self.denoisers[-1]), info, fake_model(), self.devices)


def shut() -> FakeDenoiser:
    denoiser = FakeDenoiser()
    denoiser.gate.shut()
    return denoiser


def deadly(*seeds: int) -> FakeDenoiser:
    """A device that is lost as soon as one of these seeds is in a step."""
    return FakeDenoiser(raises=dict.fromkeys(seeds, torch.AcceleratorError))


def started(start: Start, engines: Engines, **options: float) -> Served:
    served = start(build=engines, **options)
    until(lambda: served.client.phase is Phase.READY)
    return served


def pixels(event: Event) -> list[bytes]:
    assert isinstance(event, Finished)
    return [picture.pixels.tobytes() for picture in event.pictures]


def undisturbed(start: Start, jobs: Sequence[JobSpec]) -> list[list[bytes]]:
    served = start(capacity=64)
    for job in jobs:
        served.client.submit(job)
    return [pixels(served.end_of(job)) for job in jobs]


def test_jobs_of_an_engine_that_dies_end_with_the_same_bytes(start: Start) -> None:
    jobs = [job_of(f"job{i}", [i, i + 10], steps=3 + i) for i in range(4)]
    expected = undisturbed(start, jobs)
    engines = Engines(first := shut())
    served = started(start, engines, capacity=16)
    for job in jobs:
        served.client.submit(job)
    first.gate.allow(2)
    first.gate.wait_for_arrival(3)
    served.connections[0].kill()
    assert [pixels(served.end_of(job)) for job in jobs] == expected
    assert Counter(type(event) for event in served.events) == {Queued: 4, Finished: 4}
    assert served.metric("ddpm_engine_restarts_total") == 1
    assert served.metric("ddpm_jobs_replayed_total") == 4
    assert served.client.idle
    assert len(engines.denoisers) == 2
    until(lambda: served.metric("ddpm_ready") == 1)


def test_a_stream_goes_on_with_the_previews_that_are_new(start: Start) -> None:
    engines = Engines(first := shut())
    served = started(start, engines)
    job = job_of("a", [1, 2], steps=6, preview="both")
    served.client.submit(job)
    first.gate.allow(3)
    until(lambda: sum(isinstance(event, Preview) for event in served.events) == 3)
    served.connections[0].kill()
    assert isinstance(served.end_of(job), Finished)
    assert len(engines.denoisers[1].widths) == 6  # all of it again
    shown = [event for event in served.events if isinstance(event, Preview)]
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]
    assert all(len(event.pictures) == 4 for event in shown)


def test_while_an_engine_is_replaced_nothing_new_is_accepted(start: Start) -> None:
    engines = Engines()
    served = started(start, engines)
    engines.may_be_made.clear()
    served.connections[0].kill()
    until(lambda: served.client.phase is Phase.LOADING)
    with pytest.raises(LoadingError):
        served.client.submit(job_of("early", [1]))
    assert served.metric("ddpm_ready") == 0
    engines.may_be_made.set()
    until(lambda: served.client.phase is Phase.READY)
    served.client.submit(job := job_of("later", [1]))
    assert isinstance(served.end_of(job), Finished)


def test_a_job_that_kills_its_engine_twice_fails_alone(start: Start) -> None:
    others = [job_of(f"job{i}", [i], steps=4) for i in range(4)]
    expected = undisturbed(start, others)
    engines = Engines(*(deadly(13) for _ in range(5)))
    served = started(start, engines)
    for job in (*others[:2], culprit := job_of("culprit", [13], steps=4), *others[2:]):
        served.client.submit(job)
    end = served.end_of(culprit)
    assert isinstance(end, Failed)
    assert end.error.code == "engine_killed"
    assert [pixels(served.end_of(job)) for job in others] == expected
    assert served.metric("ddpm_engine_restarts_total") == 2
    assert Counter(e.job_id for e in served.events if isinstance(e, Terminal)).total() == 5


def test_a_suspect_that_is_innocent_is_cleared(start: Start) -> None:
    """Two deaths that a job has nothing to do with are not held against it."""
    engines = Engines(first := shut(), second := shut())
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1], steps=9))
    first.gate.allow(2)
    first.gate.wait_for_arrival(3)
    served.connections[0].kill()
    until(lambda: len(engines.denoisers) == 2)
    second.gate.allow(8)  # further than it was before
    second.gate.wait_for_arrival(9)
    (assigned,) = served.of_client._workers[0]._jobs.values()
    until(lambda: assigned.steps == 8)
    served.connections[1].kill()
    assert isinstance(served.end_of(job), Finished)


def test_suspects_are_tried_one_at_a_time_and_all_others_after_them(start: Start) -> None:
    engines = Engines(first := shut(), second := shut())
    served = started(start, engines, capacity=64)
    suspects = [job_of(f"suspect{i}", [i], steps=3) for i in range(3)]
    for job in suspects:
        served.client.submit(job)
    first.gate.wait_for_arrival(1)
    first.gate.allow(1)
    first.gate.wait_for_arrival(2)
    served.connections[0].kill()
    until(lambda: len(engines.denoisers) == 2)
    second.gate.open()
    for job in suspects:
        assert isinstance(served.end_of(job), Finished)
    assert second.widths[:3] == [1, 1, 1]
    assert [seed for seed, step in second.seen if step == 0] == [0, 1, 2]


def test_an_engine_that_hangs_is_killed_and_its_jobs_run_again(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engines = Engines(shut())
    served = started(start, engines, stall_s=0.2)
    served.client.submit(job := job_of("a", [1]))
    assert isinstance(served.end_of(job), Finished)
    assert "has not answered" in caplog.text
    assert served.metric("ddpm_engine_restarts_total") == 1


def test_an_engine_is_not_blamed_for_the_time_that_the_api_stood_still(start: Start) -> None:
    engines = Engines(first := shut())
    served = started(start, engines, stall_s=1.5)
    served.client.submit(job := job_of("a", [1]))
    first.gate.wait_for_arrival(1)
    served.loop.call_soon_threadsafe(time.sleep, 2.0)
    served.loop.call_soon_threadsafe(first.gate.open)
    assert isinstance(served.end_of(job), Finished)
    assert served.metric("ddpm_engine_restarts_total") == 0
    assert len(engines.denoisers) == 1


def test_an_engine_that_cannot_be_started_is_started_later(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where no descriptor is left, which may be for a while only."""
    monkeypatch.setattr(worker, "RETRY_START_S", 0.01)
    engines = Engines(first := shut())
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1]))
    first.gate.wait_for_arrival(1)
    failures = [OSError(EMFILE, "Too many open files")] * 3

    def connection(*given: Any) -> ThreadConnection:
        if failures:
            raise failures.pop()
        return ThreadConnection(*given)

    monkeypatch.setattr(test_client, "ThreadConnection", connection)
    served.connections[0].kill()
    assert isinstance(served.end_of(job), Finished)
    assert failures == []
    assert caplog.text.count("no engine can be started: [Errno 24] Too many open files") == 3
    assert served.client.exit_code == 0


def test_what_an_engine_that_died_was_doing_counts_no_longer(start: Start) -> None:
    engines = Engines(first := shut())
    served = started(start, engines)
    jobs = [job_of("a", [1, 2], steps=3), job_of("b", [3], steps=5)]
    for job in jobs:
        served.client.submit(job)
    first.gate.allow(1)
    first.gate.wait_for_arrival(2)
    until(lambda: served.metric("ddpm_samples_running") > 0)
    engines.may_be_made.clear()
    served.connections[0].kill()
    until(lambda: served.client.phase is Phase.LOADING)
    (replaced,) = served.of_client._workers
    assert replaced.backlog == sum(job.evaluations for job in jobs)
    assert served.metric("ddpm_samples_running") == served.metric("ddpm_samples_waiting") == 0
    engines.may_be_made.set()
    for job in jobs:
        assert isinstance(served.end_of(job), Finished)


def test_after_too_many_deaths_it_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BACKOFF_S", 0.001)
    seeds = range(8)
    engines = Engines(*(deadly(*seeds) for _ in range(9)))
    served = started(start, engines)
    engines.denoisers[0].gate.shut()
    jobs = [job_of(f"job{seed}", [seed]) for seed in seeds]
    for job in jobs:
        served.client.submit(job)
    engines.denoisers[0].gate.open()
    ends = [served.end_of(job) for job in jobs]
    codes = Counter(end.error.code for end in ends if isinstance(end, Failed))
    assert codes == {"engine_killed": worker.DEATHS - 2, EngineDeadError.code: 8 - (worker.DEATHS - 2)}
    assert served.client.phase is Phase.DEAD
    assert served.client.exit_code == 1
    assert len(engines.denoisers) == worker.DEATHS


def test_deaths_of_long_ago_are_forgiven(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WINDOW_S", 0.0)
    engines = Engines()
    served = started(start, engines)
    for number in range(worker.DEATHS + 1):
        until(lambda: served.client.phase is Phase.READY)
        served.connections[number].kill()
        until(lambda number=number: len(engines.denoisers) == number + 2)  # type: ignore[misc]
    until(lambda: served.client.phase is Phase.READY)


def test_a_job_is_cancelled_while_its_engine_is_replaced(start: Start) -> None:
    engines = Engines(shut())
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1]))
    engines.may_be_made.clear()
    served.connections[0].kill()
    until(lambda: served.client.phase is Phase.LOADING)
    served.client.cancel("a")
    assert served.end_of(job) == Cancelled("a")
    engines.may_be_made.set()
    until(lambda: served.client.phase is Phase.READY)
    assert served.client.idle
    assert engines.denoisers[1].launched == []


def test_jobs_of_an_engine_whose_successor_is_unfit_end_with_an_error(start: Start) -> None:
    engines = Engines(deadly(1))
    served = started(start, engines)
    engines.self_test = SelfTestResult(0.7, 0.02)
    served.client.submit(job := job_of("a", [1]))
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert isinstance(end.error, SelfTestError)
    assert served.client.phase is Phase.UNFIT
    with pytest.raises(SelfTestError):
        served.client.submit(job_of("b", [2]))


def test_a_cancellation_that_a_dead_engine_did_not_get_is_not_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a death and the news of it."""
    engines = Engines(shut())
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1]))
    engines.denoisers[0].gate.wait_for_arrival(1)
    monkeypatch.setattr(served.connections[0], "send", lambda _command: None)
    served.client.cancel("a")
    assert not served.client.idle
    served.connections[0].kill()
    assert served.end_of(job) == Cancelled("a")
    until(lambda: served.client.phase is Phase.READY)
    assert engines.denoisers[1].launched == []


def test_a_drain_outlives_its_engine(start: Start) -> None:
    engines = Engines(shut())
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1]))
    engines.denoisers[0].gate.wait_for_arrival(1)
    served.client.drain()
    served.connections[0].kill()
    assert isinstance(served.end_of(job), Finished)
    until(lambda: served.client.phase is Phase.STOPPED)
    assert served.client.exit_code == 0


def test_a_service_that_stops_starts_no_other_engine(start: Start) -> None:
    """Though jobs are in flight, which would be run again if their engine had died by itself."""
    engines = Engines(shut())
    served = started(start, engines)
    served.client.submit(job_of("a", [1]))
    engines.denoisers[0].gate.wait_for_arrival(1)
    served.client.stop()
    assert served.client.phase is Phase.STOPPED
    assert len(served.connections) == 1


def test_a_drain_while_an_engine_is_replaced_needs_no_other(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "BACKOFF_S", 0.3)
    engines = Engines()
    served = started(start, engines)
    served.connections[0].kill()
    until(lambda: len(engines.denoisers) == 2)
    until(lambda: served.client.phase is Phase.READY)
    served.connections[1].kill()
    until(lambda: served.client.phase is Phase.LOADING)  # for as long as the pause after a second death
    served.client.drain()
    until(lambda: served.client.phase is Phase.STOPPED)
    assert len(served.connections) == 2


@pytest.mark.parametrize("drained_first", [True, False])
def test_a_drain_does_not_end_an_engine_before_it_has_got_all_jobs(start: Start, drained_first: bool) -> None:
    """Suspects get the next engine one after the other; each of these is over after a step."""
    engines = Engines(first := shut())
    served = started(start, engines)
    jobs = [job_of(f"job{seed}", [seed], steps=1) for seed in range(3)]
    for job in jobs:
        served.client.submit(job)
    first.gate.wait_for_arrival(1)
    engines.may_be_made.clear()
    if drained_first:
        served.client.drain()
    served.connections[0].kill()
    until(lambda: len(served.connections) == 2)
    if not drained_first:
        served.client.drain()
    engines.may_be_made.set()
    assert [type(served.end_of(job)) for job in jobs] == [Finished] * 3
    until(lambda: served.client.phase is Phase.STOPPED)
    assert len(served.connections) == 2
    assert served.client.exit_code == 0


def late_job() -> JobSpec:
    return job_of("late", [1], deadline=time.monotonic() + 0.1)


def test_a_deadline_holds_while_the_engine_hangs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DEADLINE_S", 0.05)
    served = started(start, Engines(hung := shut()))
    served.client.submit(job := late_job())
    hung.gate.wait_for_arrival(1)
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert (end.error.code, end.started) == (DeadlineError.code, True)
    assert served.metric("ddpm_engine_restarts_total") == 0
    hung.gate.open()  # what it says of that job then is not passed on
    served.client.submit(job := job_of("next", [2]))
    assert isinstance(served.end_of(job), Finished)
    assert Counter(e.job_id for e in served.events if isinstance(e, Terminal)) == {"late": 1, "next": 1}


def test_a_deadline_holds_while_an_engine_is_replaced(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DEADLINE_S", 0.05)
    served = started(start, engines := Engines(first := shut()))
    served.client.submit(job := job_of("late", [1], deadline=time.monotonic() + 0.5))
    first.gate.wait_for_arrival(1)
    engines.may_be_made.clear()
    served.connections[0].kill()
    end = served.end_of(job)
    engines.may_be_made.set()
    assert isinstance(end, Failed)
    assert end.error.code == DeadlineError.code


@pytest.mark.parametrize("jobs", [1, 30])
def test_an_engine_that_hangs_is_replaced_though_its_jobs_were_too_late(
    start: Start, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """One, or one after the other for much longer than an engine may be silent."""
    monkeypatch.setattr(worker, "DEADLINE_S", 0.02)
    served = started(start, engines := Engines(shut()), stall_s=1.0)
    ends = []
    with suppress(LoadingError):  # while it is replaced
        for number in range(jobs):
            job = job_of(f"late{number}", [1], deadline=time.monotonic() + 0.1)
            served.client.submit(job)
            ends.append(type(served.end_of(job)))
    assert ends[0] is Failed
    assert jobs == 1 or len(ends) < jobs or Finished in ends, "it was never replaced"
    until(lambda: len(engines.denoisers) == 2)
    assert served.metric("ddpm_engine_restarts_total") == 1


@pytest.mark.parametrize("hangs", [False, True])
def test_a_service_whose_engine_hangs_does_not_end_as_if_all_were_well(
    start: Start, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(worker, "UNANSWERED_S", 0.1)
    monkeypatch.setattr(client, "STOP_S", 0.5)
    served = started(start, engines := Engines(shut()))
    served.client.submit(job := job_of("a", [1]))
    engines.denoisers[0].gate.wait_for_arrival(1)
    served.client.drain()
    served.client.abort(DrainingError("The service stopped before this was finished.", 5.0))
    if not hangs:
        engines.denoisers[0].gate.open()
    served.client.stop()
    end = served.end_of(job)
    assert isinstance(end, Failed)
    assert end.error.code == DrainingError.code
    assert served.client.exit_code == int(hangs)


class Panic(BaseException):
    """As libraries written in Rust raise it."""


def test_an_engine_is_replaced_whatever_it_raises(start: Start) -> None:
    engines = Engines(FakeDenoiser(raises={1: Panic}))  # type: ignore[dict-item]
    served = started(start, engines)
    served.client.submit(job := job_of("a", [1]))
    assert isinstance(served.end_of(job), Finished)
    assert len(engines.denoisers) == 2


def test_a_worker_that_fails_is_not_ready_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    def panics(_: EngineConfig) -> ThreadConnection:
        raise Panic

    phases: list[Phase] = []
    failing = Worker(panics, EngineConfig("tiny"), print, lambda: phases.append(failing.phase), print)
    with pytest.raises(Panic):
        asyncio.run(failing.run())
    assert (phases, failing.exit_code) == ([Phase.DEAD], 1)
    assert "worker has failed" in caplog.text


# ── Several ────────────────────────────────────────────────────────────────────────────────────


def test_every_device_gets_an_engine_and_each_job_the_one_with_the_least_to_do(start: Start) -> None:
    engines = Engines(shut(), shut(), devices=2)
    served = started(start, engines, capacity=64)
    until(lambda: len(engines.denoisers) == 2)
    until(lambda: all(each.phase is Phase.READY for each in served.of_client._workers))
    assert [each.config.device for each in served.of_client._workers] == ["cuda:0", "cuda:1"]
    served.client.submit(long := job_of("long", range(4), steps=9))
    short = [job_of(f"short{i}", [10 + i], steps=9) for i in range(4)]
    for job in short:
        served.client.submit(job)
    for denoiser in engines.denoisers:
        denoiser.gate.open()
    for job in (long, *short):
        assert isinstance(served.end_of(job), Finished)
    seeds = [{seed for seed, _ in denoiser.seen} for denoiser in engines.denoisers]
    assert seeds == [set(range(4)), {10, 11, 12, 13}]


def test_the_death_of_one_engine_does_not_touch_the_jobs_of_another(start: Start) -> None:
    engines = Engines(shut(), shut(), devices=2)
    served = started(start, engines, capacity=64)
    until(lambda: all(each.phase is Phase.READY for each in served.of_client._workers))
    until(lambda: len(served.of_client._workers) == 2)
    until(lambda: all(each.phase is Phase.READY for each in served.of_client._workers))
    jobs = [job_of("here", [1]), job_of("there", [2])]
    for job in jobs:
        served.client.submit(job)
    engines.denoisers[0].gate.wait_for_arrival(1)
    served.connections[0].kill()
    until(lambda: served.of_client._workers[0].phase is Phase.LOADING or len(engines.denoisers) == 3)
    assert served.client.phase is Phase.READY  # the other one is
    engines.denoisers[1].gate.open()
    for job in jobs:
        assert isinstance(served.end_of(job), Finished)
    assert engines.denoisers[1].starts == [2]


def never(_: EngineConfig) -> ThreadConnection:
    raise AssertionError("no engine is needed")


def test_a_worker_says_how_much_is_left() -> None:
    other = Worker(never, EngineConfig("tiny"), print, print, print)
    assert other.backlog == 0
    other.add(job_of("a", [1, 2], steps=5))
    other.add(job_of("b", [3], steps=7))
    assert other.backlog == 17
    other._take(Progress(StepReport([]), Load(backlog=12)))
    assert other.backlog == 12
    other.add(job_of("c", [4], steps=2))
    assert other.backlog == 14
