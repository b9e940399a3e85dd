"""Which changes of state are legal, what work is left, and that a spec survives as bytes."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from itertools import product
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from model.chain import Chain, InitialLatent, KnownPixels, SphericalMix
from model.samplers import ROW, Plan, build_plan
from service.engine.jobs import (
    IllegalTransitionError,
    Job,
    JobSpec,
    PreviewKind,
    Stage,
    StageKind,
    State,
    from_frames,
    to_frames,
)
from service.engine.messages import AddJob, Finished
from tests.service.fakes import SCHEDULE, FakeDenoiser, counting_job, counting_stage, fake_engine, job_of

LEGAL = {
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.FAILED),
    (State.WAITING, State.CANCELLED),
    (State.RUNNING, State.FINISHED),
    (State.RUNNING, State.FAILED),
    (State.RUNNING, State.CANCELLED),
}


@pytest.mark.parametrize(("before", "after"), LEGAL, ids=str)
def test_a_legal_change_happens(before: State, after: State) -> None:
    job = Job(counting_job("a"))
    job.state = before
    job.move_to(after)
    assert job.state is after


@pytest.mark.parametrize(("before", "after"), sorted(set(product(State, State)) - LEGAL, key=str), ids=str)
def test_an_illegal_change_raises_and_changes_nothing(before: State, after: State) -> None:
    job = Job(counting_job("a", n=3, steps=7, evaluations=2))
    job.state = before
    with pytest.raises(IllegalTransitionError, match="job a"):
        job.move_to(after)
    assert (job.state, job.started, job.remaining, len(job.samples)) == (before, None, 42, 3)


def test_the_ends_are_ends() -> None:
    job = Job(counting_job("a"))
    ends = {State.FINISHED, State.FAILED, State.CANCELLED}
    for state in State:
        job.state = state
        assert job.over == (state in ends)


def test_remaining_work_counts_evaluations() -> None:
    job = Job(counting_job("a", n=2, steps=10, evaluations=2))
    assert job.remaining == job.spec.evaluations == 40
    sample = job.samples[1]
    sample.step = 4
    assert (sample.index, sample.steps, sample.remaining, sample.evaluations) == (1, 10, 12, 2)


# ── Stages ─────────────────────────────────────────────────────────────────────────────────────


def two_stages() -> JobSpec:
    """Two samples in three steps, then five in ten."""
    return JobSpec("a", "ddim", (counting_stage(2, 3), counting_stage(5, 10)))


def test_a_job_counts_all_its_stages_from_the_start() -> None:
    spec = two_stages()
    assert (spec.evaluations, spec.slots) == (56, 5)
    assert (Job(spec).remaining, counting_job("b", n=3).slots) == (56, 3)


def test_the_next_stage_has_samples_of_its_own() -> None:
    job = Job(two_stages())
    job.started = 12.5
    job.move_to(State.RUNNING)
    assert (len(job.samples), job.last_stage) == (2, False)
    job.next_stage()
    assert (len(job.samples), job.last_stage) == (5, True)
    assert all((sample.job, sample.step) == (job, 0) for sample in job.samples)
    assert (job.state, job.started) == (State.RUNNING, 12.5)


# ── Specs as bytes ─────────────────────────────────────────────────────────────────────────────


def assert_same(one: Any, other: Any, where: str = "spec") -> None:
    """Field by field; arrays by type, shape and bytes, so that NaN and −0 count too."""
    assert type(one) is type(other), where
    if is_dataclass(one):
        for each in fields(one):
            assert_same(getattr(one, each.name), getattr(other, each.name), f"{where}.{each.name}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), where
    else:
        assert one == other, where


def through_bytes(spec: JobSpec) -> JobSpec:
    return from_frames([bytes(frame) for frame in to_frames(spec)])


numbers = st.floats(allow_nan=False, width=32)
weights = st.floats(-2, 2)
seeds = st.integers(0, 2**64 - 1)
images = arrays.arrays(np.float32, st.sampled_from([(1, 2, 2), (3, 1, 4)]), elements=numbers)
masks = arrays.arrays(np.bool_, st.sampled_from([(1, 1, 1), (1, 2, 2)]))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    table = np.zeros(draw(st.integers(1, 4)), ROW)
    for name in ROW.names or ():
        table[name] = draw(st.floats(allow_nan=False))
    table["t"], table["w"] = draw(st.integers(0, 4000)), draw(st.sampled_from([1.0, 2.5]))
    return Plan(table, draw(st.floats(0, 1)))


starts = st.one_of(
    st.none(),
    st.builds(
        InitialLatent,
        st.lists(st.tuples(weights, images), max_size=2).map(tuple),
        st.lists(st.tuples(weights, seeds), max_size=2).map(tuple),
    ),
    st.builds(lambda share: InitialLatent(carried=SphericalMix(0, 1, share)), st.floats(0, 1)),
)
chains = st.builds(
    Chain,
    plans(),
    seeds,
    st.none() | st.integers(0, 9),
    starts,
    st.none() | st.builds(KnownPixels, images, masks),
)
stages = st.builds(
    Stage, st.sampled_from(get_args(StageKind)), st.lists(chains, min_size=1, max_size=3).map(tuple)
)
specs = st.builds(
    JobSpec,
    st.text(),
    st.text(),
    st.lists(stages, min_size=1, max_size=2).map(tuple),
    st.none() | st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.sampled_from(get_args(PreviewKind)),
    st.integers(1, 1000),
)


@given(specs)
def test_a_spec_survives_as_bytes(spec: JobSpec) -> None:
    found = through_bytes(spec)
    assert_same(found, spec)
    assert (found.evaluations, found.slots) == (spec.evaluations, spec.slots)
    assert_same(through_bytes(found), spec)  # its cached properties have been used, and are not sent


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError, match=r"stages\[0\].chains\[0\].seed"):
        assert_same(job_of("a", [1]), job_of("a", [2]))


def test_an_array_that_many_samples_use_is_sent_once() -> None:
    image = np.zeros((1, 8, 8), np.float32)
    plan = build_plan(SCHEDULE, "ddpm", 20).unclipped()
    known = KnownPixels(image, np.ones((1, 1, 1), np.bool_))
    chains = tuple(
        Chain(plan, seed, None, InitialLatent(((0.5, image),), ((0.5, seed),)), known) for seed in range(64)
    )
    frames = to_frames(JobSpec("a", "ddpm", (Stage("denoise", chains),)))
    assert [len(frame) for frame in frames[1:]] == [plan.table.nbytes, image.nbytes, 1]
    found = from_frames(frames).stages[0].chains
    assert found[0].plan.table is found[63].plan.table
    assert math.isinf(found[0].plan.table["clip"][0])


@pytest.mark.parametrize("frames", [[b""], [b"\xff" * 20], [b"\x80"], [msgspec.msgpack.encode([1])]])
def test_frames_that_are_no_spec_are_refused(frames: list[Any]) -> None:
    with pytest.raises(msgspec.MsgspecError):
        from_frames(frames)


@pytest.mark.parametrize("change", ["missing frame", "short frame", "another type"])
def test_arrays_that_are_not_as_the_header_says_are_refused(change: str) -> None:
    header, *frames = to_frames(job_of("a", [1]))
    if change == "another type":
        header = bytes(header).replace(
            msgspec.msgpack.encode((0, 2, (5,))), msgspec.msgpack.encode((0, 9, (5,)))
        )
        assert header != to_frames(job_of("a", [1]))[0]
    changed: dict[str, list[Any]] = {
        "missing frame": [],
        "short frame": [bytes(frames[0])[:8]],
        "another type": frames,
    }
    with pytest.raises((msgspec.MsgspecError, ValueError)):
        from_frames([header, *changed[change]])


def test_an_array_of_a_type_that_no_job_has_is_not_sent() -> None:
    known = KnownPixels(np.zeros((1, 8, 8)), np.ones((1, 1, 1), np.bool_))  # type: ignore[arg-type]
    chain = Chain(build_plan(SCHEDULE, "ddim", 2), 1, known=known)
    with pytest.raises(NotImplementedError, match="ndarray is not part of a job"):
        to_frames(JobSpec("a", "ddim", (Stage("denoise", (chain,)),)))


def test_a_spec_holds_nothing_that_cannot_be_sent() -> None:
    chain = Chain(build_plan(SCHEDULE, "ddim", 2), 1, label=object())  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="object is not part of a job"):
        to_frames(JobSpec("a", "ddim", (Stage("denoise", (chain,)),)))


def test_a_spec_from_bytes_gives_the_same_pictures() -> None:
    def pictures(spec: JobSpec) -> list[bytes]:
        engine = fake_engine(FakeDenoiser())
        engine.handle(AddJob(spec))
        events = []
        while (report := engine.step()) is not None:
            events += report.events
        (finished,) = (event for event in events if isinstance(event, Finished))
        return [picture.pixels.tobytes() for picture in finished.pictures]

    spec = job_of("a", [3, 4, 5], steps=4)
    assert pictures(through_bytes(spec)) == pictures(spec)
