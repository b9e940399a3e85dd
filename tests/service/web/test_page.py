"""The Generate page in a real browser."""

import base64

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER
from tests.service.fakes import SIZE, until

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


def test_all_classes_come_in_one_stream_and_with_one_command(page, visit):
    generate(page, n="2", steps="4", seed="5")
    assert len(pictures(page)) == 6
    streams = [url for url in visit.requested if "/stream?" in url]
    assert len(streams) == 1
    names = page.locator("#grid .caption").all_inner_texts()
    assert [name.split() for name in names[1:4]] == [["cat", "6"], ["dog", "5"], ["dog", "6"]]
    command = page.locator("#curl").inner_text()
    assert '"class_label":["cat","cat","dog","dog","Ankle Boot","Ankle Boot"]' in command
    assert '"seed":[5,6,5,6,5,6]' in command
    assert "classes=all" in page.url


def test_more_images_than_a_request_may_have_come_in_several(visit, serve):
    page = visit("/?classes=all&n=2&seed=5&num_inference_steps=4", at=serve(max_images=4).url)
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    assert len(pictures(page)) == 6
    assert all(pictures(page))
    assert len([url for url in visit.requested if "/stream?" in url]) == 2


def test_the_replay_shows_the_previews_again(page):
    generate(page, n="1", steps="12", seed="5")
    final = pictures(page)
    page.locator("#play").click()
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    until(lambda: pictures(page) != final, "an early preview")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Play", timeout=15_000)
    until(lambda: pictures(page) == final, "the final images")


def test_previews_change_while_the_images_are_made(visit, serve):
    server = serve()
    server.gate.shut()
    page = visit("/?class_label=cat&n=1&seed=5&num_inference_steps=8", at=server.url)
    seen = set()
    for step in (1, 2, 3):
        server.gate.allow(1)
        expect(page.locator("#step")).to_contain_text(f"step {step} of 8")
        seen |= set(pictures(page))
    assert len(seen) == 3
    server.gate.open()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)


def test_an_image_can_be_looked_at_and_kept(page):
    generate(page, n="1", steps="4", seed="5")
    final = pictures(page)
    page.locator("#grid .pictures").nth(1).press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    expect(page.locator("#viewer-title")).to_have_text("dog, seed 5")
    with page.expect_download() as saved:
        page.locator("#viewer-save").click()
    assert saved.value.suggested_filename == "dog-seed-5.png"
    assert saved.value.path().read_bytes() == base64.b64decode(final[1].partition(",")[2])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#viewer-copy").click()
    expect(page.locator("#viewer-status")).to_have_text("Copied.")
    kinds = page.evaluate("async () => (await navigator.clipboard.read()).flatMap((item) => item.types)")
    assert kinds == ["image/png"]
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    with page.expect_download() as saved:
        page.locator("#save").click()
    assert saved.value.suggested_filename == "images-seed-5.png"
    with Image.open(saved.value.path()) as sheet:
        assert sheet.size == (2 * SIZE + 2, 2 * SIZE + 2)


def test_the_address_makes_the_same_images(page, visit):
    page.locator("#class").select_option("dog")
    page.locator("#sampler").select_option("ddim")
    page.locator("#guidance").fill("3")
    page.locator("#eta").fill("0.5")
    generate(page, n="2", steps="4", seed="5")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#link").click()
    expect(page.locator("#status")).to_contain_text("The link was copied")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    other = visit(at=link, path="")
    expect(other.locator("#status")).to_contain_text("Done", timeout=30_000)
    assert pictures(other) == pictures(page)
    for name in ("class", "sampler", "n", "seed", "steps", "guidance", "eta"):
        assert other.locator(f"#{name}").input_value() == page.locator(f"#{name}").input_value()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("class_label=unicorn", "a class that this model does not have: unicorn"),
        ("sampler=euler", "a sampler that this service does not have"),
        ("n=100000", "a number that is not possible"),
        ("n=2&num_inference_steps=many", "a number that is not possible"),
    ],
)
def test_an_address_that_asks_for_what_cannot_be_runs_nothing(visit, query, said):
    visit.expected.add("cannot be parsed")  # the browser's own word on a number that is none
    page = visit(f"/?{query}")
    expect(page.locator("#status")).to_contain_text(said)
    expect(page.locator("#status")).to_have_class("failed")
    assert not [url for url in visit.requested if "/stream?" in url]


def test_stop_ends_the_run(page):
    page.locator("#steps").fill("100")  # all of the tiny model's steps, so that it takes long enough
    page.locator("#n").fill("40")
    page.locator("#generate").click()
    page.locator("#stop").click()
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text("topped")


def test_a_service_with_keys_asks_for_one(visit, serve):
    page = visit(at=serve(api_keys="the-right-key").url)
    for key, status in (("a-wrong-key", "was not accepted"), ("the-right-key", "Ready")):
        page.locator("#key").fill(key)
        page.locator("#key-form button").click()
        expect(page.locator("#status")).to_contain_text(status)
    expect(page.locator("#key-form")).to_be_hidden()
    generate(page, n="1", steps="4", seed="5")
    assert pictures(page)
    expect(page.locator("#curl")).to_contain_text("$KEY")
    assert "the-right-key" not in page.content()
