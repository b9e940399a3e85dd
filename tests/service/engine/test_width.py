"""The batch limit: it falls when memory runs out, and rises again where that pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from model.state import Row
from service.engine.messages import AddJob
from service.engine.width import LONGEST_PATIENCE, PATIENCE, STEPS, BatchLimit
from tests.service.engine.driven import Clock, Device, engine_with
from tests.service.fakes import FakeDenoiser, FakeStep, job_of


def run(
    limit: BatchLimit, seconds: Callable[[int], float], steps: int, fits: float = 1000, more: bool = True
) -> list[int]:
    """Make so many steps, each as wide as it may be. The limits, as they changed."""
    seen = [limit.rows]
    for _ in range(steps):
        if limit.rows > fits:
            limit.ran_out(limit.rows // 2)
        else:
            limit.made(limit.rows, seconds(limit.rows), more=more)
        seen.append(limit.rows)
    return [rows for before, rows in zip([0, *seen], seen, strict=False) if rows != before]


def constant(_rows: int) -> float:
    """A device that takes any batch in the same time."""
    return 1.0


def proportional(rows: int) -> float:
    """A device that gains nothing from a batch."""
    return float(rows)


def test_it_grows_while_the_device_gains_by_it() -> None:
    limit = BatchLimit(2, 64)
    assert run(limit, constant, 6 * (PATIENCE + STEPS)) == [2, 4, 8, 16, 32, 64]


def test_it_stops_where_the_gain_does() -> None:
    limit = BatchLimit(2, 64)
    seen = run(limit, lambda rows: max(1.0, rows / 8), 20 * PATIENCE)
    assert seen[:4] == [2, 4, 8, 16]
    assert set(seen[3:]) == {8, 16}
    assert limit.rows == 8


def test_a_device_without_gain_is_asked_ever_more_seldom() -> None:
    limit, steps = BatchLimit(8, 64), 50_000
    wide = 0
    for _ in range(steps):
        wide += limit.rows > 8
        limit.made(limit.rows, proportional(limit.rows), more=True)
    assert STEPS <= wide <= 12 * STEPS
    assert steps > 3 * LONGEST_PATIENCE  # it is still asked


def test_one_disturbed_step_does_not_decide() -> None:
    limit = BatchLimit(2, 4)
    run(limit, constant, PATIENCE)
    assert limit.rows == 4
    for step in range(STEPS):
        limit.made(4, 30.0 if step % 3 == 0 else 1.0, more=True)
    assert run(limit, constant, PATIENCE) == [4]


def test_nothing_is_tried_where_steps_are_not_full_or_nobody_waits() -> None:
    assert run(BatchLimit(2, 64), constant, 10 * PATIENCE, more=False) == [2]
    limit = BatchLimit(4, 64)
    for _ in range(10 * PATIENCE):
        limit.made(2, 1.0, more=True)
    assert limit.rows == 4


def test_it_never_grows_beyond_the_widest() -> None:
    assert run(BatchLimit(3, 10), constant, 10 * PATIENCE) == [3, 6, 10]
    assert run(BatchLimit(3, 0), constant, 10 * PATIENCE) == [3]


def test_after_running_out_of_memory_it_comes_back() -> None:
    """Though the wider step does not pay: it did when it was chosen."""
    limit = BatchLimit(8, 8)
    assert run(limit, proportional, 1, fits=7) == [8, 4]
    assert run(limit, proportional, 2 * PATIENCE) == [4, 8]


def test_memory_that_never_suffices_is_tried_ever_more_seldom() -> None:
    limit, failed, steps = BatchLimit(8, 64), 0, 50_000
    for _ in range(steps):
        if limit.rows > 4:
            failed += 1
            limit.ran_out(limit.rows // 2)
        else:
            limit.made(limit.rows, 1.0, more=True)
    assert 5 <= failed <= 12
    assert limit.rows in (4, 8)


def test_a_try_that_runs_out_of_memory_leaves_what_there_was() -> None:
    limit = BatchLimit(4, 64)
    run(limit, constant, PATIENCE)
    assert limit.rows == 8
    limit.ran_out(3)  # less than what did fit
    assert limit.rows == 3
    limit = BatchLimit(4, 64)
    run(limit, constant, PATIENCE)
    limit.ran_out(4)
    assert limit.rows == 4


# ── In the engine ──────────────────────────────────────────────────────────────────────────────


class Timed(FakeDenoiser):
    """Takes as long on the tests' clock as a function of the rows says."""

    clock: Clock
    seconds: Callable[[int], float]

    def launch(self, rows: Sequence[Row]) -> FakeStep:
        self.clock.now += self.seconds(sum(row.chain.plan.evaluations[row.step] for row in rows))
        return super().launch(rows)


def test_an_engine_that_began_on_a_busy_machine_gets_wide_again(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Timed()
    denoiser.clock, denoiser.seconds = Clock(monkeypatch), lambda _rows: 0.01
    engine = engine_with(denoiser, max_batch_size=2)
    engine.widest = 8
    engine.__post_init__()
    limits: list[int] = []
    engine.on_batch_limit = limits.append
    for seed in range(24):
        engine.handle(AddJob(job_of(f"job{seed}", [seed], steps=100)))
    while engine.step() is not None:
        pass
    assert limits == [4, 8]
    assert engine.scheduler.max_batch_size == 8
    assert max(denoiser.widths) == 8


def test_an_engine_gets_wide_again_once_there_is_memory() -> None:
    denoiser = Device(rows_that_fit=4)
    jobs = [job_of(f"job{seed}", [seed], steps=100) for seed in range(24)]
    engine = engine_with(denoiser, *jobs, max_batch_size=8)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.max_batch_size == 4
    denoiser.rows_that_fit = 8
    while engine.step() is not None:
        pass
    assert engine.scheduler.max_batch_size == 8
