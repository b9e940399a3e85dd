"""An open-loop load: every ask of a trace goes out at its time, whatever has become of those before it.

Latency counts from the time an ask was *meant* to go out, so neither a slow server nor a slow generator can
hide a wait by holding back the next ask (coordinated omission). Every ask has a connection of its own, as
clients who know nothing of each other would.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import numpy as np

from bench.workload import Ask

GUIDANCE = 2.0
PNG = "iVBORw0KGgo"  # how every PNG begins, in base64
REFUSALS = (429, 503)

Fate = Literal["done", "rejected", "failed", "timeout"]
Figures = dict[str, float]


@dataclass(frozen=True)
class Door:
    """Where a server is asked and how. wrap: name of the list the request goes into; streams: SSE."""

    url: str
    wrap: str = ""
    streams: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of an ask; seconds since it was meant to go out.

    late_s: how much later it went out. first_byte_s: the answer's head was there. eta_s: what the server
    said on arrival, at queued_s, it would take.
    """

    ask: Ask
    fate: Fate = "failed"
    status: int = 0
    error: str = ""
    late_s: float = 0.0
    latency_s: float = 0.0
    first_byte_s: float | None = None
    first_preview_s: float | None = None
    queued_s: float | None = None
    eta_s: float | None = None

    @property
    def eta_error_s(self) -> float | None:
        """How much later it was finished than the server had said; negative for earlier."""
        if self.fate != "done" or self.eta_s is None or self.queued_s is None:
            return None
        return self.latency_s - (self.queued_s + self.eta_s)


class BadAnswerError(Exception):
    """A server's answer is a success and yet not what was asked for."""


def body_of(ask: Ask) -> dict[str, Any]:
    """The request as every server here takes it; guidance is in every step, as the others have it."""
    return {
        "n": ask.images,
        "seed": ask.seed,
        "num_inference_steps": ask.steps,
        "class_label": ask.label,
        "guidance_scale": GUIDANCE if ask.guided else 1.0,
        "guidance_sigma_min": 0.0,
        "guidance_sigma_max": None,
    }


def check(answer: Any, ask: Ask) -> None:
    """Raise BadAnswerError unless the answer holds every image of the ask."""
    images = answer.get("images") if isinstance(answer, Mapping) else None
    if not isinstance(images, list):
        raise BadAnswerError("no images in the answer")
    if len(images) != ask.images:
        raise BadAnswerError(f"{len(images)} images instead of {ask.images}")
    encoded = [image.get("b64_json") if isinstance(image, Mapping) else image for image in images]
    if not all(isinstance(text, str) and text.startswith(PNG) for text in encoded):
        raise BadAnswerError("not every image is a PNG")


async def fire(client: httpx.AsyncClient, door: Door, ask: Ask, begun: float, patience_s: float) -> Answer:
    """Wait for the ask's time, send it, and see what comes. begun: of the trace, by the loop's clock."""
    meant = begun + ask.created
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(meant - clock())
    answer = Answer(ask, late_s=clock() - meant)
    try:
        async with asyncio.timeout_at(meant + patience_s):
            request = client.build_request("POST", door.url, json=_wrapped(door, ask), headers=_headers(door))
            response = await client.send(request, stream=True)
            try:
                answer = replace(answer, status=response.status_code, first_byte_s=clock() - meant)
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    fate: Fate = "rejected" if response.status_code in REFUSALS else "failed"
                    return replace(answer, fate=fate, error=text[:500], latency_s=clock() - meant)
                if door.streams:
                    answer = await _watch(response, answer, meant)
                else:
                    found = json.loads(await response.aread())
                    check(found[0] if door.wrap else found, ask)
                return replace(answer, fate="done", latency_s=clock() - meant)
            finally:
                await response.aclose()
    except TimeoutError:
        return replace(answer, fate="timeout", latency_s=patience_s)
    except (httpx.HTTPError, BadAnswerError, ValueError, LookupError) as error:
        return replace(answer, error=f"{type(error).__name__}: {error}", latency_s=clock() - meant)


def _wrapped(door: Door, ask: Ask) -> dict[str, Any]:
    return {door.wrap: [body_of(ask)]} if door.wrap else body_of(ask)


def _headers(door: Door) -> dict[str, str]:
    return {"Accept": "text/event-stream" if door.streams else "application/json"}


async def _watch(response: httpx.Response, answer: Answer, meant: float) -> Answer:
    """Read server-sent events to their end. Raises BadAnswerError when that is not a `completed`."""
    clock = asyncio.get_running_loop().time
    name = data = ""
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data = value
        elif not line and name:
            now = clock() - meant
            if name == "queued":
                answer = replace(answer, queued_s=now, eta_s=json.loads(data)["eta_s"])
            elif name == "preview" and answer.first_preview_s is None:
                answer = replace(answer, first_preview_s=now)
            elif name == "completed":
                check(json.loads(data), answer.ask)
                return answer
            elif name == "error":
                raise BadAnswerError(data[:500])
            name = data = ""
    raise BadAnswerError("the stream ended before its last event")


async def drive(door: Door, asks: Iterable[Ask], patience_s: float) -> list[Answer]:
    """Fire all asks, each at its time; their answers in the same order. patience_s: given to each."""
    # No certificates on loopback: reading the system's takes a tenth of a second.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False, verify=False) as client:
        begun = asyncio.get_running_loop().time()
        return list(await asyncio.gather(*(fire(client, door, ask, begun, patience_s) for ask in asks)))


@dataclass(frozen=True)
class Summary:
    """A run in figures; times in seconds.

    Throughput is that of the asks that were done, from the trace's start to the last end. Latencies take in
    those that timed out, at the patience they were given: with any of them, the figures are lower bounds.
    Rejected and failed ones are only counted.
    """

    asks: int
    done: int
    rejected: int
    failed: int
    timeouts: int
    seconds: float
    rows_per_s: float
    images_per_s: float
    latency: Figures | None
    first_byte: Figures | None
    first_preview: Figures | None
    eta_error: Figures | None  # how far off, whichever way
    eta_error_share: Figures | None  # the same, as a share of the time it took
    late_max: float
    errors: list[str]  # the first of each status


def figures(values: Iterable[float | None]) -> Figures | None:
    """Mean and percentiles of the values that are there; None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    percentiles = {f"p{p}": float(np.percentile(known, p)) for p in (50, 95, 99)}
    return {"mean": float(np.mean(known)), **percentiles, "max": max(known)}


def summarise(answers: Sequence[Answer]) -> Summary:
    """Put a run into figures."""
    done = [answer for answer in answers if answer.fate == "done"]
    counts = {
        fate: sum(answer.fate == fate for answer in answers) for fate in ("rejected", "failed", "timeout")
    }
    seconds = max((answer.ask.created + answer.latency_s for answer in answers), default=0.0)
    off = [(abs(error), answer) for answer in done if (error := answer.eta_error_s) is not None]
    shares = [error / (answer.latency_s - (answer.queued_s or 0.0)) for error, answer in off]
    errors = {answer.status: answer.error for answer in reversed(answers) if answer.error}
    return Summary(
        asks=len(answers),
        done=len(done),
        rejected=counts["rejected"],
        failed=counts["failed"],
        timeouts=counts["timeout"],
        seconds=seconds,
        rows_per_s=sum(answer.ask.rows for answer in done) / seconds if done else 0.0,
        images_per_s=sum(answer.ask.images for answer in done) / seconds if done else 0.0,
        latency=figures(answer.latency_s for answer in answers if answer.fate in ("done", "timeout")),
        first_byte=figures(answer.first_byte_s for answer in done),
        first_preview=figures(answer.first_preview_s for answer in answers),
        eta_error=figures(error for error, _ in off),
        eta_error_share=figures(shares),
        late_max=max((answer.late_s for answer in answers), default=0.0),
        errors=[f"{status}: {text}" for status, text in sorted(errors.items())],
    )
