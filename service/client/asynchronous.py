"""The client for programs with an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeAlias, Unpack

import httpx
import stamina
from httpx_sse import EventSource, ServerSentEvent

from service.client.calls import (
    Call,
    Following,
    client_options,
    content,
    job_call,
    post,
)
from service.client.errors import from_response, from_transport, when_to_try_again
from service.client.fields import (
    EditFields,
    GenerateFields,
    InterpolateFields,
    ScoreFields,
    Upload,
)
from service.client.results import (
    Event,
    Job,
    Result,
    ScoreResult,
    outcome,
    pause_s,
    to_job,
    to_result,
    to_scores,
)

Connected: TypeAlias = tuple[httpx.Response, ServerSentEvent | None, AsyncGenerator[ServerSentEvent, None]]
"""An answer, its next event, and those after it."""


class AsyncClient:
    """Calls a service without holding up the event loop. All else is as with `Client`."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        attempts: int = 5,
        retry_for_s: float = 120.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """The arguments are those of `Client`."""
        self._http = httpx.AsyncClient(**client_options(base_url, api_key), transport=transport)
        self._retries: dict[str, Any] = {"attempts": attempts, "timeout": retry_for_s}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(self, **fields: Unpack[GenerateFields]) -> Result:
        """Images from noise."""
        return to_result(await self._json(post("/generate", fields)))

    def stream(self, **fields: Unpack[GenerateFields]) -> AsyncIterator[Event]:
        """The same, event by event: Queued, Preview …, Completed.

        A connection that is lost on the way is replaced, and the stream goes on behind the last event.
        Raises the error of a job that fails.
        """
        return self._follow(Following(post("/generate", fields)))

    async def edit(self, image: Upload, **fields: Unpack[EditFields]) -> Result:
        """Images from a picture, all of it or where `mask` is white."""
        return to_result(await self._json(post("/edit", {"image": image, **fields})))

    async def interpolate(self, **fields: Unpack[InterpolateFields]) -> Result:
        """Images between two `images` or two `seeds`."""
        return to_result(await self._json(post("/interpolate", fields)))

    async def score(self, images: Sequence[Upload], **fields: Unpack[ScoreFields]) -> ScoreResult:
        """The likelihood and the typicality of pictures."""
        return to_scores(await self._json(post("/score", {"images": list(images), **fields})))

    async def info(self) -> dict[str, Any]:
        """What can be requested: model, samplers, defaults, limits."""
        return await self._json(Call("GET", "/info"))

    async def submit(self, **fields: Unpack[GenerateFields]) -> Job:
        """Start a job without waiting for it: see `wait`."""
        return to_job(await self._json(post("/generate", fields, {"Prefer": "respond-async"})))

    async def job(self, job_id: str) -> Job:
        """The state of a job. Raises NotFound for one that is not known, or no longer."""
        return to_job(await self._json(job_call("GET", job_id)))

    async def wait(self, job_id: str) -> Result | ScoreResult:
        """The result of a job that was submitted, once there is one. Raises the error of a failed job."""
        job = await self.job(job_id)
        while not job.done:
            await asyncio.sleep(pause_s(job))
            job = await self.job(job_id)
        return outcome(job)

    async def cancel(self, job_id: str) -> None:
        """Cancel a job, or forget the result of a finished one. Raises NotFound."""
        await self._answer(job_call("DELETE", job_id))

    async def _json(self, call: Call) -> dict[str, Any]:
        return content(await self._answer(call))

    async def _answer(self, call: Call) -> httpx.Response:
        async for attempt in stamina.retry_context(when_to_try_again, **self._retries):
            with attempt:
                response = await self._open(call)
                try:
                    await response.aread()
                except httpx.TransportError as error:
                    raise from_transport(error, response.url) from error
                finally:
                    await response.aclose()
        return response

    async def _open(self, call: Call) -> httpx.Response:
        """The beginning of an answer. Raises the error of one that is refused."""
        request = call.request(self._http)
        try:
            response = await self._http.send(request, stream=True)
            if response.is_error:
                await response.aread()
        except httpx.TransportError as error:
            raise from_transport(error, request.url) from error
        if response.is_error:
            raise from_response(response)
        return response

    async def _follow(self, following: Following) -> AsyncIterator[Event]:
        while not following.over:
            response, found, events = await self._connect(following)
            try:
                while found is not None:
                    if (event := following.event(found)) is not None:
                        yield event
                    found = await anext(events, None)
            except httpx.TransportError:
                pass  # the next connection continues behind the last event
            finally:
                await events.aclose()
                await response.aclose()

    async def _connect(self, following: Following) -> Connected:
        """A connection on which an event has come. Raises ConnectionFailed when there is none."""
        call = following.call()
        async for attempt in stamina.retry_context(when_to_try_again, **self._retries):
            with attempt:
                response, found = await self._open(call), None
                events = EventSource(response).aiter_sse()
                try:
                    following.check(response)
                    found = await anext(events, None)
                    if found is None:
                        raise following.lost("it ended without an event")
                except httpx.TransportError as error:
                    raise following.lost(error) from error
                finally:
                    if found is None:
                        await response.aclose()
        return response, found, events
