"""From the engine to asyncio: one stream of events per job.

Publishing never waits for a reader. Previews that nobody has read yet are replaced by newer ones of the same
image; the first and the last event are never dropped. There is one way to read a stream:

    async with streams.subscribe(job_id, context, grace_s=10) as events:
        async for item in events: …

A new subscriber takes over from the one before it. When a subscriber leaves and none comes within its grace
period, the stream is forgotten, and a job that is still running is cancelled. That period is short while
others are refused for want of what such jobs hold. A stream that is held needs no subscriber: it stays until
it is let go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from msgspec.structs import replace

from service.engine.messages import Event, Picture, Preview, Queued, Terminal
from service.errors import ServiceError

Context = TypeVar("Context")
"""What a later subscriber needs to know about a job, kept beside its stream."""


SHORT_GRACE_S = 2.0
"""Grace period of a stream while others are refused: enough to reconnect after a lost connection."""


class Position(NamedTuple):
    """How far a reader had come elsewhere: the number of the last event, and the step that it was of."""

    number: int = 0
    step: int = 0


class SequencedEvent(NamedTuple):
    """An event as a reader gets it. Numbers rise by one within a job."""

    number: int
    event: Event


class Stream(Generic[Context]):
    """The events of one job, for one reader at a time. after: those up to there were read elsewhere."""

    def __init__(self, job_id: str, context: Context, after: Position | None = None) -> None:
        self.job_id, self.context, self._after = job_id, context, after
        self._wake: asyncio.Future[bool] | None = None  # of a reader who waits
        self._queued: Queued | None = None
        self._previews: dict[tuple[int, str], Preview] = {}  # (image, kind) → its latest snapshot
        self._last: Terminal | None = None
        self._taken: deque[SequencedEvent] = deque()
        self._number = after.number if after is not None else 0
        self._last_number: int | None = None
        self._reader = 0
        self._shown: dict[tuple[int, str], Preview] = {}  # as previews, read or not, until it is over
        self.followed = False
        self.ended: Callable[[Terminal], Terminal] | None = None  # of one that is held
        self.removal: asyncio.TimerHandle | None = None  # pending while there is no reader
        self.left = 0.0  # when the last reader did

    def publish(self, event: Event) -> None:
        """Hand over an event."""
        if self._after is not None and _read(event, self._after):
            return
        match event:
            case Queued():
                self._queued = event
            case Preview():
                for picture in event.pictures:
                    key = (picture.index, picture.kind)
                    self._previews.pop(key, None)  # re-inserted at the end: order is order of arrival
                    self._previews[key] = self._shown[key] = replace(event, pictures=(picture,))
            case _:
                self._shown.clear()
                if self.ended is None:
                    self._last = event
                else:
                    self._last = self.ended(event)
                    if not self.followed:  # it may be kept for long
                        self._previews.clear()
        _resolve(self._wake, True)

    @property
    def over(self) -> bool:
        """Whether the last event has been published."""
        return self._last is not None

    @property
    def last(self) -> Terminal | None:
        """The last event, once it has been published; to look at, whoever reads it."""
        return self._last

    @property
    def shown(self) -> list[Preview]:
        """The latest previews of all images, by step, until it is over; to look at, whoever reads them."""
        return sorted(_merged(list(self._shown.values())), key=lambda preview: preview.step)

    def delivered(self, number: int) -> bool:
        """Whether a reader who has seen event `number` has seen the last one."""
        return self._last_number is not None and number >= self._last_number

    def attach(self) -> Subscription[Context]:
        """A new reader; it takes over from one that is still there."""
        self._reader += 1
        self.followed = True
        _resolve(self._wake, True)  # lets the former reader notice
        return Subscription(self, self._reader)

    def is_current(self, reader: int) -> bool:
        """Whether no other reader has taken over."""
        return reader == self._reader

    async def wait(self, reader: int, idle_s: float | None = None) -> bool:
        """Wait for something to take. False after `idle_s` seconds without, and if there is nothing more."""
        if self._last_number is not None and self._last is not None and not self._taken:
            self._taken.append(
                SequencedEvent(self._last_number, self._last)
            )  # it was sent, but did not arrive
        while self.is_current(reader):
            if not self._taken:
                self._take()
            if self._taken:
                return True
            if not await self._woken(idle_s):
                break
        return False

    async def _woken(self, idle_s: float | None) -> bool:
        """Whether something was published, or another reader came, within so many seconds."""
        loop = asyncio.get_running_loop()
        self._wake = loop.create_future()
        idle = None if idle_s is None else loop.call_later(idle_s, _resolve, self._wake, False)
        try:
            return await self._wake
        finally:
            if idle is not None:
                idle.cancel()

    def take(self) -> SequencedEvent:
        """The next event, once it has been waited for."""
        return self._taken.popleft()

    def take_all(self) -> list[SequencedEvent]:
        """All events that are there, once they have been waited for."""
        taken = list(self._taken)
        self._taken.clear()
        return taken

    def _take(self) -> None:
        """Number what has been published since the last time."""
        events: list[Event] = [] if self._queued is None else [self._queued]
        events += _merged(list(self._previews.values()))
        self._queued = None
        self._previews.clear()
        if self._last is not None:
            events.append(self._last)
        for event in events:
            self._number += 1
            self._taken.append(SequencedEvent(self._number, event))
        if events and isinstance(events[-1], Terminal):
            self._last_number = self._number


class Subscription(Generic[Context]):
    """A reader's view of a stream; iterate over it, once or again from where it was left."""

    def __init__(self, stream: Stream[Context], reader: int) -> None:
        self._stream, self._reader = stream, reader

    @property
    def current(self) -> bool:
        """Whether no other reader has taken over."""
        return self._stream.is_current(self._reader)

    async def batches(self, idle_s: float | None = None) -> AsyncIterator[list[SequencedEvent]]:
        """What there is to read, again and again: all of it at once, and nothing after `idle_s` without it.

        Ends after the last event, or when another reader takes over.
        """
        while self.current:
            batch = self._stream.take_all() if await self._stream.wait(self._reader, idle_s) else []
            if batch or self.current:
                yield batch
            if batch and isinstance(batch[-1].event, Terminal):
                return

    async def __aiter__(self) -> AsyncIterator[SequencedEvent]:
        async for batch in self.batches():
            for item in batch:
                yield item

    async def first(self) -> SequencedEvent:
        """The next event, whatever it is."""
        if await self._stream.wait(self._reader):
            return self._stream.take()
        raise asyncio.CancelledError  # another reader took over

    async def last(self) -> Terminal:
        """The last event; those before it are skipped."""
        async for batch in self.batches():
            if isinstance(batch[-1].event, Terminal):
                return batch[-1].event
        raise asyncio.CancelledError  # another reader took over


def _read(event: Event, after: Position) -> bool:
    return isinstance(event, Queued) or (isinstance(event, Preview) and event.step <= after.step)


def _resolve(waiting: asyncio.Future[bool] | None, value: bool) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(value)


def _merged(previews: list[Preview]) -> list[Preview]:
    """Previews of one step as one event, as the engine published them."""
    by_step: dict[int, Preview] = {}
    for preview in previews:
        known = by_step.get(preview.step)
        pictures: tuple[Picture, ...] = known.pictures if known is not None else ()
        by_step[preview.step] = replace(preview, pictures=pictures + preview.pictures)
    return list(by_step.values())


@dataclass
class Streams(Generic[Context]):
    """Every job's stream, from its first subscriber until the grace period after its last one.

    abandon: called with the id of a job that nobody came back to while it was still running. pressed: whether
    others are being refused, so that the grace period is a short one.
    """

    abandon: Callable[[str], None]
    pressed: Callable[[], bool] = lambda: False
    _streams: dict[str, Stream[Context]] = field(default_factory=dict)

    @asynccontextmanager
    async def subscribe(
        self, job_id: str, context: Context, grace_s: float = 0.0, after: Position | None = None
    ) -> AsyncIterator[Subscription[Context]]:
        """Read a job's events, from the start or from where the reader before this one stopped.

        grace_s: how long the stream and a running job outlive this reader. A job that turns out to be refused
        (a ServiceError in the body) is forgotten at once. after: where a reader of another process stopped.
        """
        stream = self._streams.get(job_id)
        if stream is None:
            stream = self._streams[job_id] = Stream(job_id, context, after)
        subscription = stream.attach()
        self._keep(stream)
        try:
            yield subscription
        except ServiceError:
            grace_s = 0.0
            raise
        finally:
            if subscription.current:
                self._leave(stream, grace_s)

    def hold(self, job_id: str, context: Context, ended: Callable[[Terminal], Terminal]) -> None:
        """Keep a job's stream, with a reader or without one, until it is let go.

        ended: given the job's last event, returns what is to be kept of it.
        """
        stream = self._streams[job_id] = Stream(job_id, context)
        stream.ended = ended

    def let_go(self, job_id: str) -> None:
        """Forget a stream that was held; a reader finishes, and a job that is still running is cancelled."""
        stream = self._streams.get(job_id)
        if stream is not None:
            self._forget(stream)

    def publish(self, event: Event) -> None:
        """Hand an event to its job's stream, if it still has one."""
        stream = self._streams.get(event.job_id)
        if stream is not None:
            stream.publish(event)

    def find(self, job_id: str) -> Stream[Context] | None:
        """The stream of a job, as long as a reader may come back to it."""
        return self._streams.get(job_id)

    def _keep(self, stream: Stream[Context]) -> None:
        if stream.removal is not None:
            stream.removal.cancel()
            stream.removal = None

    def _leave(self, stream: Stream[Context], grace_s: float) -> None:
        stream.followed = False
        if stream.ended is not None:
            return
        if grace_s <= 0:
            self._forget(stream)
        else:
            if self.pressed():
                grace_s = min(grace_s, SHORT_GRACE_S)
            loop = asyncio.get_running_loop()
            stream.left = loop.time()
            stream.removal = loop.call_later(grace_s, self._forget, stream)

    def hurry(self) -> dict[str, float]:
        """Shorten the grace period of jobs that run without a reader. Returns the seconds that each has."""
        loop = asyncio.get_running_loop()
        left: dict[str, float] = {}
        for stream in self._streams.values():
            if stream.removal is None or stream.over:
                continue
            at = stream.left + SHORT_GRACE_S
            if at < stream.removal.when():
                stream.removal.cancel()
                stream.removal = loop.call_at(at, self._forget, stream)
            left[stream.job_id] = max(0.0, stream.removal.when() - loop.time())
        return left

    def _forget(self, stream: Stream[Context]) -> None:
        self._keep(stream)
        if self._streams.get(stream.job_id) is stream:
            del self._streams[stream.job_id]
        if not stream.over:
            self.abandon(stream.job_id)

    @property
    def followed(self) -> int:
        """Streams that have a reader."""
        return sum(stream.followed for stream in list(self._streams.values()))

    def close(self) -> None:
        """Forget everything; nothing is abandoned."""
        for stream in self._streams.values():
            self._keep(stream)
        self._streams.clear()
