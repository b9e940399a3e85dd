"""The service below a path of a proxy, which strips it or not."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from urllib.parse import urljoin

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from service.http.prefix import Prefix, forwarded, route_path
from service.settings import Settings
from tests.service.live import Serve
from tests.service.proxy import Proxy


@pytest.mark.parametrize("given", ["/ddpm", "/a/b-c/d_e~1.0", "/ddpm/"])
def test_a_path_is_taken(given: str) -> None:
    assert forwarded(Headers({"X-Forwarded-Prefix": given})) == given.rstrip("/")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "/",
        "ddpm",
        "//elsewhere.example",
        "/a//b",
        "/a/../b",
        "/..",
        "/.",
        "/a b",
        "/a?b",
        "/a#b",
        "/ä",
        "/a,/b",
        "https://elsewhere.example/",
        "/\\elsewhere.example",
        "/" + 300 * "a",
    ],
)
def test_what_is_no_path_is_ignored(given: str) -> None:
    assert forwarded(Headers(raw=[(b"x-forwarded-prefix", given.encode("latin-1"))])) == ""


def test_a_header_that_comes_twice_is_ignored() -> None:
    assert forwarded(Headers(raw=[(b"x-forwarded-prefix", b"/a"), (b"x-forwarded-prefix", b"/b")])) == ""


def seen(path: str, root_path: str = "", header: str = "", given: str = "") -> tuple[str, str, str]:
    """What the application gets: root_path, path, and what routes are matched by."""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    headers = [(b"x-forwarded-prefix", header.encode())] if header else []
    scope: Scope = {"type": "http", "path": path, "root_path": given, "headers": headers}
    asyncio.run(Prefix(app, root_path)(scope, None, None))  # type: ignore[arg-type]
    (found,) = scopes
    return found["root_path"], found["path"], route_path(found)


def test_a_prefix_is_put_before_the_path_or_found_there() -> None:
    assert seen("/info") == ("", "/info", "/info")
    assert seen("/info", root_path="/ddpm") == ("/ddpm", "/ddpm/info", "/info")
    assert seen("/ddpm/info", root_path="/ddpm") == ("/ddpm", "/ddpm/info", "/info")
    assert seen("/info", header="/ddpm") == ("/ddpm", "/ddpm/info", "/info")
    assert seen("/ddpm/info", header="/ddpm/") == ("/ddpm", "/ddpm/info", "/info")
    assert seen("/ddpmer", header="/ddpm") == ("/ddpm", "/ddpm/ddpmer", "/ddpmer")


def test_the_setting_comes_before_the_header() -> None:
    assert seen("/info", root_path="/a", header="/b")[0] == "/a"


def test_what_the_server_has_set_stays() -> None:
    assert seen("/b/info", given="/b") == ("/b", "/b/info", "/info")


def test_the_setting_loses_its_last_slash() -> None:
    assert Settings(_env_file=None, root_path="/ddpm/").root_path == "/ddpm"


@pytest.fixture(
    params=["stripping, header", "stripping, setting", "not stripping, header", "not stripping, setting"]
)
def proxied(request: pytest.FixtureRequest, serve: Serve) -> Iterator[httpx.Client]:
    """A client of a proxy that serves the service below /ddpm, in one of four ways."""
    strip, source = request.param.split(", ")
    server = serve(api_keys="sesame", root_path="/ddpm" if source == "setting" else "")
    headers = {"X-Forwarded-Prefix": "/ddpm"} if source == "header" else {}
    proxy = Proxy(server.url, "/ddpm", strip=strip == "stripping", headers=headers)
    with httpx.Client(base_url=proxy.url, verify=False, timeout=30) as client:
        yield client
    proxy.close()


def test_everything_works_below_a_proxys_path(proxied: httpx.Client) -> None:
    for path in ("/", "/explore", "/status", "/docs"):
        page = proxied.get(f"/ddpm{path}")
        assert page.status_code == 200
        links = re.findall(r'(?:href|src)="([^"#:]+)"', page.text)
        assert links
        for link in links:
            target = urljoin(f"/ddpm{path}", link)
            assert target.startswith("/ddpm/")
            status = proxied.get(target).status_code
            assert status == (401 if target == "/ddpm/info" else 200), target
    assert proxied.get("/ddpm/openapi.json").json()["servers"] == [{"url": "/ddpm"}]
    assert proxied.post("/ddpm/generate", json={}).status_code == 401
    answer = proxied.post("/ddpm/generate", json={}, headers={"Authorization": "Bearer sesame"})
    assert answer.status_code == 200
    wanted = {"Authorization": "Bearer sesame", "Prefer": "respond-async"}
    job = proxied.post("/ddpm/generate", json={}, headers=wanted)
    assert job.headers["location"].startswith("/ddpm/jobs/")
    assert proxied.get(job.headers["location"], headers=wanted).status_code == 200


def test_the_path_without_its_slash_leads_to_the_page(serve: Serve) -> None:
    client = serve(root_path="/ddpm").client
    answer = client.get("/ddpm")
    assert answer.status_code == 307
    assert answer.headers["location"] == "/ddpm/"


def test_a_prefix_opens_nothing(serve: Serve) -> None:
    client = serve(api_keys="sesame").client
    for prefix in ("/web", "/livez", "/info", "/docs", "/x"):
        for path in ("/info", f"{prefix}/info", f"{prefix}//info"):
            answer = client.get(path, headers={"X-Forwarded-Prefix": prefix})
            leads_to_the_page = answer.headers.get("location") == f"{prefix}/" == f"{path}/"
            assert answer.status_code in (401, 404) or leads_to_the_page, (prefix, path)
