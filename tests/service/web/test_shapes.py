"""The pages with models whose samples are no squares, no RGB, or no pictures at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from service.engine.warmup import warm_up
from tests.service.browser import IN_A_BROWSER, TINY, Visit
from tests.service.fakes import tiny_model
from tests.service.live import Serve, Threaded

pytestmark = IN_A_BROWSER

SHAPES = {(4, 16, 8): (16, 8), (5, 8, 16): (18, 52)}
"""(C, H, W) → (H, W) of the picture. Five channels are three and two in two rows, two pixels apart."""


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def tiny(serve: Serve, shape: tuple[int, int, int]) -> Threaded:
    """A service with a network of this shape."""
    return serve(**{**TINY, "warm": lambda config: warm_up(tiny_model(shape=shape), config)}).ready()


@pytest.fixture
def visit(browser: Browser, tiny: Threaded) -> Iterator[Visit]:
    opened = Visit(browser, tiny.url)
    yield opened
    opened.close()


def look(page: Page, selector: str) -> dict[str, Any]:
    """Of the first picture there: its own size, that on the screen, and what shows through it."""
    found: dict[str, Any] = page.locator(selector).first.evaluate(
        """async (image) => {
          await image.decode?.();
          const { width, height } = image.getBoundingClientRect();
          const size = [image.naturalHeight ?? image.height, image.naturalWidth ?? image.width];
          return { size, ratio: width / height, behind: getComputedStyle(image).backgroundImage };
        }"""
    )
    return found


def test_pages_show_what_there_is_in_its_proportions(visit: Visit, shape: Any) -> None:
    height, width = SHAPES[shape]
    page = visit()
    expect(page.locator("#generate")).not_to_have_attribute("aria-disabled", "true")
    page.locator("#n").fill("1")
    page.locator("#steps").fill("4")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    shown = look(page, "#grid .frame.x0 img")
    assert shown["size"] == [height, width]
    assert shown["ratio"] == pytest.approx(width / height, rel=0.02)
    assert ("conic-gradient" in shown["behind"]) == (shape[0] == 4)
    accept = "application/x-npy" if shape[0] == 5 else "image/png"
    expect(page.locator("#curl")).to_contain_text(f"Accept: {accept}")

    page.locator(".pages a", has_text="Explore").click()
    expect(page.locator("#status")).to_contain_text("noise levels", timeout=30_000)
    expect(page.locator("#difference")).to_be_visible()
    for name in ("clean", "noisy", "x0-pred", "difference"):
        shown = look(page, f"#{name}")
        assert shown["size"] == [height, width]
        assert shown["ratio"] == pytest.approx(width / height, rel=0.05)
    expect(page.locator("#upload")).to_be_visible(visible=shape[0] != 5)
    page.locator("#comparison").scroll_into_view_if_needed()
    expect(page.locator("#comparison-status")).to_contain_text("Done", timeout=30_000)
    assert look(page, "#samplers img")["size"] == [height, width]
