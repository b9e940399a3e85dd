"""The pages where the service refuses, fails or goes away, and where the network does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER, Visit
from tests.service.fakes import FakeDenoiser
from tests.service.live import Serve, Threaded
from tests.service.proxy import Line

pytestmark = IN_A_BROWSER
QUERY = "/?class_label=cat&n=2&seed=5&num_inference_steps=8"


@pytest.fixture
def server(serve: Serve) -> Threaded:
    """A service whose steps wait at a gate."""
    started = serve(max_queue=4)
    started.gate.shut()
    return started


@pytest.fixture
def line(server: Threaded) -> Iterator[Line]:
    opened = Line(server.address)
    yield opened
    opened.close()


def images_made(server: Threaded) -> float:
    samplers = ("ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m")
    return sum(server.metric("ddpm_images_generated_total", sampler=sampler) for sampler in samplers)


def finish(server: Threaded, page: Page) -> None:
    server.gate.open()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)
    assert all(page.locator("#grid .frame.x0 img").evaluate_all("all => all.map((one) => one.src)"))


def test_a_dropped_stream_is_resumed_without_a_second_chain(
    visit: Visit, server: Threaded, line: Line
) -> None:
    visit.expected.add("net::ERR")
    page = visit(QUERY, at=line.url)
    server.gate.allow(2)
    expect(page.locator("#step")).to_contain_text("step 2 of 8")
    with page.expect_request(lambda request: "last-event-id" in request.headers):
        line.cut()
    finish(server, page)
    assert len(server.denoiser.starts) == images_made(server) == 2
    assert server.metric("ddpm_cancelled_total") == 0


def test_a_dropped_edit_is_resumed_without_a_second_chain(
    visit: Visit, server: Threaded, line: Line, tmp_path: Path
) -> None:
    visit.expected.add("net::ERR")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    page = visit("/", at=line.url)
    expect(page.locator("#status")).to_have_text("Ready.")
    page.locator("#picture").set_input_files(tmp_path / "black.png")
    page.locator("#n").fill("2")
    page.locator("#generate").click()
    server.gate.allow(2)
    expect(page.locator("#step")).to_contain_text("step 1 of 12")
    with page.expect_request(lambda request: "last-event-id" in request.headers) as resumed:
        line.cut()
    assert resumed.value.method == "GET"
    finish(server, page)
    assert images_made(server) == 2


def test_a_full_queue_is_said_with_the_time_to_try_again(visit: Visit, server: Threaded) -> None:
    visit.expected.add("429")
    first = visit(QUERY, at=server.url)
    server.denoiser.gate.wait_for_arrival(1)
    second = visit("/?class_label=cat&n=4&seed=5", at=server.url)
    expect(second.locator("#status")).to_contain_text("Try again in")
    expect(second.locator("#status")).to_have_class("failed")
    expect(second.locator("#generate")).to_have_attribute("aria-disabled", "false")
    finish(server, first)


def test_an_invalid_request_is_said_with_the_field(visit: Visit, server: Threaded) -> None:
    visit.expected.add("422")
    page = visit("/", at=server.url)
    expect(page.locator("#status")).to_have_text("Ready.")
    page.locator("#steps").evaluate("input => input.removeAttribute('max')")
    page.locator("#steps").fill("5000")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_have_text("num_inference_steps: This model has 100 timesteps.")


def test_a_failed_image_is_said(visit: Visit, serve: Serve) -> None:
    denoiser = FakeDenoiser()
    denoiser.gives_nan.add(5)
    page = visit(QUERY, at=serve(denoiser).url)
    expect(page.locator("#status")).to_have_class("failed")
    expect(page.locator("#status")).to_have_text("The network gave a NaN or an infinity.")


def test_a_service_that_has_gone_is_said(visit: Visit, server: Threaded, line: Line) -> None:
    visit.expected.add("net::ERR")
    page = visit("/", at=line.url)
    expect(page.locator("#status")).to_have_text("Ready.")
    line.close()
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("The service cannot be reached")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")


def test_a_slow_network_delays_the_images_and_loses_none(visit: Visit, server: Threaded) -> None:
    page = visit("/", at=server.url)
    expect(page.locator("#status")).to_have_text("Ready.")
    page.context.new_cdp_session(page).send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 200, "downloadThroughput": 12_000, "uploadThroughput": 12_000},
    )
    server.gate.open()
    page.locator("#class").select_option("cat")
    page.locator("#n").fill("4")
    page.locator("#steps").fill("20")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=45_000)
    assert page.locator("#grid li.done").count() == 4
    expect(page.locator("#step")).to_contain_text("step 20 of 20")
