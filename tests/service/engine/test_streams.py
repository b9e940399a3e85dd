"""One job's events on their way to a reader: what coalesces, what never drops, who takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest

from service.engine.jobs import SnapshotKind
from service.engine.messages import Cancelled, Event, Failed, Finished, Picture, Preview, Queued
from service.engine.streams import SequencedEvent, Stream, Streams
from service.errors import ComputeError, QueueFullError

QUEUED = Queued("job", 0, 1.0)
FINISHED = Finished("job", (), 0.0, 1.0)
ENDS = [FINISHED, Failed("job", ComputeError("no")), Cancelled("job")]


def preview(step: int, *indices: int, kind: SnapshotKind = "x0") -> Preview:
    pictures = tuple(Picture(i, i, kind, np.zeros((1, 1, 1), np.uint8)) for i in indices or (0,))
    return Preview("job", step, 50, 50 - step, 1.0, pictures)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(bounded())


def a_stream() -> Stream[None]:
    return Stream("job", None)


async def read(stream: Stream[None]) -> list[SequencedEvent]:
    return [item async for item in stream.attach()]


def described(items: list[SequencedEvent]) -> list[tuple[str, int | None, list[int]]]:
    """(type, step, images) of each."""
    return [
        (
            type(item.event).__name__,
            item.event.step if isinstance(item.event, Preview) else None,
            [p.index for p in item.event.pictures] if isinstance(item.event, Preview) else [],
        )
        for item in items
    ]


@pytest.mark.parametrize("last", ENDS)
def test_a_late_reader_gets_the_first_the_latest_and_the_last(last: Event) -> None:
    async def test() -> None:
        stream = a_stream()
        events: list[Event] = [QUEUED, *(preview(step) for step in range(1, 50)), last]
        for event in events:
            stream.publish(event)
        items = await read(stream)
        assert [item.event for item in items][::2] == [QUEUED, last]
        assert described(items)[1] == ("Preview", 49, [0])
        assert [item.number for item in items] == [1, 2, 3]

    run(test)


def test_a_reader_that_keeps_up_misses_nothing() -> None:
    async def test() -> None:
        stream = a_stream()
        items = []
        coming: Iterator[Event] = iter([QUEUED, *(preview(step) for step in range(1, 20)), FINISHED])
        stream.publish(next(coming))
        async for item in stream.attach():
            items.append(item)
            if (event := next(coming, None)) is not None:
                stream.publish(event)
        assert [item.number for item in items] == list(range(1, 22))
        assert [step for _, step, _ in described(items)][1:-1] == list(range(1, 20))

    run(test)


def test_each_image_keeps_its_own_latest_snapshot() -> None:
    async def test() -> None:
        stream = a_stream()
        for event in (preview(1, 0, 1), preview(2, 1), preview(1, 2), preview(2, 2, kind="xt"), FINISHED):
            stream.publish(event)
        assert described(await read(stream)) == [
            ("Preview", 1, [0, 2]),
            ("Preview", 2, [1, 2]),
            ("Finished", None, []),
        ]

    run(test)


def test_previews_come_in_the_order_of_their_latest_snapshots() -> None:
    async def test() -> None:
        stream = a_stream()
        for event in (preview(1, 0), preview(2, 1), preview(3, 0), FINISHED):
            stream.publish(event)
        assert described(await read(stream))[:2] == [("Preview", 2, [1]), ("Preview", 3, [0])]

    run(test)


def test_publishing_after_the_loop_is_closed_is_harmless() -> None:
    streams: list[Stream[None]] = []

    async def test() -> None:
        streams.append(a_stream())

    run(test)
    streams[0].publish(FINISHED)
    assert streams[0].over


def test_a_reader_learns_that_nothing_happens() -> None:
    async def test() -> None:
        stream = a_stream()
        batches = stream.attach().batches(0.01)
        assert [await anext(batches) for _ in range(2)] == [[], []]
        stream.publish(QUEUED)
        (item,) = await anext(batches)
        assert item.event is QUEUED
        assert await anext(batches) == []
        stream.publish(shown := preview(3))
        stream.publish(FINISHED)
        (batch,) = [batch async for batch in batches]
        assert described(batch) == [("Preview", shown.step, [0]), ("Finished", None, [])]  # both at once
        assert [item.number for item in batch] == [2, 3]

    run(test)


def test_the_first_event_alone_leaves_the_others() -> None:
    async def test() -> None:
        stream = a_stream()
        for event in (QUEUED, preview(1), FINISHED):
            stream.publish(event)
        events = stream.attach()
        assert (await events.first()).event is QUEUED
        assert [item.number async for item in events] == [2, 3]

    run(test)


def test_the_last_event_alone() -> None:
    async def test() -> None:
        stream = a_stream()
        for event in (QUEUED, preview(1), FINISHED):
            stream.publish(event)
        assert await stream.attach().last() is FINISHED

    run(test)


# ── Readers who leave and come back ────────────────────────────────────────────────────────────


def test_numbers_continue_after_a_reconnect() -> None:
    async def test() -> None:
        stream = a_stream()
        stream.publish(QUEUED)
        async for item in stream.attach():
            assert item.number == 1
            break
        stream.publish(preview(1))
        stream.publish(FINISHED)
        assert [item.number for item in await read(stream)] == [2, 3]

    run(test)


def test_a_new_reader_takes_over() -> None:
    async def test() -> None:
        stream = a_stream()
        former = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        later = asyncio.create_task(read(stream))
        assert await former == []
        stream.publish(FINISHED)
        assert [item.event for item in await later] == [FINISHED]

    run(test)


def test_the_last_event_is_given_again_until_it_has_arrived() -> None:
    async def test() -> None:
        stream = a_stream()
        stream.publish(QUEUED)
        stream.publish(FINISHED)
        first = await read(stream)
        assert [item.number for item in first] == [1, 2]
        assert await read(stream) == first[1:]
        assert not stream.delivered(1)
        assert stream.delivered(2)
        assert stream.delivered(3)

    run(test)


def test_nothing_is_delivered_before_the_last_event_is_numbered() -> None:
    async def test() -> None:
        stream = a_stream()
        stream.publish(FINISHED)
        assert stream.over
        assert not stream.delivered(10**6)

    run(test)


# ── Subscriptions ──────────────────────────────────────────────────────────────────────────────


def streams_of(abandoned: list[str]) -> Streams[str]:
    return Streams(abandoned.append)


async def until_abandoned(abandoned: list[str]) -> None:
    while not abandoned:  # noqa: ASYNC110 (a callback on a timer sets no event)
        await asyncio.sleep(0.001)


def test_after_the_grace_period_the_job_is_abandoned() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context", 0.01):
            assert streams.followed == 1
        found = streams.find("job")
        assert found is not None
        assert found.context == "context"  # kept for a reader that comes back
        assert streams.followed == 0
        await until_abandoned(abandoned)
        assert abandoned == ["job"]
        assert streams.find("job") is None

    run(test)


def test_without_a_grace_period_at_once() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context"):
            pass
        assert (abandoned, streams.find("job")) == (["job"], None)

    run(test)


def test_a_job_that_is_over_is_not_abandoned() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context") as events:
            streams.publish(FINISHED)
            assert await events.last() is FINISHED
        assert (abandoned, streams.find("job")) == ([], None)
        streams.publish(FINISHED)  # to nobody

    run(test)


def test_a_stream_that_is_over_is_kept_for_the_grace_period() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context", 60) as events:
            streams.publish(FINISHED)
            last = await events.first()
        async with streams.subscribe("job", "context", 0.01) as events:
            assert await events.first() == last  # it may not have arrived
        while streams.find("job") is not None:  # noqa: ASYNC110 (a callback on a timer sets no event)
            await asyncio.sleep(0.001)
        assert abandoned == []

    run(test)


def test_a_reader_that_comes_back_in_time_keeps_the_job() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context", 0.02) as events:
            streams.publish(QUEUED)
            assert (await events.first()).event is QUEUED
        async with streams.subscribe("job", "context") as events:
            assert streams.followed == 1
            await asyncio.sleep(0.06)  # longer than the grace period: nothing is what must happen
            assert abandoned == []
            streams.publish(preview(1))
            assert (await events.first()).number == 2
        assert abandoned == ["job"]

    run(test)


def test_a_reader_that_was_taken_over_from_leaves_nothing_to_do() -> None:
    """Its connection may be found to be lost long after the new one has come."""

    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        taken_over, leave = asyncio.Event(), asyncio.Event()

        async def former() -> None:
            async with streams.subscribe("job", "context") as events:
                taken_over.set()
                await leave.wait()
                assert not events.current

        task = asyncio.create_task(former())
        await taken_over.wait()
        async with streams.subscribe("job", "context", 60) as later:
            leave.set()
            await task
            assert later.current
            assert (abandoned, streams.followed) == ([], 1)
        assert (abandoned, streams.followed) == ([], 0)
        streams.close()

    run(test)


def test_a_refused_job_is_forgotten_at_once_whatever_the_grace_period() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        with pytest.raises(QueueFullError):
            async with streams.subscribe("job", "context", 60):
                raise QueueFullError("full", 1.0)
        assert streams.find("job") is None

    run(test)


def test_a_disconnect_leaves_the_grace_period() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)

        async def follow() -> None:
            async with streams.subscribe("job", "context", 60) as events:
                await events.last()

        task = asyncio.create_task(follow())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert streams.find("job") is not None
        assert abandoned == []
        streams.close()

    run(test)


def test_closing_abandons_no_job() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        async with streams.subscribe("job", "context", 0.001):
            pass
        streams.close()
        await asyncio.sleep(0.01)
        assert abandoned == []
        assert streams.find("job") is None

    run(test)


# ── Streams that need no reader ────────────────────────────────────────────────────────────────


def test_a_stream_that_is_held_stays_without_a_reader_until_it_is_let_go() -> None:
    async def test() -> None:
        abandoned: list[str] = []
        streams = streams_of(abandoned)
        ends: list[Event] = []
        kept = Cancelled("kept")

        def ended(event: Event) -> Cancelled:
            ends.append(event)
            return kept

        streams.hold("job", "context", ended)
        assert streams.followed == 0
        streams.publish(QUEUED)
        async with streams.subscribe("job", "context") as events:
            assert streams.followed == 1
            assert (await events.first()).event is QUEUED
        assert (abandoned, streams.followed) == ([], 0)
        streams.publish(FINISHED)
        assert ends == [FINISHED]
        for _ in range(2):
            async with streams.subscribe("job", "context") as events:
                assert await events.last() is kept
        found = streams.find("job")
        assert found is not None
        assert found.last is kept
        streams.let_go("job")
        assert (abandoned, streams.find("job")) == ([], None)
        streams.let_go("job")

    run(test)


def test_a_job_that_is_let_go_while_it_runs_is_abandoned() -> None:
    abandoned: list[str] = []
    streams = streams_of(abandoned)
    streams.hold("job", "context", lambda event: event)
    streams.let_go("job")
    assert abandoned == ["job"]


def test_what_is_shown_can_be_looked_at_without_being_taken() -> None:
    async def test() -> None:
        stream = a_stream()
        assert stream.shown == []
        stream.publish(preview(1, 0, 1))
        stream.publish(preview(2, 1))
        for _ in range(2):
            assert [(each.step, [picture.index for picture in each.pictures]) for each in stream.shown] == [
                (1, [0]),
                (2, [1]),
            ]
        stream.publish(FINISHED)
        assert stream.shown == []
        assert stream.last is FINISHED

    run(test)
