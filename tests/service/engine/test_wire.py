"""Every message survives as bytes, and a stream that ends, wherever it does, is the end."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from queue import Empty
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from model.chain import Chain, InitialLatent, KnownPixels, SphericalMix
from model.samplers import ROW, Plan, build_plan
from model.schedule import (
    PREDICTION_TYPES,
    SPACINGS,
    VARIANCE_TYPES,
    NoiseSchedule,
    cosine_betas,
    linear_betas,
)
from model.typicality import Typicality
from service import errors
from service.engine.jobs import JobSpec, PreviewKind, SnapshotKind, Stage, StageKind
from service.engine.messages import (
    AbortAll,
    AddJob,
    CancelJob,
    Cancelled,
    Command,
    Drain,
    EngineConfig,
    EngineInfo,
    Event,
    Failed,
    Finished,
    Forecast,
    Invariance,
    Load,
    Loaded,
    Locate,
    Located,
    Measurement,
    ModelInfo,
    Picture,
    Preview,
    Progress,
    Queued,
    Ready,
    Report,
    StepReport,
    Stopped,
)
from service.engine.warmup import model_info
from service.engine.wire import COUNT, Channel, Inbound, from_frames, read_report, to_bytes, to_frames
from tests.service.fakes import (
    SCHEDULE,
    FakeDenoiser,
    counting_job,
    fake_engine,
    fake_info,
    job_of,
    tiny_model,
)


def assert_same(one: Any, other: Any, where: str = "message") -> None:
    """Field by field; arrays by type, shape and bytes, so that NaN and −0 count too."""
    assert type(one) is type(other), where
    if is_dataclass(one) or isinstance(one, msgspec.Struct):
        names = one.__struct_fields__ if isinstance(one, msgspec.Struct) else [f.name for f in fields(one)]
        for name in names:
            assert_same(getattr(one, name), getattr(other, name), f"{where}.{name}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{place}]")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), where
    elif isinstance(one, errors.ServiceError):
        assert (vars(one), str(one), one.args) == (vars(other), str(other), other.args), where
    else:
        assert one == other, where


def through_bytes(message: Any, kind: Any) -> Any:
    return from_frames([bytes(frame) for frame in to_frames(message)], kind)


# ── Specs ──────────────────────────────────────────────────────────────────────────────────────

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
    st.none() | st.integers(1, 1000),
    st.text(),
)


@given(specs)
def test_a_spec_survives_as_bytes(spec: JobSpec) -> None:
    found = through_bytes(spec, JobSpec)
    assert_same(found, spec)
    assert (found.evaluations, found.slots) == (spec.evaluations, spec.slots)
    assert_same(through_bytes(found, JobSpec), spec)  # its cached properties have been used, and are not sent


def test_the_comparison_can_fail() -> None:
    with pytest.raises(AssertionError, match=r"stages\[0\].chains\[0\].seed"):
        assert_same(job_of("a", [1]), job_of("a", [2]))
    with pytest.raises(AssertionError, match=r"error"):
        assert_same(
            Failed("a", errors.QueueFullError("full", 1.0)), Failed("a", errors.QueueFullError("full", 2.0))
        )


def test_an_array_that_many_samples_use_is_sent_once() -> None:
    image = np.zeros((1, 8, 8), np.float32)
    plan = build_plan(SCHEDULE, "ddpm", 20).unclipped()
    known = KnownPixels(image, np.ones((1, 1, 1), np.bool_))
    chains = tuple(
        Chain(plan, seed, None, InitialLatent(((0.5, image),), ((0.5, seed),)), known) for seed in range(64)
    )
    frames = to_frames(AddJob(JobSpec("a", "ddpm", (Stage("denoise", chains),))))
    assert [len(frame) for frame in frames[1:]] == [plan.table.nbytes, image.nbytes, 1]
    command = from_frames(frames, AddJob)
    found = command.spec.stages[0].chains
    assert found[0].plan.table is found[63].plan.table
    assert math.isinf(found[0].plan.table["clip"][0])


def test_arrays_are_not_copied_and_cannot_be_written() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    frames = to_frames(Picture(0, 1, "x0", pixels))
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), pixels)
    found = from_frames([bytearray(frame) for frame in frames], Picture).pixels  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0, 0] = 1


def test_an_array_that_is_a_view_arrives_as_it_looks() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)[::2, :, ::-1]
    assert_same(through_bytes(Picture(0, 1, "x0", pixels), Picture), Picture(0, 1, "x0", pixels.copy()))


@pytest.mark.parametrize("frames", [[b""], [b"\xff" * 20], [b"\x80"], [msgspec.msgpack.encode([1])]])
@pytest.mark.parametrize("kind", [JobSpec, Inbound, Report])
def test_frames_that_are_no_message_are_refused(frames: list[Any], kind: Any) -> None:
    with pytest.raises(msgspec.MsgspecError):
        from_frames(frames, kind)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        through_bytes(Drain(), Report)
    with pytest.raises(msgspec.MsgspecError):
        through_bytes(Stopped(False), Inbound)


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
        from_frames([header, *changed[change]], JobSpec)


def test_an_error_of_no_known_code_is_refused() -> None:
    header = to_frames(Failed("a", errors.ComputeError("why")))[0]
    with pytest.raises(msgspec.MsgspecError, match="unknown code"):
        from_frames([bytes(header).replace(b"compute_failed", b"compute_jailed")], Failed)


def test_an_array_of_a_type_that_no_message_has_is_not_sent() -> None:
    known = KnownPixels(np.zeros((1, 8, 8), np.float16), np.ones((1, 1, 1), np.bool_))
    chain = Chain(build_plan(SCHEDULE, "ddim", 2), 1, known=known)
    with pytest.raises(NotImplementedError, match="ndarray cannot be sent"):
        to_frames(JobSpec("a", "ddim", (Stage("denoise", (chain,)),)))


def test_a_spec_holds_nothing_that_cannot_be_sent() -> None:
    chain = Chain(build_plan(SCHEDULE, "ddim", 2), 1, label=object())  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="object cannot be sent"):
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
    assert pictures(through_bytes(spec, JobSpec)) == pictures(spec)


# ── Errors ─────────────────────────────────────────────────────────────────────────────────────


def all_errors() -> list[errors.ServiceError]:
    """One of each class."""
    kinds = [errors.ServiceError]
    for kind in kinds:
        kinds += [each for each in kind.__subclasses__() if each.__module__ == errors.__name__]
    return [error_of(kind) for kind in kinds]


def error_of(kind: type[errors.ServiceError]) -> errors.ServiceError:
    if issubclass(kind, errors.InvalidRequestError):
        return kind("n", "naïve why")
    if issubclass(kind, errors.RefusedError):
        return kind("naïve why", 2.5)
    return kind("naïve why")


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_an_error_survives_as_bytes(error: errors.ServiceError) -> None:
    assert_same(through_bytes(Failed("a", error, started=True), Failed), Failed("a", error, started=True))


# ── Commands and reports ───────────────────────────────────────────────────────────────────────

floats = st.floats(allow_nan=False)
counts = st.integers(0, 2**40)
measurements = st.builds(Measurement, counts, floats, floats)
pictures = st.builds(
    Picture,
    counts,
    seeds,
    st.sampled_from(get_args(SnapshotKind)),
    arrays.arrays(np.uint8, st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 2, 3)])),
    st.none() | measurements,
)
shown = st.lists(pictures, max_size=3).map(tuple)
events: dict[type, st.SearchStrategy[Any]] = {
    Queued: st.builds(Queued, st.text(), counts, floats),
    Preview: st.builds(Preview, st.text(), counts, counts, counts, floats, shown),
    Finished: st.builds(
        Finished,
        st.text(),
        shown,
        floats,
        floats,
        st.lists(st.lists(measurements, max_size=2).map(tuple), max_size=2).map(tuple),
    ),
    Failed: st.builds(Failed, st.text(), st.sampled_from(all_errors()), st.booleans()),
    Cancelled: st.builds(Cancelled, st.text()),
}
betas = st.sampled_from([linear_betas(10), cosine_betas(7), linear_betas(1)])
doubles = arrays.arrays(np.float64, st.sampled_from([(2,), (3, 3)]))  # NaN and infinities among them
models = st.builds(
    ModelInfo,
    st.text(),
    st.builds(
        NoiseSchedule,
        betas,
        st.sampled_from(PREDICTION_TYPES),
        st.sampled_from([1.0, math.inf]),
        st.sampled_from(VARIANCE_TYPES),
        st.sampled_from(SPACINGS),
    ),
    st.tuples(counts, counts, counts),
    st.lists(st.text(), max_size=3).map(tuple),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none()
    | st.builds(Typicality, doubles, doubles, doubles, doubles, doubles, doubles, counts, st.text()),
    counts,
)
infos = st.builds(
    EngineInfo,
    st.text(),
    st.text(),
    st.text(),
    st.text(),
    counts,
    st.lists(st.tuples(counts, floats), max_size=3).map(tuple),
    st.builds(Invariance, st.lists(counts, max_size=3).map(tuple), floats),
)
inbound: dict[type, st.SearchStrategy[Any]] = {
    EngineConfig: st.builds(
        EngineConfig,
        st.text(),
        st.text(),
        st.text(),
        st.text(),
        counts,
        counts,
        st.text(),
        st.booleans(),
        st.text(),
    ),
    AddJob: st.builds(AddJob, specs),
    CancelJob: st.builds(CancelJob, st.text()),
    Locate: st.builds(Locate, st.text()),
    AbortAll: st.builds(AbortAll),
    Drain: st.builds(Drain),
}
reports: dict[type, st.SearchStrategy[Any]] = {
    Ready: st.builds(Ready, infos, models, counts),
    Progress: st.builds(
        Progress,
        st.builds(
            StepReport, st.lists(st.one_of(*events.values()), max_size=3), counts, counts, floats, counts
        ),
        st.builds(Load, counts, counts, counts, floats),
        st.none() | st.lists(st.text(), max_size=3).map(tuple),
    ),
    Stopped: st.builds(Stopped, st.booleans()),
    Forecast: st.builds(Forecast, st.lists(st.tuples(st.text(), floats), max_size=3).map(tuple)),
    Loaded: st.builds(Loaded, st.text()),
    Located: st.builds(Located, st.text(), st.booleans(), st.none() | counts, st.none() | floats, floats),
}


def test_every_kind_of_message_is_tried() -> None:
    assert set(inbound) == {EngineConfig, *get_args(Command)}
    assert set(reports) == set(get_args(Report))
    assert set(events) == set(get_args(Event))


@pytest.mark.parametrize("kind", inbound, ids=lambda kind: kind.__name__)
def test_what_an_engine_is_told_survives_as_bytes(kind: type) -> None:
    @given(inbound[kind])
    @settings(max_examples=30, deadline=None)
    def survives(message: Any) -> None:
        assert_same(through_bytes(message, Inbound), message)

    survives()


@pytest.mark.parametrize("kind", [*reports, *events], ids=lambda kind: kind.__name__)
def test_what_an_engine_says_survives_as_bytes(kind: type) -> None:
    @given((reports | events)[kind])
    @settings(max_examples=50, deadline=None)
    def survives(message: Any) -> None:
        report = message if kind in reports else Progress(StepReport([message, message]), Load())
        assert_same(through_bytes(report, Report), report)

    survives()


def test_a_model_from_bytes_is_as_good_as_the_one_that_was_sent() -> None:
    info = model_info(tiny_model(learned=True))
    found = through_bytes(Ready(fake_info(), info), Report).model
    assert_same(found, info)
    one, other = (build_plan(model.schedule, "ddpm", 7).table for model in (found, info))
    assert one.tobytes() == other.tobytes()


# ── The socket ─────────────────────────────────────────────────────────────────────────────────

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(60)
        yield one, other


def told() -> list[Any]:
    """Something of each kind that an engine is told, and a message that no socket's buffer holds."""
    image = np.random.default_rng(0).standard_normal((3, 512, 512)).astype(np.float32)
    known = KnownPixels(image, np.ones((1, 1, 1), np.bool_))
    chain = Chain(build_plan(SCHEDULE, "ddim", 2), 1, known=known)
    large = JobSpec("large", "ddim", (Stage("denoise", (chain,)),))
    return [
        EngineConfig("tiny"),
        AddJob(large),
        CancelJob("a"),
        AbortAll(),
        AddJob(counting_job("b")),
        Drain(),
    ]


def said() -> list[Any]:
    """Something of each kind that an engine says."""
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    finished = Finished("a", (Picture(0, 1, "xt", pixels), Picture(1, 2, "xt", pixels[:9])), 1.0, 2.0)
    failed = [Failed("b", error) for error in all_errors()]
    return [
        Loaded("weights/tiny"),
        Ready(fake_info(), model_info(tiny_model())),
        Progress(StepReport([Queued("a", 1, 2.0), *failed]), Load(1, 2, 3, 4.0), ("a", "b")),
        Progress(StepReport([finished], 2, 2, 0.1), Load()),
        Stopped(failed=False),
    ]


def sent(messages: list[Any], connection: socket.socket) -> threading.Thread:
    """A thread that sends all of these, and then ends the stream."""

    def send() -> None:
        for message in messages:
            connection.sendall(to_bytes(message))
        connection.close()

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_an_engine_receives_what_it_is_told_and_then_the_end(pair: Pair) -> None:
    here, there = pair
    thread, channel = sent(told(), here), Channel(there)
    for message in told():
        assert_same(received(channel), message)
    assert received(channel) is None
    assert received(channel) is None
    thread.join()


def received(channel: Channel) -> Inbound | None:
    """What comes next; None at the end."""
    try:
        return channel.get(60.0)
    except EOFError:
        return None


def test_what_has_not_come_is_not_waited_for_longer_than_asked(pair: Pair) -> None:
    here, there = pair
    channel = Channel(there)
    for ask in (channel.get_nowait, lambda: channel.get(0.0), lambda: channel.get(0.01)):
        with pytest.raises(Empty):
            ask()
    here.sendall(to_bytes(Drain()) + to_bytes(CancelJob("a")))
    assert (channel.get_nowait(), channel.get_nowait()) == (Drain(), CancelJob("a"))
    with pytest.raises(Empty):
        channel.get_nowait()


def test_an_engine_does_not_wait_for_a_reader(pair: Pair) -> None:
    """More than the socket takes is sent whenever there is something to do with it, and at the end."""
    here, there = pair
    channel = Channel(there)
    pixels = np.arange(1 << 20, dtype=np.uint8).reshape(1024, 1024, 1)
    large = Progress(StepReport([Finished("a", (Picture(0, 1, "xt", pixels),), 0.0, 1.0)]), Load())
    for _ in range(3):
        channel.send(large)
    channel.send(Stopped(failed=False))
    assert channel._unsent
    found: list[Report] = []
    reader = threading.Thread(target=lambda: found.extend(asyncio.run(read_all(here, 1 << 22))))
    reader.start()
    with pytest.raises(Empty):
        channel.get(0.05)
    channel.close()
    reader.join()
    assert_same(found, [large, large, large, Stopped(failed=False)])


def test_a_report_to_nobody_is_the_end(pair: Pair) -> None:
    here, there = pair
    channel = Channel(there)
    here.close()
    with pytest.raises(EOFError):
        channel.send(Stopped(failed=False))


async def read_all(connection: socket.socket, limit: int = 2**16) -> list[Report]:
    connection.settimeout(0)
    stream, writer = await asyncio.open_connection(sock=connection, limit=limit)
    found = []
    while (report := await asyncio.wait_for(read_report(stream), 60)) is not None:
        found.append(report)
    writer.close()
    return found


def test_the_api_reads_what_an_engine_says_and_then_the_end(pair: Pair) -> None:
    here, there = pair
    thread = sent(said(), here)
    assert_same(asyncio.run(read_all(there)), said())
    thread.join()


def test_a_message_may_come_in_pieces(pair: Pair) -> None:
    here, there = pair
    message = AddJob(job_of("a", [1]))
    content = to_bytes(message)

    def send() -> None:
        for place in range(len(content)):
            here.sendall(content[place : place + 1])

    thread = threading.Thread(target=send)
    thread.start()
    assert_same(received(Channel(there)), message)
    thread.join()


CUTS = [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999]


def cuts(content: bytes) -> list[int]:
    """Places before the end of a message to break off at: between its parts, and inside each."""
    return sorted(
        {0, 1, COUNT.size, COUNT.size + 1, len(content) - 1, *(int(cut * len(content)) for cut in CUTS)}
    )


@pytest.mark.parametrize("message", [CancelJob("a"), AddJob(job_of("a", [1])), Drain()], ids=type)
def test_a_command_that_breaks_off_is_the_end(message: Any) -> None:
    content = to_bytes(message)
    for cut in cuts(content):
        here, there = socket.socketpair()
        with here, there:
            here.sendall(to_bytes(CancelJob("before")) + content[:cut])
            here.close()
            channel = Channel(there)
            assert received(channel) == CancelJob("before")
            assert received(channel) is None


@pytest.mark.parametrize("message", [said()[1], said()[2], Stopped(failed=True)], ids=type)
def test_a_report_that_breaks_off_is_the_end(message: Any) -> None:
    content = to_bytes(message)
    for cut in cuts(content):
        here, there = socket.socketpair()
        with here, there:
            here.sendall(to_bytes(Stopped(failed=False)) + content[:cut])
            here.close()
            assert asyncio.run(read_all(there)) == [Stopped(failed=False)]


def test_an_end_that_has_left_something_unread_is_the_end_too() -> None:
    for is_engine in (True, False):
        here, there = socket.socketpair()
        with here, there:
            there.sendall(b"nobody reads this")
            here.close()  # the other end gets a reset
            assert (received(Channel(there)) is None) if is_engine else (asyncio.run(read_all(there)) == [])
