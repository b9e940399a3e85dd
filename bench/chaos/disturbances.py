"""What is done to the service while it works. Each is a function, and a line of `DISTURBANCES`."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import psutil

from bench.chaos import clients, faults
from bench.chaos.api import STALL_S
from bench.chaos.load import EVENTS, KINDS, BadAnswerError, Result, result_of
from bench.chaos.service import Service

SECOND = 1.0
STARTED_S = 60.0
DAY_S = 86_400
LOADING = frozenset({"loading"})
REFUSED = frozenset({"draining", "loading", "unreachable", "cut"})
"""Of what comes after the signal; `cut` is a connection that nobody has accepted before the end."""
CUT = frozenset({"loading", "unreachable", "cut"})


class DisturbanceError(Exception):
    """The disturbance itself did not come out as it should."""


@dataclass
class Scene:
    """What a disturbance works on. since: what `allows` names may only happen to requests sent later."""

    service: Service
    expected: Mapping[str, Result]
    since: float = 0.0


@dataclass(frozen=True)
class Disturbance:
    """allows: what may become of other people's requests meanwhile, beside the right answer.

    short: part of the short form. replays: an engine dies, so that jobs are run again.
    """

    name: str
    act: Callable[[Scene], Awaitable[None]]
    allows: frozenset[str] = frozenset()
    short: bool = False
    replays: bool = False


async def until(condition: Callable[[], object], what: str, patience_s: float = STARTED_S) -> None:
    """Look again and again until it holds. Raises DisturbanceError."""
    give_up = time.monotonic() + patience_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > give_up:
            raise DisturbanceError(f"{what} did not come about in {patience_s:.0f} s")
        await asyncio.sleep(0.02)


# ── Clients ────────────────────────────────────────────────────────────────────────────────────


async def leave(scene: Scene, *, reset: bool) -> None:
    """Clients go in every state, three in each; the jobs that they have submitted are cancelled."""
    before = _cancelled(scene)
    await asyncio.gather(
        *(clients.leave(scene.service.url, state, reset=reset) for state in clients.STATES for _ in range(3))
    )
    # A reset may take with it what has been sent and not yet read.
    certain = 3 * sum(
        state in ("queued", "running") or (state == "sent" and not reset) for state in clients.STATES
    )
    await until(lambda: _cancelled(scene) >= before + certain, f"{certain} cancelled jobs")


def _cancelled(scene: Scene) -> float:
    return scene.service.metrics()["ddpm_cancelled_total"]


async def stall(scene: Scene) -> None:
    """Readers of streams do not read."""
    await asyncio.gather(*(clients.stall(scene.service.url, 2 * SECOND) for _ in range(4)))


async def trickle(scene: Scene) -> None:
    """Bodies come byte by byte. They are answered, or refused for it."""
    statuses = await asyncio.gather(*(clients.trickle(scene.service.url, 2 * SECOND) for _ in range(8)))
    if not set(statuses) <= {200, 408}:
        raise DisturbanceError(f"trickled bodies are answered by {statuses}")


async def resume(scene: Scene) -> None:
    """Streams lose their connection, and are resumed where they were."""
    stream = next(kind for kind in KINDS if kind.accept == EVENTS)
    kind = replace(stream, body={**stream.body, "preview_every": 1})
    for content in await asyncio.gather(*(clients.resume(scene.service.url, kind, 3) for _ in range(4))):
        try:
            found = result_of(kind, content, gaps=True)
        except BadAnswerError as error:
            raise DisturbanceError(f"a resumed stream: {error}") from None
        if found.answer != scene.expected[kind.name].answer:
            raise DisturbanceError("a resumed stream has other bytes than a quiet one")


# ── Engines ────────────────────────────────────────────────────────────────────────────────────


async def replaced(scene: Scene, engines: int, act: Callable[[], object]) -> None:
    """Do something that ends so many engines, and wait until others are warm."""
    before = scene.service.warm_engines()
    act()
    await until(lambda: scene.service.warm_engines() >= before + engines, "another engine")


async def signal_engines(scene: Scene, number: signal.Signals, engines: int) -> None:
    """Send a signal to so many engines at once."""

    def act() -> None:
        for each in scene.service.engines()[:engines]:
            each.send_signal(number)

    await replaced(scene, engines, act)


async def fail_step(scene: Scene, what: str) -> None:
    """A step fails once, and the engine survives it."""
    switch = scene.service.fault(what)
    await until(lambda: not switch.exists(), "the step")


async def lose_engine(scene: Scene, what: str) -> None:
    """A step ends its engine."""
    await replaced(scene, 1, lambda: scene.service.fault(what))


async def fail_sample(scene: Scene, label: int, code: str) -> None:
    """Requests fail by themselves, among others in the same steps."""
    body = {"class_label": faults.CLASSES[label], "num_inference_steps": 20, "n": 2}
    for status, answer in await asyncio.gather(*(clients.post(scene.service.url, body) for _ in range(4))):
        if (status, answer.get("code")) != (500, code):
            raise DisturbanceError(f"instead of {code}: {status} {answer}")


async def kill_twice(scene: Scene) -> None:
    """A request ends every engine that runs it."""
    before = scene.service.warm_engines()
    body = {"class_label": faults.CLASSES[faults.ENDS], "num_inference_steps": 20}
    status, answer = await clients.post(scene.service.url, body)
    if (status, answer.get("code")) != (500, "engine_killed"):
        raise DisturbanceError(f"instead of engine_killed: {status} {answer}")
    await until(lambda: scene.service.warm_engines() >= before + 2, "another engine")


# ── The API ────────────────────────────────────────────────────────────────────────────────────


async def end_api(scene: Scene, number: signal.Signals, code: int) -> None:
    """Signal the API, wait for its end, see that no engine stays, and start it again."""
    service, engines = scene.service, scene.service.engines()
    if number is signal.SIGTERM:  # what was accepted before it is finished
        scene.since = time.monotonic()
    service.popen.send_signal(number)
    await until(lambda: service.popen.poll() is not None, "the end of the API")
    if service.popen.returncode != code:
        raise DisturbanceError(f"the API has ended with {service.popen.returncode}")
    await until(lambda: not any(each.is_running() for each in engines), "the end of the engines", 10.0)
    await asyncio.to_thread(service.start)


async def pause_api(scene: Scene, seconds: float) -> None:
    """Stop the API's process for a while."""
    scene.service.popen.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    scene.service.popen.send_signal(signal.SIGCONT)


# ── The machine ────────────────────────────────────────────────────────────────────────────────


async def fill_disk(scene: Scene) -> None:
    """No file can grow, the log included, while there is something to log."""
    processes = [scene.service.process, *scene.service.engines()]
    limits = [each.rlimit(resource.RLIMIT_FSIZE) for each in processes]
    try:
        for each, (_, hard) in zip(processes, limits, strict=True):
            each.rlimit(resource.RLIMIT_FSIZE, (0, hard))
        await fail_sample(scene, faults.RAISES, "compute_failed")
    finally:
        for each, limit in zip(processes, limits, strict=True):
            with suppress(psutil.NoSuchProcess):
                each.rlimit(resource.RLIMIT_FSIZE, limit)


async def shift_clock(scene: Scene) -> None:
    """The time of day jumps by a day, back by two, and back again; monotonic time goes on."""
    for seconds in (DAY_S, -DAY_S):
        faults.throw(scene.service.folder, faults.CLOCK, str(seconds))
        await asyncio.sleep(SECOND)
    (scene.service.folder / faults.CLOCK).unlink()


KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
DISTURBANCES = (
    Disturbance("clients leave in every state", partial(leave, reset=False), short=True),
    Disturbance("clients reset in every state", partial(leave, reset=True), short=True),
    Disturbance("readers stall", stall),
    Disturbance("bodies trickle", trickle),
    Disturbance("streams are resumed", resume, short=True),
    Disturbance("a step raises", partial(fail_step, what="raise"), short=True),
    Disturbance("a step runs out of memory", partial(fail_step, what="out of memory")),
    Disturbance(
        "samples raise", partial(fail_sample, label=faults.RAISES, code="compute_failed"), short=True
    ),
    Disturbance(
        "samples are NaN", partial(fail_sample, label=faults.GIVES_NAN, code="non_finite"), short=True
    ),
    Disturbance(
        "an engine is killed", partial(signal_engines, number=KILL, engines=1), short=True, replays=True
    ),
    Disturbance(
        "both engines are killed", partial(signal_engines, number=KILL, engines=2), LOADING, replays=True
    ),
    Disturbance("an engine is stopped", partial(signal_engines, number=STOP, engines=1), replays=True),
    Disturbance("an engine hangs", partial(lose_engine, what="hang"), replays=True),
    Disturbance("an engine aborts", partial(lose_engine, what="abort"), replays=True),
    Disturbance("a device is lost", partial(lose_engine, what="lose the device"), replays=True),
    Disturbance("a request ends its engine, twice", kill_twice),
    Disturbance("the API is stopped, and continued", partial(pause_api, seconds=STALL_S / 2), short=True),
    Disturbance("the API is stopped for long", partial(pause_api, seconds=2 * STALL_S)),
    Disturbance("the API gets SIGTERM", partial(end_api, number=TERM, code=0), REFUSED),
    Disturbance("the API is killed", partial(end_api, number=KILL, code=-KILL), CUT),
    Disturbance("the disk is full", fill_disk),
    Disturbance("the time of day jumps", shift_clock),
)
