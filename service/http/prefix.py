"""Behind a proxy that serves this application below a path of its own, such as `/ddpm`.

ASGI calls that path the `root_path`, and routes are matched by what follows it. A proxy may strip it from
what it forwards, or leave it there; both work.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "x-forwarded-prefix"
PATH = r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+"
"""Segments of unreserved characters, none of them `.` or `..`: nothing that needs escaping anywhere."""
MAX_LENGTH = 200


class Prefix:
    """Sets the `root_path` of every request: the setting's, else the one in the header `X-Forwarded-Prefix`.

    A header that is no path, or comes more than once, is ignored. Whoever sends it changes nothing but the
    addresses in the answer to that request.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self.app, self.root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http" or not (prefix := self.root_path or forwarded(Headers(scope=scope))):
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        if path == prefix:  # the links of the page there are relative to the folder
            await RedirectResponse(f"{prefix}/")(scope, receive, send)
            return
        if not path.startswith(f"{prefix}/"):
            path = prefix + path
        scope.update(root_path=prefix, path=path)  # not a copy: who counts requests finds their route in it
        await self.app(scope, receive, send)


def forwarded(headers: Headers) -> str:
    """The prefix that a proxy says it has, without a slash at its end; empty where there is none."""
    given = headers.getlist(HEADER)
    if len(given) != 1:
        return ""
    prefix = given[0].rstrip("/")
    return prefix if len(prefix) <= MAX_LENGTH and re.fullmatch(PATH, prefix) else ""


def route_path(scope: Scope) -> str:
    """The path that routes are matched by: what follows the `root_path`."""
    root_path, path = scope.get("root_path", ""), str(scope["path"])
    return path[len(root_path) :] if root_path and path.startswith(f"{root_path}/") else path
