"""The Explore page in a real browser, against a service with a tiny network."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER, TINY, Visit
from tests.service.fakes import SIZE, until
from tests.service.live import Serve

pytestmark = IN_A_BROWSER


@pytest.fixture
def page(visit: Visit) -> Page:
    """The page, open, with one image evaluated at every noise level."""
    opened = visit(path="/explore")
    expect(opened.locator("#status")).to_contain_text("noise levels", timeout=30_000)
    return opened


def source(page: Page, name: str) -> str:
    """The source of the image with this id."""
    shown: str = page.locator(f"#{name}").evaluate("one => one.src")
    return shown


def opened(text: str) -> Image.Image:
    """The picture in base64, alone or in a data: URL."""
    return Image.open(BytesIO(base64.b64decode(text.rpartition(",")[2])))


def points(page: Page, chart: str) -> int:
    return page.locator(f"#{chart} .point").count()


def marked(page: Page, chart: str) -> str | None:
    return page.locator(f"#{chart} .mark").get_attribute("x")


def test_the_slider_moves_through_the_noise_levels_without_another_request(page: Page) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    slider = page.locator("#t")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#readout")).to_contain_text("t = 0 of 99")
    first = [source(page, name) for name in ("noisy", "x0-pred")]
    assert all(url.startswith("data:image/png;base64,") for url in first)
    mark = marked(page, "rate-chart")
    slider.press("End")
    until(lambda: source(page, "noisy") != first[0] and source(page, "x0-pred") != first[1], "other pictures")
    expect(page.locator("#readout")).not_to_contain_text("t = 0 ")
    assert marked(page, "rate-chart") != mark
    assert [url for url in requested if not url.startswith("data:")] == []


def test_the_curves_have_their_points_and_axes(page: Page) -> None:
    for chart, unit in (("rate-chart", "bits per dimension"), ("error-chart", "timestep t")):
        until(lambda chart=chart: points(page, chart) >= 20, "the curve")  # type: ignore[misc]
        expect(page.locator(f"#{chart}")).to_contain_text(unit)
        expect(page.locator(f"#{chart}")).to_contain_text("RMSE")
        assert "Root mean square error" in str(page.locator(f"#{chart}").get_attribute("aria-label"))
    expect(page.locator("#bits")).to_contain_text("bits per dimension")


def test_a_point_of_a_curve_can_be_chosen(page: Page) -> None:
    until(lambda: points(page, "error-chart") >= 20, "the curve")
    before = page.locator("#readout").inner_text()
    box = page.locator("#error-chart").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] * 0.85, box["y"] + box["height"] / 2)
    until(lambda: page.locator("#readout").inner_text() != before, "another timestep")


def test_an_uploaded_image_is_cropped_resized_and_made_grey(page: Page, tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 40), "black")
    wide.paste("white", (20, 0, 40, 20))  # the middle of the upper half
    wide.save(tmp_path / "wide.png")
    page.locator("#file").set_input_files(tmp_path / "wide.png")
    expect(page.locator("#status")).to_contain_text("Evaluated wide.png", timeout=30_000)
    expect(page.locator("#choices input")).to_have_count(4)
    picture = opened(source(page, "clean")).convert("L")
    assert picture.size == (SIZE, SIZE)
    assert picture.getpixel((SIZE // 2, 1)) == 255
    assert picture.getpixel((0, 1)) == 0
    assert picture.getpixel((SIZE // 2, SIZE - 2)) == 0
    expect(page.locator("#condition")).to_have_value("none")


def test_a_file_that_is_not_an_image_is_reported(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.locator("#file").set_input_files(tmp_path / "notes.png")
    expect(page.locator("#status")).to_contain_text("notes.png is not an image")
    expect(page.locator("#choices input")).to_have_count(3)


def test_another_image_or_class_is_scored_again(page: Page) -> None:
    with page.expect_request("**/score") as sent:
        page.locator("#choices input").nth(1).check(force=True)
    first: Any = sent.value.post_data_json
    assert first["class_label"] == 1
    assert opened(first["images"][0]).size == (SIZE, SIZE)
    with page.expect_request("**/score") as sent:
        page.locator("#condition").select_option("none")
    second: Any = sent.value.post_data_json
    assert "class_label" not in second
    assert second["images"] == first["images"]


def test_one_seed_under_every_sampler(page: Page) -> None:
    page.locator("#comparison").scroll_into_view_if_needed()
    expect(page.locator("#comparison-status")).to_contain_text("Done", timeout=30_000)
    expect(page.locator("#samplers th")).to_have_text(["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"])
    images = page.locator("#samplers img")
    assert len(set(images.evaluate_all("all => all.map(one => one.src)"))) > 8  # of 16
    before = images.first.get_attribute("src")
    page.locator("#seed").fill("8")
    until(lambda: images.first.get_attribute("src") != before, "another seed's picture")


def test_guidance_generates_the_same_seeds_again(page: Page) -> None:
    page.locator("#guided").scroll_into_view_if_needed()
    status, images = page.locator("#guided-status"), page.locator("#seeds img")
    expect(status).to_contain_text("Done", timeout=30_000)
    before = images.evaluate_all("all => all.map(one => one.src)")
    page.locator("#guidance").press("End")
    expect(page.locator("#guidance-value")).to_have_text("8.0")
    until(lambda: "guidance 8" in str(images.last.get_attribute("alt")), "the new pictures")
    after = images.evaluate_all("all => all.map(one => one.src)")
    assert len(before) == len(after) > 1
    assert before != after


def test_a_phone_shows_everything_without_scrolling_sideways(visit: Visit) -> None:
    page = visit(path="/explore", width=360)
    expect(page.locator("#status")).to_contain_text("noise levels", timeout=30_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in (
        "clean",
        "noisy",
        "x0-pred",
        "difference",
        "rate-chart",
        "error-chart",
        "comparison",
        "guided",
    ):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["width"] > 100
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360


def test_the_pages_link_to_each_other(page: Page) -> None:
    page.locator(".pages a", has_text="Generate").click()
    expect(page.locator("#generate")).to_be_visible()
    page.locator(".pages a", has_text="Explore").click()
    expect(page.locator("#denoise-title")).to_be_visible()


def test_a_key_opens_the_page(visit: Visit, serve: Serve) -> None:
    page = visit("/explore", at=serve(**TINY, api_keys="the-right-key").ready().url)
    expect(page.locator("#status")).to_contain_text("requires an API key")
    page.locator("#key").fill("the-right-key")
    page.locator("#key-form button").click()
    expect(page.locator("#panels")).to_be_visible()
    expect(page.locator("#choices img")).to_have_count(3, timeout=30_000)
