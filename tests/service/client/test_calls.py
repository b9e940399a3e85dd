"""Requests, before they are sent."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest

from service.client import ConnectionFailed
from service.client.calls import DEFAULT_URL, Following, client_options, job_call, post


def sent(call: Any) -> httpx.Request:
    with httpx.Client(base_url="http://service/below") as client:
        request: httpx.Request = call.request(client)
        return request


def test_fields_are_sent_as_they_are() -> None:
    request = sent(post("/generate", {"n": 2, "class_label": ["dog", None], "guidance_sigma_max": None}))
    assert str(request.url) == "http://service/below/generate"
    assert json.loads(request.content) == {"n": 2, "class_label": ["dog", None], "guidance_sigma_max": None}
    assert request.headers["accept"] == "application/json"


def test_pictures_are_sent_as_base64(tmp_path: Path) -> None:
    picture = PIL.Image.new("L", (2, 2), 9)
    path = tmp_path / "p.png"
    picture.save(path)
    array = np.full((2, 2, 1), 9, np.uint8)
    call = post("/score", {"images": [str(path), path, path.read_bytes(), picture, array], "mask": None})
    assert call.body is not None
    files = [base64.b64decode(each) for each in call.body["images"]]
    assert files[0] == files[1] == files[2] == path.read_bytes()
    assert PIL.Image.open(BytesIO(files[3])).getpixel((0, 0)) == 9
    assert np.load(BytesIO(files[4])).tolist() == array.tolist()
    assert call.body["mask"] is None


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        post("/edit", {"image": tmp_path / "nowhere.png"})


def test_an_id_cannot_lead_elsewhere() -> None:
    assert sent(job_call("GET", "../info?x")).url.raw_path == b"/below/jobs/..%2Finfo%3Fx"


def test_where_the_service_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DDPM_URL", raising=False)
    monkeypatch.delenv("DDPM_API_KEY", raising=False)
    assert client_options(None, None) == {"base_url": DEFAULT_URL, "headers": {}}
    monkeypatch.setenv("DDPM_URL", "http://elsewhere")
    monkeypatch.setenv("DDPM_API_KEY", "sesame")
    options = client_options(None, None)
    assert options == {"base_url": "http://elsewhere", "headers": {"Authorization": "Bearer sesame"}}
    assert client_options("http://here", "")["headers"] == {}


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConnectionFailed, match="Invalid port"):
        client_options("http://service:port", None)


def test_a_stream_that_has_begun_is_continued_by_get() -> None:
    following = Following(post("/edit", {"image": b"x"}))
    assert following.lost("cut").again is False
    assert (following.call().method, following.call().path) == ("POST", "/edit")
