"""An open-loop load: every request of a trace is sent at its time, whatever the state of those before it.

Latency counts from the time at which a request was *due*, so neither a slow server nor a slow generator can
hide a wait by holding back the next request (coordinated omission). Every request has a connection of its
own, like those of unrelated clients.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bench import http
from bench.workload import Request

GUIDANCE = 2.0
PNG = "iVBORw0KGgo"  # how every PNG begins, in base64
REFUSALS = (429, 503)

Result = Literal["done", "rejected", "failed", "timeout"]
Figures = dict[str, float]


@dataclass(frozen=True)
class Endpoint:
    """Where requests go and how. wrap: name of the list that a request goes into; streams: SSE."""

    url: str
    wrap: str = ""
    streams: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of a request; seconds since it was due.

    late_s: how much later it was sent. first_byte_s: the answer's head arrived. eta_s: the server's estimate
    on arrival, at queued_s.
    """

    request: Request
    result: Result = "failed"
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
        """How much later it was finished than estimated; negative for earlier."""
        if self.result != "done" or self.eta_s is None or self.queued_s is None:
            return None
        return self.latency_s - (self.queued_s + self.eta_s)


class BadAnswerError(Exception):
    """A server's answer is a success and yet not what was requested."""


def body_of(request: Request) -> dict[str, Any]:
    """The request as every server here takes it; guidance is in every step, as the others have it."""
    return {
        "n": request.images,
        "seed": request.seed,
        "num_inference_steps": request.steps,
        "class_label": request.label,
        "guidance_scale": GUIDANCE if request.guided else 1.0,
        "guidance_sigma_min": 0.0,
        "guidance_sigma_max": None,
    }


def check(answer: Any, request: Request) -> None:
    """Raise BadAnswerError unless the answer holds every image of the request."""
    images = answer.get("images") if isinstance(answer, Mapping) else None
    if not isinstance(images, list):
        raise BadAnswerError("no images in the answer")
    if len(images) != request.images:
        raise BadAnswerError(f"{len(images)} images instead of {request.images}")
    encoded = [image.get("b64_json") if isinstance(image, Mapping) else image for image in images]
    if not all(isinstance(text, str) and text.startswith(PNG) for text in encoded):
        raise BadAnswerError("not every image is a PNG")


async def send(endpoint: Endpoint, request: Request, begun: float, patience_s: float) -> Answer:
    """Wait until the request is due, send it, read the answer. begun: of the trace, by the loop's clock."""
    due = begun + request.created
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(due - clock())
    reading = _Reading(Answer(request, late_s=clock() - due), due, endpoint.streams)
    accept = "text/event-stream" if endpoint.streams else "application/json"
    try:
        async with asyncio.timeout_at(due + patience_s):
            body = _wrapped(endpoint, request)
            await http.request(endpoint.url, accept, body, reading.on_head, reading.on_piece)
        found = reading.answer
        if found.status != 200:
            text = reading.content.decode(errors="replace")
            result: Result = "rejected" if found.status in REFUSALS else "failed"
            return replace(found, result=result, error=text[:500], latency_s=clock() - due)
        if not endpoint.streams:
            whole = json.loads(reading.content)
            check(whole[0] if endpoint.wrap else whole, request)
        elif not reading.completed:
            raise BadAnswerError("the stream ended before its last event")
        return replace(found, result="done", latency_s=clock() - due)
    except TimeoutError:
        return replace(reading.answer, result="timeout", latency_s=patience_s)
    except (OSError, BadAnswerError, ValueError, LookupError) as error:
        return replace(reading.answer, error=f"{type(error).__name__}: {error}", latency_s=clock() - due)


def _wrapped(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    return {endpoint.wrap: [body_of(request)]} if endpoint.wrap else body_of(request)


class _Reading:
    """Reads an answer as it comes, and notes when. completed: a stream's last event has come."""

    def __init__(self, answer: Answer, due: float, streams: bool) -> None:
        self.answer, self.content, self.completed = answer, bytearray(), False
        self._due, self._streams = due, streams
        self._clock = asyncio.get_running_loop().time

    def on_head(self, status: int) -> None:
        """The head has come."""
        self.answer = replace(self.answer, status=status, first_byte_s=self._now())

    def on_piece(self, piece: bytes) -> None:
        """Something of the body has come. Raises BadAnswerError for an `error` event."""
        self.content += piece
        if self._streams and self.answer.status == 200 and b"\n\n" in self.content:
            *events, self.content = self.content.split(b"\n\n")
            for event in events:
                lines = (line.partition(b": ") for line in event.splitlines())
                self._take({bytes(name): value for name, _, value in lines})

    def _take(self, fields: Mapping[bytes, bytearray]) -> None:
        data = fields.get(b"data", bytearray())
        match bytes(fields.get(b"event", b"")):
            case b"queued":
                eta_s = json.loads(data)["eta_s"]
                self.answer = replace(self.answer, queued_s=self._now(), eta_s=eta_s)
            case b"preview" if self.answer.first_preview_s is None:
                self.answer = replace(self.answer, first_preview_s=self._now())
            case b"completed":
                check(json.loads(data), self.answer.request)
                self.completed = True
            case b"error":
                raise BadAnswerError(data.decode(errors="replace")[:500])

    def _now(self) -> float:
        return self._clock() - self._due


async def drive(endpoint: Endpoint, requests: Iterable[Request], patience_s: float) -> list[Answer]:
    """Send each request when it is due; their answers in the same order. patience_s: given to each."""
    begun = asyncio.get_running_loop().time()
    sent = (send(endpoint, request, begun, patience_s) for request in requests)
    return list(await asyncio.gather(*sent))


@dataclass(frozen=True)
class Summary:
    """A run in figures; times in seconds.

    Throughput is that of the completed requests, from the trace's start to the last end. Latencies include
    those that timed out, at the time the client waited: with any of them, the figures are lower bounds.
    Rejected and failed ones are only counted.
    """

    requests: int
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
    eta_error: Figures | None  # absolute error
    eta_error_share: Figures | None  # the same, as a share of the actual time
    late_max: float
    errors: list[str]  # the first of each status


def figures(values: Iterable[float | None]) -> Figures | None:
    """Mean and percentiles of the known values; None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    percentiles = {f"p{p}": float(np.percentile(known, p)) for p in (50, 95, 99)}
    return {"mean": float(np.mean(known)), **percentiles, "max": max(known)}


def summarise(answers: Sequence[Answer]) -> Summary:
    """Put a run into figures."""
    done = [answer for answer in answers if answer.result == "done"]
    counts = {
        result: sum(answer.result == result for answer in answers)
        for result in ("rejected", "failed", "timeout")
    }
    seconds = max((answer.request.created + answer.latency_s for answer in answers), default=0.0)
    off = [(abs(error), answer) for answer in done if (error := answer.eta_error_s) is not None]
    shares = [error / (answer.latency_s - (answer.queued_s or 0.0)) for error, answer in off]
    errors = {answer.status: answer.error for answer in reversed(answers) if answer.error}
    return Summary(
        requests=len(answers),
        done=len(done),
        rejected=counts["rejected"],
        failed=counts["failed"],
        timeouts=counts["timeout"],
        seconds=seconds,
        rows_per_s=sum(answer.request.evaluations for answer in done) / seconds if done else 0.0,
        images_per_s=sum(answer.request.images for answer in done) / seconds if done else 0.0,
        latency=figures(answer.latency_s for answer in answers if answer.result in ("done", "timeout")),
        first_byte=figures(answer.first_byte_s for answer in done),
        first_preview=figures(answer.first_preview_s for answer in answers),
        eta_error=figures(error for error, _ in off),
        eta_error_share=figures(shares),
        late_max=max((answer.late_s for answer in answers), default=0.0),
        errors=[f"{status}: {text}" for status, text in sorted(errors.items())],
    )
