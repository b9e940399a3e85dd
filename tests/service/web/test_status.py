"""The Status page, and what it makes of the metrics."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.service.browser import IN_A_BROWSER, Visit
from tests.service.fakes import until
from tests.service.live import Serve, Threaded

pytestmark = IN_A_BROWSER

BEFORE = """\
# HELP ddpm_steps_total Steps.
# TYPE ddpm_steps_total counter
ddpm_steps_total 10.0
ddpm_rejected_total{reason="queue \\"full\\"\\n"} 2.0
ddpm_rejected_total{reason="draining"} 3.0
took_bucket{le="1.0",route="/a"} 1.0
took_bucket{le="2.0",route="/a"} 1.0
took_bucket{le="+Inf",route="/a"} 1.0
took_count{route="/a"} 1.0
took_sum{route="/a"} 0.5
"""
AFTER = """\
ddpm_steps_total 30.0
ddpm_rejected_total{reason="queue \\"full\\"\\n"} 1.0
took_bucket{le="1.0",route="/a"} 2.0
took_bucket{le="2.0",route="/a"} 5.0
took_bucket{le="+Inf",route="/a"} 5.0
took_count{route="/a"} 5.0
took_sum{route="/a"} 6.5
"""


@pytest.fixture
def server(serve: Serve) -> Threaded:
    started = serve(max_batch_size=4)
    started.gate.shut()
    return started


def fact(page: Page, title: str) -> str:
    return page.locator("#facts div", has=page.get_by_text(title, exact=True)).locator("dd").inner_text()


def test_metrics_are_read_and_compared(visit: Visit) -> None:
    page = visit("/status")
    found: Any = page.evaluate(
        """async ([before, after]) => {
          const metrics = await import(new URL("web/metrics.js", document.baseURI));
          const { Reading, increase, mean, quantile, rate } = metrics;
          const [first, now] = [new Reading(before, 10), new Reading(after, 14)];
          return {
            labels: first.labels("ddpm_rejected_total").map(({ reason }) => reason),
            sum: first.sum("ddpm_rejected_total"),
            absent: first.sum("ddpm_absent"),
            rate: rate(first, now, "ddpm_steps_total"),
            restarted: increase(first, now, "ddpm_rejected_total"),
            mean: mean(first, now, "took"),
            nothing: mean(now, now, "took"),
            median: quantile(0.5, first, now, "took", { route: "/a" }),
            highest: quantile(1, first, now, "took", { route: "/a" }),
            none: quantile(0.5, now, now, "took", { route: "/a" }),
          };
        }""",
        [BEFORE, AFTER],
    )
    assert found == {
        "labels": ['queue "full"\n', "draining"],
        "sum": 5,
        "absent": None,
        "rate": 5,  # 20 in 4 s
        "restarted": None,
        "mean": 1.5,
        "nothing": None,
        "median": pytest.approx(1 + 1 / 3),  # of 1 below 1 and 3 from there to 2
        "highest": 2,
        "none": None,
    }


def test_the_figures_follow_the_service(visit: Visit, server: Threaded) -> None:
    page = visit("/status", at=server.url)
    expect(page.locator("#name")).to_have_text("tiny")
    expect(page.locator("#state-text")).to_have_text("The service accepts jobs.")
    flight = page.locator("figure", has_text="Images in flight")
    expect(flight.locator("output").first).to_have_text("0")
    with server.client.stream("GET", "/stream?n=6&num_inference_steps=4") as stream:
        events = stream.iter_lines()
        next(events)
        server.gate.allow(1)
        server.gate.wait_for_arrival(2)
        expect(flight.locator("output").first).to_have_text("4")
        expect(flight.locator("output").last).to_have_text("2")
        server.gate.open()
        for _ in events:
            pass
    until(lambda: fact(page, "Images finished") == "6", "the finished images")
    row = page.locator("#routes tr", has_text="/stream").locator("td")
    expect(row.first).to_have_text("1")
    expect(row.last).to_contain_text("s")
    image = page.locator("figure", has_text="Batch size").locator("svg")
    assert "rows" in str(image.get_attribute("aria-label"))
    page.locator("summary").press("Enter")
    figures = page.locator("#figures tr", has_text="Images in flight: running").locator("td")
    expect(figures.last).to_have_text("4")


def test_a_metric_that_is_missing_is_a_dash(visit: Visit, server: Threaded) -> None:
    def without(route: Any) -> None:
        lines = route.fetch().text().splitlines(keepends=True)
        route.fulfill(body="".join(line for line in lines if "slots" not in line))

    page = visit("/docs", at=server.url)
    page.route("**/metrics", without)
    page.goto(f"{server.url}/status")
    slots = page.locator("figure", has_text="Slots").locator("output")
    expect(slots).to_have_text(["–", "–"])
    page.unroute_all(behavior="wait")


def test_a_service_that_does_not_answer_is_said_until_it_does(visit: Visit, server: Threaded) -> None:
    visit.expected |= {"net::ERR", "Failed to load"}
    page = visit("/status", at=server.url)
    expect(page.locator("#state-text")).to_have_text("The service accepts jobs.")
    page.context.set_offline(True)
    expect(page.locator("#state-text")).to_contain_text("does not answer")
    page.context.set_offline(False)
    expect(page.locator("#state-text")).to_have_text("The service accepts jobs.")
