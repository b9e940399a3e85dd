"""The web pages and their files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)
WEB = Path(__file__).parent.parent.parent / "web"


@router.get("/")
async def generate() -> FileResponse:
    """The page that generates and shows how."""
    return FileResponse(WEB / "index.html")


@router.get("/explore")
async def explore() -> FileResponse:
    """The page that shows what the network does to an image, noise level by noise level."""
    return FileResponse(WEB / "explore.html")


web_files = StaticFiles(directory=WEB)
"""The pages' styles and scripts, mounted at /web."""
