"""From the worker's thread to asyncio: one stream per job.

The worker publishes and never waits. Previews that nobody has read yet are replaced by newer ones of the
same image; the first and the last event are never dropped. A stream outlives its reader for a grace
period, so that a reader who lost the connection can come back to the same job.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from service.events import Event, Picture, Preview, Queued, Terminal


@dataclass(frozen=True)
class Numbered:
    """An event as a reader gets it. Numbers rise by one within a job."""

    number: int
    event: Event


class Stream:
    """The events of one job, for one reader at a time."""

    def __init__(self, job_id: str, loop: asyncio.AbstractEventLoop, tag: Any) -> None:
        self.job_id, self.tag = job_id, tag
        self._loop, self._wake = loop, asyncio.Event()
        self._lock = threading.Lock()
        self._queued: Queued | None = None
        self._previews: dict[tuple[int, str], Preview] = {}  # (image, kind) → its latest look
        self._last: Terminal | None = None
        self._taken: deque[Numbered] = deque()
        self._number = 0
        self._last_number: int | None = None
        self.reader = 0

    def publish(self, event: Event) -> None:
        """Hand over an event. Called from any thread; never blocks for a reader."""
        with self._lock:
            match event:
                case Queued():
                    self._queued = event
                case Preview():
                    for picture in event.pictures:
                        key = (picture.index, picture.kind)
                        self._previews.pop(key, None)  # re-inserted at the end: order is order of arrival
                        self._previews[key] = replace(event, pictures=(picture,))
                case _:
                    self._last = event
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed: nobody is left to wake
            return

    @property
    def over(self) -> bool:
        """Whether the last event has been published."""
        return self._last is not None

    def delivered(self, number: int) -> bool:
        """Whether a reader who has seen event `number` has seen the last one."""
        return self._last_number is not None and number >= self._last_number

    def attach(self) -> int:
        """A new reader, by the number it goes by; it takes over from one that is still there."""
        self.reader += 1
        self._wake.set()  # lets the former reader notice
        return self.reader

    async def events(self, reader: int, idle_s: float | None = None) -> AsyncIterator[Numbered | None]:
        """Every event until the last, or until another reader takes over; None after `idle_s` without one."""
        if self._last_number is not None and self._last is not None and not self._taken:
            yield Numbered(self._last_number, self._last)  # it was sent, but did not arrive
            return
        while reader == self.reader:
            if not self._taken:
                self._take()
            if not self._taken:
                try:
                    async with asyncio.timeout(idle_s):
                        await self._wake.wait()
                except TimeoutError:
                    yield None
                continue
            item = self._taken.popleft()
            yield item
            if item.number == self._last_number:
                return

    async def last(self, reader: int) -> Terminal:
        """The last event, skipping the others."""
        async for item in self.events(reader):
            if item is not None and isinstance(item.event, Terminal):
                return item.event
        raise asyncio.CancelledError  # another reader took over

    def _take(self) -> None:
        """Number what has been published since the last time."""
        with self._lock:
            self._wake.clear()
            events: list[Event] = [] if self._queued is None else [self._queued]
            events += _together(list(self._previews.values()))
            self._queued = None
            self._previews.clear()
            if self._last is not None:
                events.append(self._last)
        for event in events:
            self._number += 1
            self._taken.append(Numbered(self._number, event))
        if events and isinstance(events[-1], Terminal):
            self._last_number = self._number


def _together(previews: list[Preview]) -> list[Preview]:
    """Join previews of the same step into one event, as the worker published them."""
    by_step: dict[int, Preview] = {}
    for preview in previews:
        known = by_step.get(preview.step)
        pictures: tuple[Picture, ...] = known.pictures if known is not None else ()
        by_step[preview.step] = replace(preview, pictures=pictures + preview.pictures)
    return list(by_step.values())


@dataclass
class Streams:
    """Every job's stream, from its start until the grace period after its reader has gone.

    `abandon` is called with the id of a job that nobody came back to while it was still running.
    """

    grace_s: float
    abandon: Callable[[str], None]
    _streams: dict[str, Stream] = field(default_factory=dict)
    _leaving: dict[str, asyncio.TimerHandle] = field(default_factory=dict)

    def open(self, job_id: str, tag: Any = None) -> Stream:
        """A stream for a new job, on the running loop. `tag` is kept for whoever finds the stream again."""
        stream = self._streams[job_id] = Stream(job_id, asyncio.get_running_loop(), tag)
        return stream

    def publish(self, event: Event) -> None:
        """Hand an event to its job's stream, if it still has one. Called from the worker's thread."""
        stream = self._streams.get(event.job_id)
        if stream is not None:
            stream.publish(event)

    def find(self, job_id: str) -> Stream | None:
        """The stream of a job, as long as a reader may come back to it."""
        return self._streams.get(job_id)

    def stay(self, stream: Stream, reader: int) -> None:
        """The reader is here: the stream's removal is called off."""
        timer = self._leaving.pop(stream.job_id, None) if reader == stream.reader else None
        if timer is not None:
            timer.cancel()

    def leave(self, stream: Stream, reader: int, grace_s: float | None = None) -> None:
        """The reader is gone: forget the stream after the grace period, and abandon a job still running.

        Nothing happens when another reader has taken over meanwhile.
        """
        if reader != stream.reader:
            return
        self.stay(stream, reader)
        grace = self.grace_s if grace_s is None else grace_s
        if grace <= 0:
            self._forget(stream)
        else:
            loop = asyncio.get_running_loop()
            self._leaving[stream.job_id] = loop.call_later(grace, self._forget, stream)

    def _forget(self, stream: Stream) -> None:
        self._leaving.pop(stream.job_id, None)
        self._streams.pop(stream.job_id, None)
        if not stream.over:
            self.abandon(stream.job_id)

    @property
    def unread(self) -> int:
        """Streams that a reader still follows or may come back to."""
        return len(self._streams) - len(self._leaving)

    def close(self) -> None:
        """Forget everything; nothing is abandoned."""
        for timer in self._leaving.values():
            timer.cancel()
        self._leaving.clear()
        self._streams.clear()
