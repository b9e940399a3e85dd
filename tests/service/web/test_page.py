"""The page in a real browser, against the real service with a tiny model."""

import pytest
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER
from tests.service.fakes import until

pytestmark = IN_A_BROWSER


@pytest.fixture
def page(visit):
    """The page, open and ready."""
    opened = visit()
    expect(opened.locator("#generate")).not_to_have_attribute("aria-disabled", "true")
    return opened


def pictures(page: Page) -> list[str]:
    """The x₀ images that the tiles show now."""
    sources: list[str] = page.locator("#grid .frame.x0 img").evaluate_all("all => all.map(one => one.src)")
    return sources


def generate(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#generate").click()
    expect(page.locator("#stop")).to_be_hidden(timeout=30_000)


def test_images_appear_and_can_be_replayed(page):
    generate(page, n="2", steps="12", seed="5")
    final = pictures(page)
    assert final
    assert all(source.startswith("data:image/png;base64,") for source in final)

    scrubber = page.locator("#scrubber")
    scrubber.focus()
    scrubber.press("Home")
    until(lambda: pictures(page) not in ([], final), "an early preview")
    scrubber.press("End")
    until(lambda: pictures(page) == final, "the final images")


def test_done_is_not_shown_before_the_images_are(page):
    page.evaluate("window.requestAnimationFrame = () => 1")  # a frame that never comes
    generate(page, n="1", steps="4", seed="5")
    expect(page.locator("#status")).to_contain_text("Done")
    shown = pictures(page)
    assert shown
    assert all(shown)


def test_a_pinned_seed_gives_the_same_images_and_another_seed_others(page):
    generate(page, n="1", steps="4", seed="5")
    first = pictures(page)
    generate(page, n="1", steps="4", seed="5")
    assert pictures(page) == first
    generate(page, n="1", steps="4", seed="6")
    assert pictures(page) != first


def test_the_curl_line_names_the_seed(page):
    generate(page, n="1", steps="4", seed="987654")
    expect(page.locator("#curl")).to_contain_text("987654")


def test_stop_ends_the_run(page):
    page.locator("#steps").fill("100")  # all of the tiny model's steps, so that it takes long enough
    page.locator("#n").fill("40")
    page.locator("#generate").click()
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("topped")


def test_a_service_with_keys_asks_for_one(visit):
    page = visit("--api-keys", "the-right-key")
    for key, status in (("a-wrong-key", "was not accepted"), ("the-right-key", "Ready")):
        page.locator("#key").fill(key)
        page.locator("#key-form button").click()
        expect(page.locator("#status")).to_contain_text(status)
    expect(page.locator("#key-form")).to_be_hidden()
    generate(page, n="1", steps="4", seed="5")
    assert pictures(page)
    expect(page.locator("#curl")).to_contain_text("$KEY")
    assert "the-right-key" not in page.content()
