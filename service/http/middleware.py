"""Middleware: API keys, the limit on bodies, HEAD, and what is counted of every request.

Plain ASGI: a middleware that wraps the response would hide disconnects from the routes.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from base64 import b64decode
from collections.abc import Callable, MutableMapping, Sequence
from inspect import iscoroutinefunction, signature
from ipaddress import IPv6Network
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from opentelemetry import trace
from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import UnauthorizedError
from service.http.intake import Intake
from service.http.prefix import route_path
from service.http.problems import on_service_error
from service.http.state import AppState
from service.telemetry import Telemetry, owner, request_id, submitted_job, trace_ids

access_logger = logging.getLogger("service.access")

MAX_BODY_BYTES = 1 << 20
MAX_UPLOAD_BYTES = 8 << 20
"""Of a body that may carry pictures: a photograph or two, in base64."""
BASIC = "/sdapi/"
"""Below it a key may come as the password of HTTP basic credentials."""
PROBES = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics")
"""What asks every few seconds, and is neither logged nor traced."""
NOSNIFF = (b"x-content-type-options", b"nosniff")
"""No browser takes an answer for anything but what its Content-Type says."""


class LimitedRoute(APIRoute):
    """A route that takes the request and returns the response, and whose body is limited.

    FastAPI lists it, and injects nothing, so its part in every request, a tenth of one's cost, is left out.
    Its own limit on bodies would answer in plain text. Raises TypeError for an endpoint of other parameters.
    """

    max_body_bytes: ClassVar[int] = MAX_BODY_BYTES

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        if not iscoroutinefunction(endpoint) or [*signature(endpoint).parameters] != ["request"]:
            raise TypeError("an endpoint of this route is a coroutine function of `request`")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises an HTTPException for another method and for too large a body, and QueueFullError where the
        bodies in flight are too large together.
        """
        allowed = self.methods or ()
        if scope["method"] not in allowed:
            raise HTTPException(405, headers={"Allow": ", ".join(allowed)})
        state: AppState = scope["app"].state.ddpm
        intake = scope["ddpm.intake"] = Intake(state.bodies)
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            length = len(message.get("body", b""))
            size += length
            if size > self.max_body_bytes:
                raise HTTPException(413, f"A body has at most {self.max_body_bytes} bytes.")
            intake.take(length)
            return message

        try:
            response: Response = await self.endpoint(Request(scope, limited))
        finally:
            intake.release()
        await response(scope, limited, send)


class UploadRoute(LimitedRoute):
    """A route whose body may carry pictures."""

    max_body_bytes = MAX_UPLOAD_BYTES


class Authorise:
    """Deny by default: where keys are set, every path that is not open needs one as a bearer token.

    Below BASIC it may be the password of any user instead: the clients there cannot send a bearer token.
    A middleware, so that nothing of a request is read first, not even its body.

    It also says whom a request is counted for (`owner`): the number of its key, from 1, as the setting lists
    them; where there are no keys, the address that it comes from.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr], is_open: Callable[[str], bool]) -> None:
        self.app, self.is_open = app, is_open
        # As the environment has them, which need not be UTF-8.
        self.keys = [key.get_secret_value().encode(errors="surrogateescape") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer it by 401."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = self._name(scope)
        owner.set(name)
        if name or not self.keys or self.is_open(route_path(scope)):
            await self.app(scope, receive, send)
            return
        how = (
            "the password of HTTP basic credentials"
            if self._takes_basic(scope)
            else "Authorization: Bearer …"
        )
        error = UnauthorizedError(f"This route needs a key: {how}")
        await (await on_service_error(Request(scope), error))(scope, receive, send)

    def _takes_basic(self, scope: Scope) -> bool:
        return route_path(scope).startswith(BASIC)

    def _name(self, scope: Scope) -> str:
        """Whom a request is counted for; empty where it needs a key and has none."""
        if not self.keys:
            return address_of(scope)
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = given.encode("latin-1")  # as it came
        if scheme.lower() == "basic" and self._takes_basic(scope):
            scheme, sent = "bearer", _password(given)
        # Every key is compared, so that the time taken does not show which one was close.
        matches = [hmac.compare_digest(sent, key) for key in self.keys]
        return str(matches.index(True) + 1) if scheme.lower() == "bearer" and any(matches) else ""


def key_names(keys: Sequence[SecretStr]) -> list[str]:
    """What requests with these keys are counted for."""
    return [str(number) for number, _ in enumerate(keys, 1)]


def address_of(scope: Scope) -> str:
    """Where a request comes from: an IPv4 address, or the network of an IPv6 one, which is one client's.

    Behind a proxy that is the proxy, and all clients count as one: anybody may write an X-Forwarded-For.
    """
    host: str = (scope.get("client") or ("",))[0]
    if ":" not in host:
        return host
    try:
        return str(IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host


def _password(credentials: str) -> bytes:
    """The password of HTTP basic credentials (RFC 7617); empty where they are none."""
    try:
        return b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class Head:
    """Answers HEAD as the route would answer GET, without the body; a router knows only what it was given.

    Not where a GET does work of its own: `unless(path)` leaves the method to those routes.
    """

    def __init__(self, app: ASGIApp, unless: Callable[[str], bool]) -> None:
        self.app, self.unless = app, unless

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http" or scope["method"] != "HEAD" or self.unless(route_path(scope)):
            await self.app(scope, receive, send)
            return
        ended = False

        async def headers_only(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                await send(message)
            elif not ended:
                ended = True  # a stream's client is gone with this
                await send({"type": "http.response.body"})

        # A copy: the server looks into its own for whether a body is due.
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, headers_only)
        finally:
            scope.update((name, value) for name, value in inner.items() if name != "method")


class Observe:
    """Counts, times and logs every request by route, and passes `X-Request-ID` through or makes one up.

    Every answer gets the headers that hold for all of them. access_log: whether a line is logged for each,
    but for probes.
    """

    def __init__(self, app: ASGIApp, telemetry: Telemetry, *, access_log: bool = False) -> None:
        self.app, self.telemetry, self.access_log = app, telemetry, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        # Only what is safe to log and to send back; anything else is replaced.
        safe = 0 < len(given) <= 128 and all(33 <= byte <= 126 for byte in given)
        identity = given if safe else secrets.token_hex(8).encode()
        _set_context(identity.decode())
        status = 499  # what proxies log when the client has gone before the answer
        streams = False

        async def observed(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.get("headers", ())
                if any(value.startswith(b"text/event-stream") for _, value in headers):
                    streams = True
                    self.telemetry.streams.inc()
                message["headers"] = [*headers, (b"x-request-id", identity), NOSNIFF]
            await send(message)

        begun = time.perf_counter()
        try:
            await self.app(scope, receive, observed)
        except Exception:
            if status == 499:
                status = 500  # the answer to a bug is given further out
            raise
        finally:
            # The route's template, not the path: paths are an open set.
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.perf_counter() - begun
            self.telemetry.requests.labels(route, f"{status // 100}xx").inc()
            self.telemetry.request_duration.labels(route).observe(seconds)
            if streams:
                self.telemetry.streams.dec()
            if self.access_log and not is_probe(scope):
                _log(scope["method"], route, status, seconds)


def is_probe(scope: MutableMapping[str, Any]) -> bool:
    """Whether a request is for health or metrics, behind whatever prefix."""
    path: str = scope.get("path", "")  # a lifespan has none
    return path.endswith(PROBES)


def _set_context(identity: str) -> None:
    """What log lines and jobs say of this request. The server runs each in a context of its own."""
    request_id.set(identity)
    submitted_job.set(None)  # a copy of the context of the request before it, on a connection that stays open
    span = trace.get_current_span().get_span_context()
    ids = trace.format_trace_id(span.trace_id), trace.format_span_id(span.span_id)
    trace_ids.set(ids if span.is_valid else None)


def _log(method: str, route: str, status: int, seconds: float) -> None:
    """One line of the access log, with its parts as fields where the log is JSON."""
    job = submitted_job.get()
    fields = {"method": method, "route": route, "status": status, "duration_s": round(seconds, 6)}
    text = "%s %s %d in %.3f s, request %s"
    values: list[object] = [method, route, status, seconds, request_id.get()]
    if job is not None:
        text, values, fields = f"{text}, job %s", [*values, job], {**fields, "job_id": job}
    access_logger.info(text, *values, extra=fields)
