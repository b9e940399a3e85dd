"""A few of the disturbances, each once, and controls that must fail."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.chaos import __main__ as chaos
from bench.chaos import faults
from bench.chaos.disturbances import DISTURBANCES, Disturbance, DisturbanceError, Scene
from bench.chaos.load import EVENTS, KINDS, BadAnswerError, EndedError, Kind, Outcome, Result, ask, result_of
from bench.chaos.service import Held, Service
from bench.soak import tiny_model
from model import checkpoint

KILLED = next(each for each in DISTURBANCES if each.name == "an engine is killed")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos.Prepared]:
    folder = tmp_path_factory.mktemp("chaos")
    checkpoint.save(folder / "model", tiny_model(class_names=faults.CLASSES))
    service = Service(folder / "model", folder)
    yield asyncio.run(chaos.prepare(service))
    service.stop()


@pytest.mark.slow
def test_disturbances_cost_nobody_else_an_answer(prepared: chaos.Prepared) -> None:
    chosen = [each for each in DISTURBANCES if each.short]
    lines = asyncio.run(chaos.run(prepared, chosen, 1))
    assert [line.faults for line in lines] == [[] for _ in chosen]
    assert all(line.outcomes["right"] == line.outcomes.total() > 0 for line in lines)
    assert lines[chosen.index(KILLED)].replayed > 0


@pytest.mark.slow
def test_without_replay_a_killed_engine_does(
    prepared: chaos.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "SETTLE_S", 1.0)
    faults.throw(prepared.service.folder, faults.NO_REPLAY, "")
    try:
        (line,) = asyncio.run(chaos.run(prepared, [KILLED], 1))
    finally:
        (prepared.service.folder / faults.NO_REPLAY).unlink()
    assert line.outcomes["engine_killed"] > 0
    assert any("engine_killed" in fault for fault in line.faults)


@pytest.mark.slow
def test_what_a_disturbance_leaves_behind_is_found(
    prepared: chaos.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "SETTLE_S", 1.0)
    left: list[socket.socket] = []

    async def leak(scene: Scene) -> None:
        # More than connections of the baseline that may have been about to close.
        left.extend(socket.create_connection(("127.0.0.1", scene.service.port)) for _ in range(16))

    async def fail(_: Scene) -> None:
        raise DisturbanceError("it came out otherwise")

    try:
        chosen = [Disturbance("leaks", leak), Disturbance("fails", fail)]
        leaking, failing = asyncio.run(chaos.run(prepared, chosen, 1))
    finally:
        for each in left:
            each.close()
    assert any("descriptors" in fault for fault in leaking.faults)
    assert any("otherwise" in fault for fault in failing.faults)
    assert "**no**" in str(leaking)


@pytest.mark.slow
def test_an_answer_with_other_bytes_is_wrong(prepared: chaos.Prepared) -> None:
    for kind in (KINDS[0], replace(KINDS[1], body={**KINDS[1].body, "seed": 8})):
        found = asyncio.run(ask(prepared.service.url, kind, {kind.name: Result("something else")}))
        assert found.how == "wrong"


def test_nobody_there_is_not_an_answer_cut_off() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert asyncio.run(ask(url, KINDS[0], {})).how == "unreachable"


# ── Streams ────────────────────────────────────────────────────────────────────────────────────

STREAM = Kind("stream", "/generate", EVENTS, {})


def event(name: str, number: int, **data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\nid: job:{number}\n\n".encode()


QUEUED = event("queued", 1)
PREVIEW = event("preview", 2, step=1, images=[{"index": 0, "b64_json": "x"}])
AGAIN = event("preview", 3, step=1, images=[{"index": 0, "b64_json": "x"}])
COMPLETED = event("completed", 3, images=["picture"])


def test_a_stream_is_read() -> None:
    found = result_of(STREAM, QUEUED + b": ping\n\n" + PREVIEW + COMPLETED)
    assert found == Result(["picture"], {(1, 0): "x"})
    assert result_of(STREAM, QUEUED + COMPLETED, gaps=True).answer == ["picture"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        QUEUED + PREVIEW,
        QUEUED + PREVIEW + COMPLETED[:-1],
        PREVIEW + COMPLETED,
        QUEUED + QUEUED + COMPLETED,
        QUEUED + COMPLETED,  # with a gap
        QUEUED + PREVIEW + COMPLETED + event("completed", 4, images=[]),
        QUEUED + PREVIEW + AGAIN + event("completed", 4, images=[]),
    ],
    ids=["empty", "no end", "cut", "no beginning", "two beginnings", "a gap", "two ends", "a preview again"],
)
def test_a_stream_that_does_not_end_exactly_once_is_wrong(content: bytes) -> None:
    with pytest.raises(BadAnswerError):
        result_of(STREAM, content)


def test_a_stream_that_ends_with_an_error_says_which() -> None:
    with pytest.raises(EndedError, match="engine_killed"):
        result_of(STREAM, QUEUED + event("error", 2, code="engine_killed"))


# ── Verdicts ───────────────────────────────────────────────────────────────────────────────────


def test_only_what_is_allowed_may_become_of_requests_and_only_after_its_time() -> None:
    async def nothing(_: Scene) -> None: ...

    allowing = Disturbance("drain", nothing, frozenset({"draining"}))
    outcomes = [
        Outcome("a", 1.0, "right"),
        Outcome("b", 1.0, "draining"),
        Outcome("c", 3.0, "draining"),
        Outcome("d", 3.0, "wrong"),
    ]
    assert [each.split(":")[0] for each in chaos.unwanted(outcomes, allowing, 2.0)] == ["b", "d"]


def test_more_than_at_the_baseline_is_named() -> None:
    baseline = Held(0, 8, 16, 6, 2, 4, 12)
    assert baseline.excess(baseline) == {}
    assert replace(baseline, tasks=9).excess(baseline) == {"tasks": "8 → 9"}
    assert replace(baseline, descriptors=17).excess(baseline) == {"descriptors": "16 → 17"}
    assert replace(baseline, engines=1).excess(baseline) == {"engines": "2 → 1"}
    assert replace(baseline, threads=200).excess(baseline) == {"threads": "6 → 200"}


def test_a_switch_is_taken_once(tmp_path: Path) -> None:
    file = faults.throw(tmp_path, faults.NEXT_STEP, "raise")
    assert faults.take(tmp_path, faults.NEXT_STEP) == "raise"
    assert not file.exists()
    assert faults.take(tmp_path, faults.NEXT_STEP) is None
