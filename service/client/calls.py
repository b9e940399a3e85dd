"""From arguments to an HTTP request, and a stream of events that survives a lost connection.

Pure: both clients share it, and do the input and output themselves.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import ServerSentEvent

from service.client.errors import ConnectionFailed, from_response
from service.client.fields import PICTURES
from service.client.results import Event, to_event

DEFAULT_URL = "http://127.0.0.1:8000"
EVENTS = "text/event-stream"
CONNECT_S = 10.0
"""Longest time for a connection, and between two bytes that are sent."""
LONGEST_ANSWER_S = 330.0
"""Without a byte: a little more than the service's own default deadline."""
LONGEST_SILENCE_S = 45.0
"""On a stream, where the service sends a comment every 15 seconds."""
SESSION = "X-Session-ID"
"""By which the requests of a stream reach the same one of several replicas."""


@dataclass(frozen=True)
class Call:
    """A request, not yet sent. silence_s: longest time without a byte of the answer."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    silence_s: float = LONGEST_ANSWER_S

    def request(self, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """As httpx sends it."""
        headers = {"Accept": "application/json", **self.headers}
        timeout = httpx.Timeout(CONNECT_S, read=self.silence_s)
        return client.build_request(self.method, self.path, json=self.body, headers=headers, timeout=timeout)


def post(path: str, fields: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Call:
    """A request with these fields, its pictures as base64."""
    body = {name: _pictures(value) if name in PICTURES else value for name, value in fields.items()}
    return Call("POST", path, body, headers or {})


def job_call(method: str, job_id: str) -> Call:
    """A request about a job."""
    return Call(method, f"/jobs/{quote(job_id, safe='')}")


def content(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer that has been read. Raises the ServiceError of a failure."""
    if response.is_success:
        try:
            found = response.json()
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
    raise from_response(response)


def client_options(base_url: str | None, api_key: str | None) -> dict[str, Any]:
    """What both clients tell httpx: where the service is, and the key, if there is one.

    Raises ConnectionFailed for an address that is none.
    """
    key = api_key if api_key is not None else os.environ.get("DDPM_API_KEY", "")
    url = base_url or os.environ.get("DDPM_URL") or DEFAULT_URL
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConnectionFailed(f"{url}: {error}", again=False) from error
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
    }


class Following:
    """A stream as far as it has been read."""

    def __init__(self, first: Call) -> None:
        self._first = first
        self._labels = (first.body or {}).get("class_label")
        self._last_id = ""
        self._session = uuid4().hex
        self.over = False

    def call(self) -> Call:
        """The request that starts the stream, or that continues it."""
        if not self._last_id:
            first = self._first
            headers = {**first.headers, "Accept": EVENTS, SESSION: self._session}
            return Call(first.method, first.path, first.body, headers, LONGEST_SILENCE_S)
        headers = {"Accept": EVENTS, "Last-Event-ID": self._last_id, SESSION: self._session}
        return Call("GET", "/stream", None, headers, LONGEST_SILENCE_S)

    def check(self, response: httpx.Response) -> None:
        """Raises ConnectionFailed for a stream that the service no longer has."""
        if response.status_code == 204:
            raise ConnectionFailed("The stream was interrupted for too long: its job is gone.", again=False)

    def lost(self, reason: object) -> ConnectionFailed:
        """The error of a connection that ended before an event came.

        A stream that had begun is continued. One that had not may have started a job: it is not tried again.
        """
        return ConnectionFailed(f"The stream broke off: {reason}", again=bool(self._last_id))

    def event(self, event: ServerSentEvent) -> Event | None:
        """The next event; None for one of a name that is not known. Raises the error of an `error` event."""
        self._last_id = event.id or self._last_id
        self.over = event.event in ("completed", "error")
        return to_event(event.event, json.loads(event.data), self._labels)


def _pictures(value: Any) -> Any:
    """Pictures as base64; a list of them where there are several."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_pictures(each) for each in value]
    return base64.b64encode(_file(value)).decode()


def _file(picture: Any) -> bytes:
    """The bytes of a file that holds a picture. Raises OSError for a file that cannot be read."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | PathLike):
        return Path(picture).read_bytes()
    import numpy as np
    import PIL.Image

    buffer = BytesIO()
    if isinstance(picture, PIL.Image.Image):
        picture.save(buffer, "PNG")
    else:
        np.save(buffer, np.asarray(picture), allow_pickle=False)
    return buffer.getvalue()
