"""Recorded steps: by an imitation that anything can run, and by CUDA graphs where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.chain import Chain, KnownPixels, from_pixels
from model.checkpoint import Checkpoint
from model.denoiser import ALL, Denoiser, Stepped, _Parts
from model.device_noise import normals, table
from model.runtimes import DtypeName, Recorded, SkippedError, TorchRuntime
from model.samplers import Guidance, build_plan, build_repaint
from model.schedule import NoiseSchedule, linear_betas
from model.state import Row, SnapshotKind, pack
from tests.model.conftest import tiny_checkpoint

WIDTHS = (2, 4, 8, 16)
SCHEDULE = NoiseSchedule(linear_betas(1000), timestep_spacing="trailing")
LEARNED = replace(SCHEDULE, variance_type="learned_range")
IMAGE = from_pixels(np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8))
HALF = np.arange(8)[:, None] < np.full(8, 4)[None]


class Imitation:
    """Runs what it would have recorded. `made`: all of them."""

    made: list[Imitation]

    def __init__(
        self, function: Callable[[Tensor], Any], example: Tensor, beside: Imitation | None = None
    ) -> None:
        self._function, self._input, self.beside = function, example.clone(), beside
        for _ in range(3):
            function(self._input)
        self.made.append(self)

    def __call__(self, given: Tensor) -> Any:
        self._input.copy_(given)
        return self._function(self._input)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where steps are recorded; on a CPU an imitation is."""
    Imitation.made = []
    return str(request.param)


@contextmanager
def eager() -> Iterator[None]:
    """Nothing is recorded meanwhile; the network still pads to the same shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "_width", lambda _self, _used: 0)
        yield


def made(
    model: Checkpoint, device: str, sizes: Sequence[int] = WIDTHS, dtype: DtypeName = "float32"
) -> Denoiser:
    runtime = TorchRuntime(model, device, dtype, sizes)
    if device == "cpu":
        runtime.recorder = Imitation
    denoiser = Denoiser.of(model, runtime)
    denoiser.reserve(24)
    return denoiser


def chains(schedule: NoiseSchedule = SCHEDULE, *, known: bool = True) -> list[Chain]:
    """Of all kinds: with and without noise, look-back, guidance and known pixels."""

    def of(seed: int, sampler: str, steps: int, label: int | None = 0, **options: Any) -> Chain:
        return Chain(build_plan(schedule, sampler, steps, **options), seed, label)

    found = [
        of(1, "ddim", 5),
        of(2**63 + 5, "ddpm", 6, guidance=Guidance(3.0)),
        of(3, "dpmpp_2m", 5, None),
        of(4, "ddim", 4, 2, eta=0.7),
        of(5, "sde_dpmpp_2m", 5, 1, guidance=Guidance(2.0, sigmas=(0.5, 20.0))),
        of(6, "ddpm", 5, None),
    ]
    if known:
        plan = build_repaint(schedule, "ddpm", 3, jump_length=1, jump_n_sample=2)
        found.append(Chain(plan, 7, 1, known=KnownPixels(IMAGE, HALF[None])))
    return found


def run(
    denoiser: Denoiser, wanted: Sequence[Chain], slots: Sequence[int], steps: int = 4
) -> list[list[Stepped]]:
    """Two steps in flight at a time, as the engine has them; every picture and array of each is read."""
    kinds: tuple[SnapshotKind, ...] = ("x0", "xt", "before")
    flights, read = [], []
    for step in range(steps):
        rows = [Row(one, slot, step, (), kinds, kinds) for one, slot in zip(wanted, slots, strict=True)]
        flights.append(denoiser.launch(rows))
        if len(flights) == 2:
            read.append(flights.pop(0).read())
    return [*read, flights.pop().read()]


def assert_same(first: list[list[Stepped]], second: list[list[Stepped]]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.finite == other.finite
            for a, b in ((mine.pictures, other.pictures), (mine.arrays, other.arrays)):
                assert list(a) == list(b)
                assert all(np.array_equal(a[kind], b[kind]) for kind in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("schedule", [SCHEDULE, LEARNED], ids=["fixed", "learned"])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_a_recorded_step_gives_the_bits_of_an_eager_one(
    device: str, dtype: DtypeName, schedule: NoiseSchedule, count: int
) -> None:
    """Guidance, known pixels, learned variance and padding, at several widths."""
    if device == "cpu" and dtype == "float16":
        pytest.skip("not on every processor")
    model = tiny_checkpoint(out_channels=2 if schedule is LEARNED else 1)
    some, slots = chains(schedule)[-count:], [*range(3, 3 + count)]
    denoiser = made(model, device, dtype=dtype)
    recorded = run(denoiser, some, slots)
    assert denoiser._recordings
    with eager():
        loose = made(model, device, dtype=dtype)
        expected = run(loose, some, slots)
        assert not loose._recordings
    assert_same(recorded, expected)


def test_widths_take_turns(device: str, tiny: Checkpoint) -> None:
    """They share memory: one after the other, in any order, each gives what it would alone."""
    some, order = chains(), (1, 6, 2, 7, 1, 3, 6)
    denoiser, loose = made(tiny, device), made(tiny, device)
    flights, read = [], []
    for turn in range(3):
        for count in order:
            rows = [Row(one, slot, turn, arrays=("xt", "x0")) for slot, one in enumerate(some[:count])]
            flights.append(denoiser.launch(rows))
    read = [flight.read() for flight in flights]
    assert len(denoiser._recordings) >= 4
    with eager():
        expected = [
            loose.launch(
                [Row(one, slot, turn, arrays=("xt", "x0")) for slot, one in enumerate(some[:count])]
            ).read()
            for turn in range(3)
            for count in order
        ]
    assert_same(read, expected)


def test_results_are_those_of_their_own_step_after_two_launches(device: str, tiny: Checkpoint) -> None:
    one = chains()[1]
    denoiser, alone = made(tiny, device), made(tiny, device)
    expected = [alone.launch([Row(one, 0, step, arrays=("xt",))]).read()[0].arrays["xt"] for step in (0, 1)]
    flights = [denoiser.launch([Row(one, 0, step, arrays=("xt",))]) for step in (0, 1)]
    found = [flight.read()[0].arrays["xt"] for flight in flights]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not np.array_equal(found[0], found[1])


def test_other_slots_are_left_alone(device: str, tiny: Checkpoint) -> None:
    denoiser = made(tiny, device)
    used = [2, 9, 4]
    idle = [slot + 1 for slot in range(24) if slot not in used]
    denoiser.slots.x[idle], denoiser.slots.x0[idle] = 7.0, torch.nan
    run(denoiser, chains()[:3], used)
    assert (denoiser.slots.x[idle] == 7).all()
    assert denoiser.slots.x0[idle].isnan().all()


def test_more_slots_are_recorded_anew(device: str, tiny: Checkpoint) -> None:
    denoiser = made(tiny, device)
    run(denoiser, chains()[:2], [0, 1], steps=2)
    kept = denoiser.latent(0)
    denoiser.reserve(24)
    assert denoiser._recordings, "there were as many"
    denoiser.reserve(50)
    assert not denoiser._recordings
    assert torch.equal(denoiser.latent(0).x, kept.x)
    with eager():
        other = made(tiny, device)
        run(other, chains()[:2], [0, 1], steps=2)
        expected = other.launch(
            [Row(one, slot, 2, arrays=("xt",)) for slot, one in enumerate(chains()[:2])]
        ).read()
    again = denoiser.launch(
        [Row(one, slot, 2, arrays=("xt",)) for slot, one in enumerate(chains()[:2])]
    ).read()
    assert_same([again], [expected])


def test_widths_no_longer_in_use_are_forgotten(device: str, tiny: Checkpoint) -> None:
    denoiser = made(tiny, device)
    run(denoiser, chains(known=False)[:1], [0])
    run(denoiser, chains(known=False), [*range(6)])
    assert {width for width, *_ in denoiser._recordings} == {2, 8}
    denoiser.runtime.batch_sizes = (2,)  # as after running out of memory
    run(denoiser, chains(known=False)[:1], [0])
    assert {width for width, *_ in denoiser._recordings} == {2}


def test_steps_wider_than_any_recording_are_made_eagerly(device: str, tiny: Checkpoint) -> None:
    denoiser = made(tiny, device, (2,))
    assert all(stepped.finite for stepped in run(denoiser, chains(), [*range(7)])[-1])
    assert not denoiser._recordings


def test_later_recordings_share_the_memory_of_the_first(device: str, tiny: Checkpoint) -> None:
    if device == "cuda":
        denoiser = made(tiny, device)
        run(denoiser, chains()[:1], [0])
        run(denoiser, chains(), [*range(7)])
        graphs = [each._graph for each in denoiser._recordings.values() if isinstance(each, Recorded)]
        assert len(graphs) > 1
        assert len({graph.pool() for graph in graphs}) == 1
        return
    run(made(tiny, device), chains()[:1], [0])
    first, *others = Imitation.made
    assert first.beside is None
    assert all(each.beside is first for each in others)


WHOLE = _Parts(16, True, ALL, ALL, ALL, [], ALL, thresholded=True, recorded=True)
"""A step that has everything in it, at 16 rows."""


def packed(rows: Sequence[Row]) -> Tensor:
    """The upload of their first steps, at 16 rows."""
    guided = [index for index, row in enumerate(rows) if row.chain.plan.evaluations[0] == 2]
    coefficients = np.array([np.frombuffer(row.chain.plan.coefficients[0], np.float32) for row in rows])
    return torch.from_numpy(pack(rows, coefficients, guided, 3, 16))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("schedule", [SCHEDULE, LEARNED], ids=["fixed", "learned"])
def test_what_is_recorded_looks_at_no_value(schedule: NoiseSchedule, dtype: DtypeName) -> None:
    """The meta device has none to look at, and no tensor of host memory can be mixed with its."""
    model = tiny_checkpoint(out_channels=2 if schedule is LEARNED else 1)
    denoiser = made(model, "meta", dtype=dtype)
    rows = [Row(one, slot, 0) for slot, one in enumerate(chains(schedule))]
    with torch.inference_mode():
        denoiser._begin(rows)
        done = denoiser._update(packed(rows).to("meta"), WHOLE)
    assert [each.shape for each in (done.before, done.x, done.x0)] == [(16, 1, 8, 8)] * 3
    assert done.finite.shape == (16,)


def test_the_whole_step_is_one_graph_to_a_compiler() -> None:
    """From the gather to the scatter, with the network and its noise: `fullgraph` raises where it breaks."""
    model = tiny_checkpoint(out_channels=2)
    rows = [Row(one, slot, 0) for slot, one in enumerate(chains(LEARNED))]
    known, left = table(), []
    for way in (lambda step: step, partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)):
        denoiser = made(model, "cpu", sizes=(16,))
        # As on a GPU: a processor's noise is NumPy's.
        denoiser._normals = lambda seeds, steps, stream: normals(seeds, steps, (1, 8, 8), stream, known)
        with torch.inference_mode():
            denoiser._begin(rows)
            done = way(partial(denoiser._update, parts=WHOLE))(packed(rows))
        left.append((done.before, done.x, done.x0, done.finite, denoiser.slots.x, denoiser.slots.x0))
    eager, compiled = left
    assert all(torch.equal(*both) for both in zip(eager, compiled, strict=True))
    assert done.finite[: len(rows)].all()


# ── Only with a GPU ────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_a_launch_waits_for_nothing(tiny: Checkpoint) -> None:
    """Neither a recorded step nor a sample that begins, with its own noise, an image, or known pixels."""
    denoiser = made(tiny, "cuda")
    run(denoiser, chains(), [*range(7)], steps=2)
    rows = [Row(one, slot, 0, arrays=("xt",)) for slot, one in enumerate(chains())]
    torch.cuda.set_sync_debug_mode("error")
    try:
        flights = [denoiser.launch(rows), denoiser.launch([replace(row, step=1) for row in rows])]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for flight in flights:
        flight.read()


@pytest.mark.gpu
def test_a_launch_that_runs_out_of_memory_is_made_again(tiny: Checkpoint) -> None:
    """With next to all memory taken, also by what has been freed and kept, a recording does not fit."""
    some = chains()[:3]
    with eager():
        loose = made(tiny, "cuda")
        expected = loose.launch([Row(one, slot, 0, arrays=("xt",)) for slot, one in enumerate(some)]).read()
    denoiser = made(tiny, "cuda")
    rows = [Row(one, slot, 0, arrays=("xt",)) for slot, one in enumerate(some)]
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        taken: list[Tensor] = []
        for size in (1 << 20, 1 << 16, 1 << 12, 512):  # what lies free in blocks that are reserved
            try:
                while len(taken) < 100_000:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                continue
        failed, behind = denoiser.launch(rows), denoiser.launch(rows)
        with pytest.raises(torch.OutOfMemoryError):
            failed.read()
        with pytest.raises(SkippedError):
            behind.read()
    finally:
        del taken
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    denoiser.recover()
    assert_same([denoiser.launch(rows).read()], [expected])


@pytest.mark.gpu
def test_a_compiled_network_is_recorded(tiny: Checkpoint) -> None:
    runtime = TorchRuntime(tiny, "cuda", batch_sizes=(8,), compiled=True)
    denoiser = Denoiser.of(tiny, runtime)
    found = run(denoiser, chains()[:3], [0, 1, 2])
    assert denoiser._recordings
    with eager():
        other = Denoiser.of(tiny, runtime)
        assert_same(found, run(other, chains()[:3], [0, 1, 2]))
