"""What can be made to go wrong inside a process: by the class of a request, or by a switch in a folder.

Classes concern one request, whenever it runs: the model has a class for each fault. A switch is a file; the
fault that it names happens once, in the next step of whichever engine takes it. None of this is in the
service: `bench.chaos.api` and `bench.chaos.engine` start the real one with it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

CLASSES = ("a", "b", "raises", "gives NaN", "ends the engine")
"""Of the model: two healthy ones, and three that are faults."""
RAISES, GIVES_NAN, ENDS = (CLASSES.index(name) for name in CLASSES[2:])
NEXT_STEP, CLOCK, NO_REPLAY = "next-step", "clock", "no-replay"
"""Switches: what happens in the next step; by how many seconds the time of day is off; that a job
whose engine dies fails."""


def throw(folder: Path, switch: str, what: str) -> Path:
    """Set a switch, whole. Returns its file, which is there until an engine has taken it."""
    file = folder / switch
    partial = folder / f"{switch}.partial"
    partial.write_text(what)
    partial.rename(file)
    return file


def take(folder: Path, switch: str) -> str | None:
    """What a switch says; it is this process's, and no other's, from here on."""
    mine = folder / f"{switch}.{os.getpid()}"
    try:
        (folder / switch).rename(mine)
    except FileNotFoundError:
        return None
    what = mine.read_text()
    mine.unlink()
    return what


def follow_clock(folder: Path) -> None:
    """Have this process see the time of day that the switch `clock` says; monotonic time stays as it is."""
    seconds, nanoseconds = time.time, time.time_ns

    def off() -> float:
        with suppress(FileNotFoundError):
            return float((folder / CLOCK).read_text())
        return 0.0

    time.time = lambda: seconds() + off()
    time.time_ns = lambda: nanoseconds() + int(off() * 1e9)
