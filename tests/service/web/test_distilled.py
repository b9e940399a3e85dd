"""The pages with a model that is distilled into a few steps: they offer what it can do, and nothing else."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from service.engine.warmup import warm_up
from tests.service.browser import IN_A_BROWSER, TINY, Visit
from tests.service.live import Serve, Threaded
from tests.service.tasks.test_distilled import distilled

pytestmark = IN_A_BROWSER


@pytest.fixture
def tiny(serve: Serve) -> Threaded:
    """A service with a student of four steps."""
    return serve(**{**TINY, "warm": lambda config: warm_up(distilled(), config)}).ready()


def test_the_form_has_the_students_steps_and_no_guidance(visit: Visit) -> None:
    page = visit()
    expect(page.locator("#generate")).not_to_have_attribute("aria-disabled", "true")
    expect(page.locator("#sampler option")).to_have_text(["ddim"])
    expect(page.locator("#steps")).to_have_value("4")
    expect(page.locator("#steps")).to_have_attribute("max", "4")
    expect(page.locator("#guidance-field")).to_be_hidden()
    expect(page.locator("#eta-field")).to_be_hidden()
    page.locator("#n").fill("1")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("Done", timeout=30_000)


def test_explore_compares_the_students_step_counts_alone(visit: Visit) -> None:
    page = visit(path="/explore")
    expect(page.locator("#comparison #counts th")).to_have_text(["1 step", "2 steps", "4 steps"])
    expect(page.locator("#comparison-status")).to_contain_text("Done", timeout=30_000)
    expect(page.locator("#samplers img")).to_have_count(3)
    expect(page.locator("#denoise")).to_be_hidden()
    expect(page.locator("#guided")).to_be_hidden()
