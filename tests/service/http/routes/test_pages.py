"""The pages are served, and nothing around them."""

from __future__ import annotations

from tests.service.live import Serve


def test_the_pages_and_their_files(serve: Serve) -> None:
    client = serve().client
    for path, title in (("/", "Diffusion, step by step"), ("/explore", "Explore diffusion")):
        page = client.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert title in page.text
    script = client.get("/web/app.js")
    assert script.status_code == 200
    assert "javascript" in script.headers["content-type"]
    missing = client.get("/web/../../pyproject.toml")
    assert missing.status_code == 404
    assert client.get("/web/%2e%2e/%2e%2e/pyproject.toml").status_code == 404
