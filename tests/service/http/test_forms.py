"""Every way in which clients send a body, read in one place; what is wrong with one is said by name."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.http import forms
from service.http.forms import HALVES
from tests.service.http.test_problems import problem
from tests.service.live import serving

ROUTES = {
    "/generate": b"{}",
    "/edit": b'{"image": "%b"}' % HALVES.encode(),
    "/interpolate": b'{"seeds": [1, 2]}',
    "/score": b'{"images": ["%b"]}' % HALVES.encode(),
}
"""Those that take a body, with one that each of them understands."""
PICTURE = base64.b64decode(HALVES.partition(",")[2])
FORMS: dict[str, list[Any]] = {
    "/generate": [],
    "/edit": [("image", PICTURE)],
    "/interpolate": [("images", PICTURE), ("images", PICTURE)],
    "/score": [("images", PICTURE)],
    "/v1/images/generations": [("prompt", (None, "cat"))],
    "/v1/images/edits": [("image", PICTURE), ("prompt", (None, "cat"))],
}
"""The same as forms, and OpenAI's."""


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of a server with a fake denoiser."""
    servers = serving()
    yield next(servers)().client
    next(servers, None)


def refusal(response: httpx.Response) -> str:
    return str(problem(response, 422, "invalid_request")["detail"])


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n "])
@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_may_begin_with_a_byte_order_mark(
    client: httpx.Client, path: str, before: bytes, kind: str
) -> None:
    response = client.post(path, content=before + ROUTES[path], headers={"content-type": kind})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ROUTES)
def test_a_second_mark_is_no_json(client: httpx.Client, path: str) -> None:
    content = 2 * b"\xef\xbb\xbf" + ROUTES[path]
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert "Invalid JSON" in refusal(response)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf"])
def test_an_empty_body_is_said_to_be_empty(client: httpx.Client, path: str, content: bytes) -> None:
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert "body is empty" in refusal(response)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, ["Content-Type", "There is none", "{}"]),
        ({"content-type": "application/x-www-form-urlencoded"}, ["Content-Type", "-d", "--json", "-F"]),
        ({"content-type": "text/secret"}, ["Content-Type", "application/json", "multipart/form-data"]),
    ],
)
def test_another_media_type_is_answered_by_the_header_and_the_remedy(
    client: httpx.Client, path: str, headers: dict[str, str], named: list[str]
) -> None:
    detail = refusal(client.post(path, content=b"n=1", headers=headers))
    assert [word for word in named if word not in detail] == []
    assert "secret" not in detail


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-16", "nonsense", '"undefined"'])
def test_the_charset_of_a_form_means_nothing(client: httpx.Client, charset: str) -> None:
    part = "--b\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n"
    fields = {"num_inference_steps": "1", "seed": "7", "class_label": "dög"}
    body = "".join(part % each for each in fields.items()) + "--b--\r\n"
    for kind in (
        f"multipart/form-data; charset={charset}; boundary=b",
        f"multipart/form-data; boundary=b;charset={charset}",
    ):
        response = client.post("/generate", content=body.encode(), headers={"content-type": kind})
        assert "Unknown class" in refusal(response)
        response = client.post(
            "/generate", content=body.replace("ö", "o").encode(), headers={"content-type": kind}
        )
        assert response.json()["parameters"]["seed"] == 7


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("separator", ["", " ", "\n"])
def test_a_body_of_very_many_values_is_not_parsed(client: httpx.Client, path: str, separator: str) -> None:
    most = forms.MAX_VALUES // 2
    body = "{" + f",{separator}".join(f'"{index:x}"{separator}:1' for index in range(most + 1)) + "}"
    for content in (body, '{"seed": [' + f"1,{separator}" * 2 * most + "1]}"):
        response = client.post(path, content=content.encode(), headers={"content-type": "application/json"})
        assert f"more than {forms.MAX_VALUES}" in refusal(response)
    few = body[: body.rindex(",")] + "}"
    response = client.post(path, content=few.encode(), headers={"content-type": "application/json"})
    assert "Extra inputs" in refusal(response)
    assert len(response.json()["errors"]) <= 20


TEXTS = {
    "int": ["1_0", "1.0", "1e1", "0x1", "１"],
    "float": ["1_0", "0_0.5", "１", "nan", "inf"],
}
"""What Python takes for a number, and no other program."""
NUMBERS = {
    "int": ["n", "num_inference_steps", "preview_every", "scale", "seed"],
    "float": ["eta", "guidance_scale", "guidance_sigma_min", "classifier_scale", "deadline_s"],
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in NUMBERS for field in NUMBERS[kind]])
def test_a_number_in_a_query_or_a_form_is_one_as_in_json(client: httpx.Client, kind: str, field: str) -> None:
    for text in TEXTS[kind]:
        for response in (
            client.get("/generate", params={field: text}),
            client.post("/generate", files={field: (None, text)}),
        ):
            assert field in refusal(response), (text, response.text)


def test_numbers_in_a_query_and_a_form_are_taken(client: httpx.Client) -> None:
    fields = {"n": "2", "num_inference_steps": "2", "sampler": "ddim", "eta": "5e-1", "seed": " 7 "}
    for response in (
        client.get("/generate", params=fields, headers={"accept": "application/json"}),
        client.post("/generate", files={name: (None, value) for name, value in fields.items()}),
    ):
        assert response.status_code == 200, response.text
    assert response.json()["parameters"]["eta"] == 0.5
    assert response.json()["parameters"]["seed"] == 7
    seeds = client.get("/generate", params={"seed": ["1", "2"], "num_inference_steps": 1})
    assert seeds.status_code == 200
    assert "seed" in refusal(client.get("/generate", params={"seed": ["1", "2_0"]}))


def test_numbers_of_the_other_models_are_read_in_the_same_way(client: httpx.Client) -> None:
    """Every field of every route whose body may be a form, so that none is forgotten."""
    for route, sent in FORMS.items():
        schema = client.get("/openapi.json").json()["paths"][route]["post"]["requestBody"]["content"]
        fields = schema["multipart/form-data"]["schema"]["properties"]
        whole = [
            name
            for name, each in fields.items()
            if '"integer"' in json.dumps(each) and '"string"' not in json.dumps(each)
        ]
        assert whole
        for name in whole:
            files = [*sent, (name, (None, "1_0"))]
            assert name in client.post(route, files=files).text, (route, name)
