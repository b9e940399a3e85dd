"""What axe-core finds on the pages: nothing. And what fits a phone, and what comes from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has no types
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER, Visit

pytestmark = IN_A_BROWSER
PAGES = ("/", "/explore", "/status")


def violations(page: Page, **options: Any) -> list[str]:
    results = Axe().run(page, options={"resultTypes": ["violations"], **options})
    return [
        f"{rule['id']}: {node['target']} {node['failureSummary']}"
        for rule in results.response["violations"]
        for node in rule["nodes"]
    ]


def open_all(visit: Visit, path: str, picture: Path, **options: Any) -> Page:
    """The page with everything on it."""
    page = visit(path, **options)
    if path == "/":
        expect(page.locator("#status")).to_have_text("Ready.")
        page.locator("#n").fill("1")
        page.locator("#steps").fill("4")
        page.locator("#generate").click()
        expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
        page.locator("#picture").set_input_files(picture)
        page.locator("#masks button").first.click()
    elif path == "/explore":
        expect(page.locator("#status")).to_contain_text("noise levels", timeout=30_000)
        for panel in ("comparison", "guided"):
            page.locator(f"#{panel}").scroll_into_view_if_needed()
            expect(page.locator(f"#{panel}-status")).to_contain_text("Done", timeout=30_000)
    else:
        expect(page.locator("#figures tr")).not_to_have_count(0)
        page.locator("summary").click()
    return page


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    return tmp_path / "black.png"


@pytest.mark.parametrize("path", PAGES)
def test_nothing_is_found(visit: Visit, picture: Path, path: str) -> None:
    page = open_all(visit, path, picture, color_scheme="light", reduced_motion="reduce")
    assert violations(page) == []
    page.emulate_media(color_scheme="dark")
    assert violations(page) == []
    if path == "/":
        page.locator("#grid .pictures").first.click()
        expect(page.locator("#viewer")).to_be_visible()
        assert violations(page) == []
        page.emulate_media(color_scheme="light")
        assert violations(page) == []


def test_a_fault_is_found(visit: Visit) -> None:
    page = visit("/status")
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'data:,' }))")
    assert any(found.startswith("image-alt") for found in violations(page))


@pytest.mark.parametrize("path", ["/", "/status"])
def test_a_phone_shows_it_without_scrolling_sideways(visit: Visit, picture: Path, path: str) -> None:
    page = open_all(visit, path, picture, width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    if path == "/":
        with page.expect_request("**/edit"):
            page.locator("#generate-below").click()
        expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)


def test_docs_has_the_schema_in_both_schemes_and_loads_nothing_from_elsewhere(visit: Visit) -> None:
    for scheme in ("light", "dark"):
        page = visit("/docs", color_scheme=scheme)
        expect(page.locator("#swagger-ui")).to_contain_text("/generate")
        expect(page).to_have_title("DDPM service")
        faults = Axe().run(page, context={"exclude": ["#swagger-ui"]}).response["violations"]
        assert faults == []  # those of Swagger UI itself are not ours
        assert ("dark-mode" in (page.locator("html").get_attribute("class") or "")) == (scheme == "dark")
    hosts = {urlsplit(url).netloc for url in visit.requested if not url.startswith("data:")}
    assert hosts == {urlsplit(visit.url).netloc}
