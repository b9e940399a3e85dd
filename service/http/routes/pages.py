"""The web pages and their files. All of their links are relative, so that they work below any path."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)
WEB = Path(__file__).parent.parent.parent / "web"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
"""What a page may load, and from where: nothing from elsewhere, and no script or style inside the HTML."""
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{directive} {sources}" for directive, sources in POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again after an update, and answered by 304 until then
}


def _page(name: str) -> FileResponse:
    return FileResponse(WEB / name, headers=HEADERS)


@router.get("/")
async def generate() -> FileResponse:
    """The page that generates and edits images, and shows how."""
    return _page("index.html")


@router.get("/explore")
async def explore() -> FileResponse:
    """The page that shows what the network does to an image, noise level by noise level."""
    return _page("explore.html")


@router.get("/status")
async def status() -> FileResponse:
    """The page that draws the metrics as they change."""
    return _page("status.html")


@router.get("/docs")
async def docs() -> FileResponse:
    """The OpenAPI description, to read and to try out."""
    return _page("docs.html")


web_files = StaticFiles(directory=WEB)
"""The pages' styles and scripts, mounted at /web."""


def swagger_files() -> StaticFiles:
    """Swagger UI's, mounted at /swagger. Raises ModuleNotFoundError without the package that has them."""
    spec = find_spec("fastapi_offline")  # for its files alone: it is not imported
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("fastapi-offline is not installed", name="fastapi_offline")
    return StaticFiles(directory=Path(spec.origin).parent / "static")
