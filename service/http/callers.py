"""Who leads a browser here: by which name it calls the service, and which site's page asks.

A page anywhere on the web can have its visitors' browsers send requests to a service that only they can
reach. It can even read the answers where its own name is made to lead to the service (DNS rebinding).
Programs that are no browsers are not kept out by either: that is what keys are for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from ipaddress import ip_address

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import CrossSiteError, ForbiddenError, HostError
from service.http.prefix import route_path
from service.http.problems import on_service_error

SAFE = ("GET", "HEAD", "OPTIONS")
LOCAL = "localhost"


class Hosts:
    """Which names of the service are allowed. Any address is in `local`: only names can be rebound."""

    def __init__(self, names: Collection[str], *, local: bool = False) -> None:
        self._names, self._local = frozenset(names), local
        self._endings = tuple(name[1:] for name in names if name.startswith("*."))

    def __contains__(self, host: object) -> bool:
        """Whether a Host header is allowed; its port does not matter."""
        name = str(host).lower()
        if name.startswith("["):
            name = name.partition("]")[0] + "]"
        else:
            name = name.partition(":")[0].removesuffix(".")
        if "*" in self._names or name in self._names or (self._endings and name.endswith(self._endings)):
            return True
        return self._local and (name == LOCAL or name.endswith(f".{LOCAL}") or is_address(name))


def is_address(host: str) -> bool:
    """Whether it is no name but an address; an IPv6 one in brackets."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def hosts_of(allowed: Collection[str], bound_to: str, *, keys: bool) -> Hosts | None:
    """What is allowed by the settings; None for anything.

    Where no names are set, a service without keys that only its own machine can reach has local ones.
    """
    if allowed:
        return None if "*" in allowed else Hosts(allowed)
    local = bound_to.lower() == LOCAL or (is_address(bound_to) and ip_address(bound_to).is_loopback)
    return Hosts((bound_to.lower(),), local=True) if local and not keys else None


class AllowHosts:
    """Refuses requests to a name that is not among `hosts`, but for paths that are open to any."""

    def __init__(self, app: ASGIApp, hosts: Hosts, is_exempt: Callable[[Scope], bool]) -> None:
        self.app, self.hosts, self.is_exempt = app, hosts, is_exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer it by 403."""
        if scope["type"] == "http" and not self.is_exempt(scope):
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if any(host not in self.hosts for host in given):
                error = HostError("The service is not called by this name; DDPM_ALLOWED_HOSTS adds names.")
                await _refuse(error, scope, receive, send)
                return
        await self.app(scope, receive, send)


class AllowSites:
    """Refuses what starts or changes something where a browser says that another site's page asks.

    It says so by fetch metadata (`Sec-Fetch-Site`), over HTTPS and to the machine it runs on. Pages of
    `origins` may ask, and a link may be followed. works(path): whether a GET of a path does work.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], works: Callable[[str], bool]) -> None:
        self.app, self.origins, self.works = app, frozenset(origins), works

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer it by 403."""
        if scope["type"] == "http" and "*" not in self.origins and not self._may_ask(scope):
            error = CrossSiteError("A page of another site may not ask this; DDPM_CORS_ORIGINS adds origins.")
            await _refuse(error, scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _may_ask(self, scope: Scope) -> bool:
        if scope["method"] in SAFE and not (scope["method"] == "GET" and self.works(route_path(scope))):
            return True
        headers = Headers(scope=scope)
        if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
            return True
        if scope["method"] == "GET" and headers.get("sec-fetch-dest") == "document":
            return True
        # A picture is asked for without an Origin.
        page = headers.get("origin") or _origin(headers.get("referer", ""))
        return page in self.origins


def _origin(url: str) -> str:
    """The origin of a page; empty where there is none."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if rest else ""


async def _refuse(error: ForbiddenError, scope: Scope, receive: Receive, send: Send) -> None:
    await (await on_service_error(Request(scope), error))(scope, receive, send)
