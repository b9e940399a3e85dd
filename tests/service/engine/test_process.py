"""The engine's loop: what it reports, and how it ends."""

from __future__ import annotations

from queue import SimpleQueue

import pytest
import torch

from service.engine.messages import (
    AddJob,
    CancelJob,
    Cancelled,
    Command,
    Drain,
    Event,
    Finished,
    Load,
    Progress,
    Queued,
    Ready,
    Report,
    Stopped,
)
from service.engine.process import EngineLoop
from service.engine.warmup import Warm
from tests.service.fakes import FakeDenoiser, fake_engine, fake_info, fake_model, job_of


def run(denoiser: FakeDenoiser, *commands: Command) -> list[Report]:
    """Everything that a loop reports to these commands, all of which are there from the start."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    for command in commands:
        inbox.put(command)
    reports: list[Report] = []
    EngineLoop(lambda: Warm(fake_engine(denoiser), fake_info(), fake_model()), inbox, reports.append).run()
    return reports


def events(reports: list[Report]) -> list[Event]:
    return [event for report in reports if isinstance(report, Progress) for event in report.step.events]


def test_a_drained_loop_finishes_what_it_was_given() -> None:
    jobs = job_of("a", [1], steps=2), job_of("b", [2], steps=3)
    reports = run(FakeDenoiser(), *(AddJob(job) for job in jobs), Drain())
    assert reports[0] == Ready(fake_info(), fake_model())
    assert reports[-1] == Stopped(failed=False)
    assert [type(event) for event in events(reports)] == [Queued, Queued, Finished, Finished]


def test_what_is_launched_is_reported_before_its_results() -> None:
    reports = run(FakeDenoiser(), AddJob(job_of("a", [1, 2], steps=2)), Drain())
    progress = [report for report in reports if isinstance(report, Progress)]
    told = [(each.launched, each.step.batch_size, len(each.step.events)) for each in progress]
    assert told == [(("a",), 0, 1), (None, 2, 0), ((), 0, 0), (None, 2, 1)]
    first, last = progress[0].load, progress[-1].load
    assert (first.running, first.waiting, first.backlog) == (2, 0, 2)
    assert first.backlog_s > 0
    assert last == Load()


def test_commands_are_handled_in_order() -> None:
    reports = run(
        FakeDenoiser(), AddJob(job_of("a", [1])), CancelJob("a"), CancelJob("never heard of"), Drain()
    )
    (_, cancelled) = events(reports)
    assert cancelled == Cancelled("a")
    assert reports[-1] == Stopped(failed=False)


def test_a_lost_device_ends_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    reports = run(FakeDenoiser(raises={1: torch.AcceleratorError}), AddJob(job_of("a", [1])))
    assert reports[-1] == Stopped(failed=True)
    assert "the engine has failed" in caplog.text


def test_whatever_is_raised_ends_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """As libraries written in Rust raise it."""

    denoiser = FakeDenoiser(raises={1: Panic})  # type: ignore[dict-item]
    assert run(denoiser, AddJob(job_of("a", [1])))[-1] == Stopped(failed=True)
    assert "Panic" in caplog.text


def test_a_network_that_cannot_be_built_ends_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Warm:
        raise RuntimeError("no such device")

    reports: list[Report] = []
    EngineLoop(build, SimpleQueue(), reports.append).run()
    assert reports == [Stopped(failed=True)]
    assert "no such device" in caplog.text
