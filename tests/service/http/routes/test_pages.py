"""The pages are served, and nothing around them."""

from __future__ import annotations

import re

from service.http.routes import pages
from tests.service.live import Serve


def test_the_pages_and_their_files(serve: Serve) -> None:
    client = serve().client
    titles = {
        "/": "Diffusion, step by step",
        "/explore": "Explore diffusion",
        "/status": "Status",
        "/docs": "API",
    }
    for path, title in titles.items():
        page = client.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert title in page.text
        policy = page.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cross-origin-opener-policy"] == "same-origin"
        assert page.headers["cross-origin-resource-policy"] == "same-origin"
    script = client.get("/web/app.js")
    assert script.status_code == 200
    assert "javascript" in script.headers["content-type"]
    missing = client.get("/web/../../pyproject.toml")
    assert missing.status_code == 404
    assert client.get("/web/%2e%2e/%2e%2e/pyproject.toml").status_code == 404


def test_no_page_has_a_script_or_style_of_its_own() -> None:
    """The Content-Security-Policy would not let it run."""
    for page in pages.WEB.glob("*.html"):
        text = page.read_text()
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text), page.name
        addresses = re.findall(r'(?:src|<link[^>]* href)="([^"]*)"', text)
        assert addresses
        assert [address for address in addresses if not re.match(r"web/|swagger/|data:", address)] == []


def test_swagger_ui_is_on_this_machine(serve: Serve) -> None:
    client = serve(api_keys="sesame").client
    for name, kind in (("swagger-ui-bundle.js", "javascript"), ("swagger-ui.css", "css")):
        answer = client.get(f"/swagger/{name}")
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]


def test_no_answer_is_taken_for_anything_else(serve: Serve) -> None:
    client = serve(api_keys="sesame").client
    answers = [client.get(path) for path in ("/", "/web/app.js", "/info", "/livez", "/missing", "/metrics")]
    answers.append(client.post("/generate", json={"n": 1}, headers={"Authorization": "Bearer sesame"}))
    assert {answer.status_code for answer in answers} == {200, 401}
    assert [answer.headers["x-content-type-options"] for answer in answers] == ["nosniff"] * len(answers)


def test_a_picture_may_be_shown_by_any_page(serve: Serve) -> None:
    """An `<img>` of another origin is a use of `GET /generate`."""
    picture = serve().client.get("/generate", params={"seed": 7, "num_inference_steps": 2})
    assert picture.headers["content-type"] == "image/png"
    assert "cross-origin-resource-policy" not in picture.headers
