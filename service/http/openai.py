"""OpenAI's wire format: answers, streams and errors of the Images API.

Its types are those of the official clients. There are no tokens here, so `usage` has zeros. Beside its own,
answers have `seed` for each image and, in streams, `index`.
"""

from __future__ import annotations

import base64
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.engine.messages import Cancelled, Event, Failed, Finished, Picture, Preview, Queued
from service.engine.streams import SequencedEvent
from service.errors import CancelledError
from service.http.answers import JSON, encoded
from service.http.problems import Problem, to_problem
from service.tasks.images import MEDIA_TYPES, encode, on_white
from service.tasks.openai import ImageEditRequest, PreparedImages, preview_steps
from service.tasks.sampling import PreparedRequest

STATUS = {422: 400}
"""Ours → OpenAI's, where they differ."""
HOPELESS = frozenset({"deadline_exceeded", "compute_failed", "non_finite", "engine_killed"})
"""Codes of errors that the same request meets again; clients try others twice more."""
QUALITIES = ("low", "medium", "high", "xhigh", "max")
USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
DONE = b"data: [DONE]\n\n"


class OpenAIErrorDetail(BaseModel):
    """What an error says."""

    message: str = Field(description="in words")
    type: str = Field(description="of which kind it is, in OpenAI's terms")
    param: str | None = Field(description="the field that it is about")
    code: str = Field(description="stable; the same as our own routes'")


class OpenAIError(BaseModel):
    """An error in OpenAI's form."""

    error: OpenAIErrorDetail


def openai_error(problem: Problem, headers: Mapping[str, str]) -> Response:
    """The form of errors below `/v1`, with `x-should-retry` where another try cannot help."""
    retry = {"X-Should-Retry": "false"} if problem.code in HOPELESS else {}
    status = STATUS.get(problem.status, problem.status)
    return JSONResponse(_error(problem), status, {**retry, **headers})


def _error(problem: Problem) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if problem.status >= 500 else kinds.get(problem.status, "invalid_request_error")
    field = problem.errors[0]["field"] if problem.errors else None
    detail = OpenAIErrorDetail(message=problem.detail, type=kind, param=field or None, code=problem.code)
    return OpenAIError(error=detail).model_dump()


class ImagesPresenter:
    """All images of a finished job as one JSON object."""

    def __init__(self, prepared: PreparedImages, model: str) -> None:
        self.prepared, self.images = prepared, _Images(prepared, model)

    async def respond(self, result: Finished) -> Response:
        """`application/json`, in the form of OpenAI's `ImagesResponse`."""
        job = self.prepared.job

        def body() -> bytes:
            return msgspec.json.encode(self._body(result))

        content = await encoded(body, result.pictures, job.output_format, job.scale)
        return Response(content, media_type=JSON, headers={"X-Job-ID": result.job_id})

    def _body(self, result: Finished) -> dict[str, Any]:
        described = self.images.described
        if described["quality"] == "auto":
            described = {name: value for name, value in described.items() if name != "quality"}
        return {
            "created": int(time.time()),
            "data": [self._datum(picture) for picture in result.pictures],
            **described,
            "usage": USAGE,
        }

    def _datum(self, picture: Picture) -> dict[str, Any]:
        text = self.images.final(picture)
        media_type = MEDIA_TYPES[self.prepared.job.output_format]
        as_url = self.prepared.asked.response_format == "url"
        return {
            **({"url": f"data:{media_type};base64,{text}"} if as_url else {"b64_json": text}),
            "revised_prompt": self.prepared.revised_prompt,
            "seed": picture.seed,
        }


class ImagesEventPresenter:
    """A job's events as OpenAI's: partial images, then each completed one, then `[DONE]`."""

    def __init__(self, prepared: PreparedImages, model: str) -> None:
        self.images, self.revised_prompt = _Images(prepared, model), prepared.revised_prompt
        self.prepared: PreparedRequest = prepared.job
        self._name = "image_edit" if isinstance(prepared.asked, ImageEditRequest) else "image_generation"
        self._shown = preview_steps(prepared.job.spec.stages[-1].steps, prepared.asked.partial_images)
        self._partials: Counter[int] = Counter()  # sent so far, by image

    async def chunk(self, item: SequencedEvent) -> bytes:
        """What is sent for one event of the job, which may be nothing.

        Its id, `<job>:<number>`, comes with the last of it: a client that has lost some of it gets all again.
        """
        event, job = item.event, self.prepared
        pictures = event.pictures if isinstance(event, Preview | Finished) else ()

        def chunk() -> bytes:
            events = list(map(_sse, self._events(event)))
            if events:
                events[-1] += f"id: {job.spec.id}:{item.number}\n".encode()
            ending = DONE if isinstance(event, Finished) else b""
            return b"".join([each + b"\n" for each in events]) + ending

        return await encoded(chunk, pictures, job.output_format, job.scale)

    def _events(self, event: Event) -> list[dict[str, Any]]:
        match event:
            case Queued():
                return []
            case Preview():
                return list(map(self._partial, event.pictures)) if event.step in self._shown else []
            case Finished():
                return list(map(self._completed, event.pictures))
            case Failed(_, error):
                return [_error(to_problem(error))]
            case Cancelled():
                return [_error(to_problem(CancelledError("The job was cancelled.")))]

    def _partial(self, picture: Picture) -> dict[str, Any]:
        number = self._partials[picture.index]
        self._partials[picture.index] += 1
        own = {"b64_json": self.images.partial(picture), "partial_image_index": number}
        return self._event("partial_image", picture, own)

    def _completed(self, picture: Picture) -> dict[str, Any]:
        own = {
            "b64_json": self.images.final(picture),
            "usage": USAGE,
            "revised_prompt": self.revised_prompt,
            "seed": picture.seed,
        }
        return self._event("completed", picture, own)

    def _event(self, kind: str, picture: Picture, own: Mapping[str, Any]) -> dict[str, Any]:
        shared = {"created_at": int(time.time()), **self.images.described, "index": picture.index}
        return {"type": f"{self._name}.{kind}", **shared, **own}


class _Images:
    """Pictures as a request has asked for them, and what is said of all of them."""

    def __init__(self, prepared: PreparedImages, model: str) -> None:
        self._prepared, self._model = prepared, model

    @property
    def described(self) -> dict[str, Any]:
        prepared = self._prepared
        quality = prepared.asked.quality
        return {
            "background": "transparent" if prepared.transparent else "opaque",
            "output_format": prepared.job.output_format,
            "quality": quality if quality in QUALITIES else "auto",
            "size": prepared.size,
        }

    def partial(self, picture: Picture) -> str:
        """An x₀ prediction in base64."""
        return self._encoded(picture, None)

    def final(self, picture: Picture) -> str:
        """An image in base64, with what makes it alone inside."""
        job = self._prepared.job
        own = {"n": 1, **job.extra(picture.index), "seed": picture.seed, "model": self._model}
        return self._encoded(picture, {**job.parameters, **own})

    def _encoded(self, picture: Picture, parameters: dict[str, Any] | None) -> str:
        job, asked = self._prepared.job, self._prepared.asked
        pixels = picture.pixels
        if pixels.shape[-1] == 4 and not self._prepared.transparent:
            pixels = on_white(pixels)
        data = encode(
            pixels,
            job.output_format,
            parameters,
            job.scale,
            quality=asked.output_compression,
            passing=parameters is None,
        )
        return base64.b64encode(data).decode()


def _sse(data: Mapping[str, Any]) -> bytes:
    """One event, but for the empty line that ends it. JSON has no line breaks, so it is one `data` field."""
    return b"event: %b\ndata: %b\n" % (data.get("type", "error").encode(), msgspec.json.encode(data))
