"""A real browser on the pages of a real service."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.service.live import Process

CHROMIUM = shutil.which("chromium")
IN_A_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
# Without these the browser keeps trying to reach its vendor, in a closed network too.
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Visit = Callable[..., Page]


def visiting(launch: Callable[..., Process], folder: Path) -> Iterator[Visit]:
    """Body of the fixture: opens a page of a service with these flags; the console must stay clean."""
    with ExitStack() as stack:
        complaints: list[str] = []
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=CHROMIUM, args=QUIET)
        stack.callback(browser.close)

        def visit(*flags: str, path: str = "/", width: int = 1280) -> Page:
            client = stack.enter_context(closing(launch("--model", str(folder), *flags).connect()))
            opened = browser.new_page(viewport={"width": width, "height": 800})
            opened.on("console", lambda message: complaints.append(message.text))
            opened.on("pageerror", lambda error: complaints.append(str(error)))
            opened.goto(str(client.base_url.join(path)))
            return opened

        yield visit
    assert [text for text in complaints if "401" not in text] == []
