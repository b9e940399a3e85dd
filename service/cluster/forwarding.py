"""A request on its way to a replica, and what of its answer has been passed on. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Message

from service.http.event_ids import is_last, is_signed

SENT = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)
"""Of a scope; the rest belongs to the process that it is in."""
EVENTS = b"text/event-stream"
SESSION = "x-session-id"


class NotContinuedError(Exception):
    """The next replica has not taken up a stream."""


class Forwarding:
    """A request, to be asked of one replica after another until its answer is whole.

    scope, body: what to ask of the next one. session: that the request names, or an empty text.
    """

    def __init__(self, scope: Mapping[str, Any], body: bytes) -> None:
        self.scope = {name: scope[name] for name in SENT if name in scope}
        self.body = body
        self.session = Headers(scope=self.scope).get(SESSION, "")
        self._begun = self._continued = self._events = False
        self._last_id = ""

    def passed(self, messages: Iterable[Message]) -> list[Message]:
        """What of an answer's messages is to be sent on. Raises NotContinuedError."""
        sent = []
        for message in messages:
            if message["type"] == "http.response.start":
                if self._continued and message["status"] != 200:
                    raise NotContinuedError(f"status {message['status']}")
                if self._begun:
                    continue
                self._begun = True
                kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
                self._events = bool(kinds) and kinds[0].startswith(EVENTS)
            elif self._events:
                self._see(message.get("body", b""))
            sent.append(message)
        return sent

    def _see(self, body: bytes) -> None:
        _, found, rest = (b"\n" + body).rpartition(b"\nid: ")
        if found:
            self._last_id = rest.partition(b"\n")[0].decode()

    @property
    def over(self) -> bool:
        """Whether nothing is missing but the end of the connection."""
        return is_last(self._last_id)

    def again(self) -> bool:
        """Whether another replica can be asked: for all of it, or for what is missing of a stream."""
        if not self._begun:
            return True
        if not is_signed(self._last_id):
            return False
        kept = [(b"last-event-id", self._last_id.encode())]
        for name, value in self.scope["headers"]:
            if name.lower() not in (
                b"last-event-id",
                b"content-length",
                b"content-type",
                b"transfer-encoding",
            ):
                kept.append((name, value))
        root = self.scope.get("root_path", "")
        path = f"{root}/stream"
        self.scope.update(method="GET", path=path, raw_path=path.encode(), query_string=b"", headers=kept)
        self.body, self._continued = b"", True
        return True
