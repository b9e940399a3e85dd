"""Pictures edited on the Generate page."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, Request, expect

from service.engine.warmup import warm_up
from tests.model.test_condition import conditioned
from tests.service.browser import IN_A_BROWSER, TINY, Visit
from tests.service.fakes import SIZE, until
from tests.service.live import Serve

pytestmark = IN_A_BROWSER
HALF = SIZE // 2


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """White on the left, black on the right."""
    image = Image.new("L", (2 * SIZE, 2 * SIZE))
    image.paste(255, (0, 0, SIZE, 2 * SIZE))
    image.save(tmp_path / "halves.png")
    return tmp_path / "halves.png"


@pytest.fixture
def page(visit: Visit, picture: Path) -> Page:
    """The page, with the picture chosen."""
    opened = visit("/")
    expect(opened.locator("#status")).to_have_text("Ready.")
    choose(opened, picture)
    return opened


def choose(page: Page, picture: Path) -> None:
    page.locator("#picture").set_input_files(picture)
    expect(page.locator("#editor")).to_be_visible()


def generate(page: Page, steps: int = 10) -> Any:
    """Press Generate, wait for the end, and return what was sent."""
    page.locator("#n").fill("1")
    page.locator("#steps").fill(str(steps))
    with page.expect_request("**/edit") as sent:
        page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    request: Request = sent.value
    assert request.headers["accept"] == "text/event-stream"
    return request.post_data_json


def opened(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L")


def box_of(image: Image.Image) -> Any:
    """(left, top, right, bottom) of what is white."""
    return image.getbbox()


def test_all_of_a_picture_changes_by_strength(page: Page) -> None:
    page.locator("#strength").fill("0.3")
    sent = generate(page)
    assert box_of(opened(sent["image"])) == (0, 0, HALF, SIZE)
    assert sent["strength"] == 0.3
    assert "mask" not in sent
    assert "class_label" not in sent
    expect(page.locator("#step")).to_contain_text("step 3 of 3")  # the last 0.3 of ten
    expect(page.locator("#curl")).to_contain_text("-F image=@image.png")


def test_inpainting_needs_no_pointer_and_can_be_watched(page: Page) -> None:
    page.locator("#masks button", has_text="Right half").press("Enter")
    expect(page.locator("#mask-text")).to_have_text("Mask: 50 % of the picture is regenerated")
    expect(page.locator("#sampler")).to_have_value("ddpm")
    expect(page.locator("#strength-field")).to_be_hidden()
    sent = generate(page, steps=25)
    assert box_of(opened(sent["mask"])) == (HALF, 0, SIZE, SIZE)
    assert "strength" not in sent
    steps = page.locator("#step").inner_text()
    assert int(steps.split()[3].rstrip(",")) > 25  # with RePaint's jumps
    image = page.locator("#grid .frame.x0 img")
    final = opened(str(image.get_attribute("src")))
    assert set(final.crop((0, 0, HALF, SIZE)).tobytes()) == {255}  # what was kept
    page.locator("#scrubber").press("Home")
    until(lambda: opened(str(image.get_attribute("src"))).tobytes() != final.tobytes(), "an early preview")


def test_a_mask_is_painted_and_erased_with_a_pointer(page: Page) -> None:
    page.locator("#brush").fill("2")
    area = page.locator("#mask").bounding_box()
    assert area is not None
    pixel = area["width"] / SIZE

    def stroke() -> None:
        page.mouse.move(area["x"] + 2 * pixel, area["y"] + 3 * pixel)
        page.mouse.down()
        page.mouse.move(area["x"] + 6 * pixel, area["y"] + 3 * pixel)
        page.mouse.up()

    stroke()
    page.locator("#method").select_option("picture")
    sent = generate(page)
    assert box_of(opened(sent["mask"])) == (1, 2, 7, 4)
    assert sent["strength"] == 0.6  # SDEdit inside the mask
    page.locator("#erase").check()
    stroke()
    expect(page.locator("#mask-text")).to_have_text("No mask: all of the picture changes")


def test_a_dropped_picture_is_edited(visit: Visit, picture: Path) -> None:
    page = visit("/")
    expect(page.locator("#status")).to_have_text("Ready.")
    data = base64.b64encode(picture.read_bytes()).decode()
    page.evaluate(
        """(data) => {
          const bytes = Uint8Array.from(atob(data), (one) => one.charCodeAt(0));
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "halves.png", { type: "image/png" }));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true }));
        }""",
        data,
    )
    expect(page.locator("#editor")).to_be_visible()
    page.locator("#remove").click()
    expect(page.locator("#editor")).to_be_hidden()


def test_what_is_not_a_picture_is_refused_kindly(page: Page, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    page.locator("#picture").set_input_files(tmp_path / "notes.png")
    expect(page.locator("#status")).to_contain_text("notes.png is not an image")


def test_an_image_that_was_made_is_edited_next(visit: Visit) -> None:
    page = visit("/?class_label=dog&n=1&seed=5&num_inference_steps=4")
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    made = page.locator("#grid .frame.x0 img").get_attribute("src")
    page.locator("#grid .pictures").click()
    page.locator("#viewer-edit").click()
    sent = generate(page)
    assert sent["image"] == made
    assert sent["class_label"] == "dog"
    assert page.locator("#class option[value=each]").is_disabled()


def test_a_model_that_fills_holes_asks_for_a_picture_and_a_mask(
    visit: Visit, serve: Serve, picture: Path
) -> None:
    filling = conditioned(("mask", "masked_image"))
    server = serve(**{**TINY, "warm": lambda config: warm_up(filling, config)}).ready()
    page = visit("/", at=server.url)
    expect(page.locator("#status")).to_contain_text("makes images from a picture")
    choose(page, picture)
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("fills holes in pictures")
    page.locator("#masks button", has_text="Centre").click()
    expect(page.locator("#strength-field")).to_be_hidden()
    sent = generate(page)
    assert {"image", "mask"} <= sent.keys()
    assert "strength" not in sent


def test_a_model_that_changes_pictures_takes_no_mask(visit: Visit, serve: Serve, picture: Path) -> None:
    changing = conditioned(("image",))
    server = serve(**{**TINY, "warm": lambda config: warm_up(changing, config)}).ready()
    page = visit("/", at=server.url)
    expect(page.locator("#status")).to_contain_text("makes images from a picture")
    choose(page, picture)
    expect(page.locator("#masking")).to_be_hidden()
    sent = generate(page)
    assert "mask" not in sent
