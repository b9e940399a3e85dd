"""A steady load of requests of every kind, each of whose answers is compared with that of a quiet run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from bench import http
from service.http.forms import HALVES

JSON, PNG, EVENTS = "application/json", "image/png", "text/event-stream"
PATIENCE_S = 60.0
"""A request without an answer for so long counts as forgotten."""
CLIENTS = 6
QUIET_RUNS = 3


@dataclass(frozen=True)
class Kind:
    """What is sent, and what for."""

    name: str
    path: str
    accept: str
    body: Mapping[str, Any]


def _generate(**fields: Any) -> dict[str, Any]:
    return {"sampler": "ddpm", "num_inference_steps": 30, "seed": 7, "class_label": "a", **fields}


KINDS = (
    Kind("JSON", "/generate", JSON, _generate(n=3)),
    Kind("PNG", "/generate", PNG, _generate(sampler="ddim", num_inference_steps=20, class_label="b", seed=1)),
    Kind("guided", "/generate", JSON, _generate(guidance_scale=3.0, seed=21, n=2)),
    Kind("stream", "/generate", EVENTS, _generate(num_inference_steps=60, seed=42)),
    Kind("stream of every step", "/generate", EVENTS, _generate(n=2, seed=5, preview_every=1)),
    Kind("edit", "/edit", JSON, {"image": HALVES, "strength": 0.8, "num_inference_steps": 30, "seed": 3}),
    Kind("score", "/score", JSON, {"images": [HALVES], "terms": 10, "seed": 9}),
)


@dataclass(frozen=True)
class Result:
    """What is the same in any run: of an answer, and of each preview by (step, image)."""

    answer: object
    previews: Mapping[tuple[int, int], str] = field(default_factory=dict)


class BadAnswerError(Exception):
    """An answer that is a success and yet wrong."""


class EndedError(Exception):
    """A job has ended with an error. The argument is its code."""


def result_of(kind: Kind, content: bytes, *, gaps: bool = False) -> Result:
    """Read a whole answer. gaps: events may be missing, as after a reconnect.

    Raises BadAnswerError or EndedError.
    """
    if kind.accept == PNG:
        return Result(content)
    if kind.accept == JSON:
        return Result(_lasting(json.loads(content)))
    return _streamed(content, gaps=gaps)


def _lasting(answer: Mapping[str, Any]) -> object:
    """Without the job's id and its times."""
    return answer["images"] if "images" in answer else answer["scores"]


def _streamed(content: bytes, *, gaps: bool) -> Result:
    """A stream from its first event to its last."""
    *events, rest = content.split(b"\n\n")
    parsed = [event for event in map(_event, events) if event]
    names = [event["event"] for event in parsed]
    if rest or names[:1] != ["queued"] or names.count("queued") != 1:
        raise BadAnswerError("a stream does not begin with one queued event and end with a whole one")
    if names[-1] not in ("completed", "error") or not set(names[1:-1]) <= {"preview"}:
        raise BadAnswerError(f"a stream does not end exactly once: {names}")
    numbers = [int(event["id"].partition(":")[2]) for event in parsed]
    if numbers != (sorted(set(numbers)) if gaps else [*range(1, len(numbers) + 1)]):
        raise BadAnswerError("the events of a stream are not numbered one by one")
    last = json.loads(parsed[-1]["data"])
    if names[-1] == "error":
        raise EndedError(last["code"])
    previews: dict[tuple[int, int], str] = {}
    for data in (json.loads(event["data"]) for event in parsed[1:-1]):
        for image in data["images"]:
            if (place := (data["step"], image["index"])) in previews:
                raise BadAnswerError(f"a preview has come twice: {place}")
            previews[place] = image["b64_json"]
    return Result(_lasting(last), previews)


def _event(text: bytes) -> dict[str, str]:
    lines = (line.partition(": ") for line in text.decode().splitlines() if not line.startswith(":"))
    return {name: value for name, _, value in lines}


@dataclass(frozen=True)
class Outcome:
    """What became of a request. how: right, wrong, forgotten, cut, unreachable, or the code of a problem."""

    kind: str
    sent: float
    how: str
    detail: str = ""


async def ask(url: str, kind: Kind, expected: Mapping[str, Result]) -> Outcome:
    """Send a request, and compare its answer."""
    sent, content = time.monotonic(), bytearray()
    statuses: list[int] = []

    def outcome(how: str, detail: object = "") -> Outcome:
        return Outcome(kind.name, sent, how, str(detail))

    try:
        async with asyncio.timeout(PATIENCE_S):
            await http.request(url + kind.path, kind.accept, kind.body, statuses.append, content.extend)
    except TimeoutError:
        return outcome("forgotten")
    except ConnectionRefusedError:
        return outcome("unreachable")
    except (OSError, ValueError) as error:
        return outcome("cut", error)
    try:
        if statuses != [200]:
            return outcome(json.loads(content)["code"], statuses)
        _compare(result_of(kind, bytes(content)), expected[kind.name])
    except EndedError as error:
        return outcome(str(error))
    except (BadAnswerError, ValueError, LookupError) as error:
        return outcome("wrong", repr(error))
    return outcome("right")


def _compare(found: Result, expected: Result) -> None:
    if found.answer != expected.answer:
        raise BadAnswerError("other bytes than in a quiet run")
    differing = [at for at, b64 in found.previews.items() if expected.previews.get(at, b64) != b64]
    if differing:
        raise BadAnswerError(f"other previews than in a quiet run: {differing[:5]}")


async def quiet_results(url: str) -> dict[str, Result]:
    """The result of each kind, sent alone. Raises RuntimeError where it is not the same in every such run."""
    expected: dict[str, Result] = {}
    for kind in KINDS:
        previews: dict[tuple[int, int], str] = {}
        for run in range(QUIET_RUNS):
            every_step = {"preview_every": 1} if run and kind.accept == EVENTS else {}
            content = bytearray()
            body = {**kind.body, **every_step}
            status = await http.request(url + kind.path, kind.accept, body, on_piece=content.extend)
            if status != 200:
                raise RuntimeError(f"{kind.name}: status {status}, {content[:500].decode()}")
            found = result_of(kind, bytes(content))
            _compare(found, expected.get(kind.name, found))
            previews |= found.previews
            expected[kind.name] = Result(found.answer, previews)
    return expected


class Load:
    """Clients that each send one request after the other, of one kind after the other, while it runs."""

    def __init__(self, url: str, expected: Mapping[str, Result]) -> None:
        self.url, self.expected = url, expected
        self.outcomes: list[Outcome] = []
        self._numbers = count()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin, with no outcomes."""
        self.outcomes, self._over = [], False
        self._tasks = [asyncio.create_task(self._work()) for _ in range(CLIENTS)]

    async def stop(self) -> list[Outcome]:
        """Send nothing more, and wait for what is in flight. All outcomes since the start."""
        self._over = True
        await asyncio.gather(*self._tasks)
        return self.outcomes

    async def _work(self) -> None:
        while not self._over:
            kind = KINDS[next(self._numbers) % len(KINDS)]
            found = await ask(self.url, kind, self.expected)
            self.outcomes.append(found)
            if found.how != "right":
                await asyncio.sleep(0.05)  # not to fill the time in which nobody answers with refusals
