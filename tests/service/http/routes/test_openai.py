"""OpenAI's Images API over real sockets: forms, streams, models, and errors of every kind in its shape."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.engine.warmup import warm_up
from service.http.middleware import MAX_BODY_BYTES, MAX_UPLOAD_BYTES
from tests.service.fakes import SIZE, FakeDenoiser, tiny_model
from tests.service.http.test_problems import BODIES, MARK
from tests.service.live import Serve, Threaded, serving
from tests.service.tasks.test_openai import mask
from tests.service.tasks.test_uploads import file, noise

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
GREY = noise(SIZE, SIZE)
IMAGE = file(Image.fromarray(GREY))
FEW = {"seed": 7, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def real() -> Iterator[Threaded]:
    """A server with the tiny network itself."""
    servers = serving()
    yield next(servers)(
        warm=lambda config: warm_up(tiny_model(), config), runtime="torch", device="cpu", max_batch=4
    ).ready()
    next(servers, None)


def error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error, checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert MARK not in response.text
    (found,) = response.json().values()
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["code"] == code
    assert found["message"]
    return dict(found)


def pixels(datum: dict[str, Any]) -> Any:
    return np.asarray(Image.open(BytesIO(base64.b64decode(datum["b64_json"]))))


def sent(response: httpx.Response) -> list[Any]:
    """The data of a stream's events; its end must have been said."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# ── What is made ───────────────────────────────────────────────────────────────────────────────


def test_a_generation_is_the_image_of_our_own_route(real: Threaded) -> None:
    ours = real.client.post("/generate", json={"n": 2, "class_label": "dog", **FEW}).json()["images"]
    answer = real.client.post(GENERATIONS, json={"prompt": "two dogs, please", "n": 2, **FEW})
    body = answer.json()
    assert answer.headers["x-job-id"]
    assert [datum["revised_prompt"] for datum in body["data"]] == ["dog", "dog"]
    assert [datum["b64_json"] for datum in body["data"]] == [image["b64_json"] for image in ours]


def test_a_form_is_as_good_as_json(real: Threaded) -> None:
    asked = {"prompt": "a dog", "image": base64.b64encode(IMAGE).decode(), "strength": 0.5, **FEW}
    form = {"prompt": "a dog", "strength": "0.5", "n": "1", **FEW}
    answers = [
        real.client.post(EDITS, json=asked),
        real.client.post(EDITS, data=form, files={"image[]": IMAGE}),
    ]
    images = [pixels(answer.json()["data"][0]) for answer in answers]
    np.testing.assert_array_equal(*images)
    assert (images[0] != GREY).any()


def test_an_edit_changes_what_the_mask_shows_transparent(real: Threaded) -> None:
    files = {"image": IMAGE, "mask": mask(255, 255, 255, 255)}
    answer = real.client.post(EDITS, data={"prompt": "a cat", "size": "16x16", **FEW}, files=files)
    made = pixels(answer.json()["data"][0])[::2, ::2]
    np.testing.assert_array_equal(made[:, : SIZE // 2], GREY[:, : SIZE // 2])
    assert (made[:, SIZE // 2 :] != GREY[:, SIZE // 2 :]).any()


def test_partial_images_are_x0_predictions(serve: Serve) -> None:
    """After a quarter, half and three quarters of the steps; each is waited for before the next steps."""
    server = serve()
    server.gate.shut()
    asked = {"prompt": "a dog", "seed": 7, "num_inference_steps": 8}
    found: list[Any] = []
    with server.client.stream(
        "POST", GENERATIONS, json={**asked, "stream": True, "partial_images": 3}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        server.gate.allow(2)
        for line in response.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line.removeprefix("data: ")))
                server.gate.allow(2)
    assert [each["type"].partition(".")[2] for each in found] == ["partial_image"] * 3 + ["completed"]
    for partial, step in zip(found, (2, 4, 6), strict=False):
        x = np.frombuffer(server.denoiser.seen[7, step - 1], np.float32).reshape(SIZE, SIZE).clip(-1, 1)
        np.testing.assert_allclose(pixels(partial), (x + 1) * 127.5, atol=1)
    server.gate.open()
    (alone,) = server.client.post(GENERATIONS, json=asked).json()["data"]
    assert found[-1]["b64_json"] == alone["b64_json"]


def test_a_stream_of_several_images_completes_each(real: Threaded) -> None:
    asked = {"prompt": "a cat", "n": 3, "stream": True, **FEW}
    with real.client.stream("POST", GENERATIONS, json=asked) as response:
        found = sent(response)
    assert [(each["type"], each["index"], each["seed"]) for each in found] == [
        ("image_generation.completed", index, 7 + index) for index in range(3)
    ]


def test_a_stream_is_resumed_in_its_own_form(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    asked = {"prompt": "a dog", "stream": True, "partial_images": 1, **FEW}
    with server.client.stream("POST", GENERATIONS, json=asked) as response:
        server.gate.allow(2)  # of three: one is shown
        last = next(line for line in response.iter_lines() if line.startswith("id: "))
    server.gate.open()
    with server.client.stream(
        "GET", "/stream", headers={"last-event-id": last.removeprefix("id: ")}
    ) as response:
        (completed,) = sent(response)
    assert completed["type"] == "image_generation.completed"
    assert len(server.denoiser.starts) == 1


def test_a_stream_can_be_asked_for_in_a_form(real: Threaded) -> None:
    data = {"prompt": "a cat", "stream": "true", "partial_images": "0", "n": "1", **FEW}
    with real.client.stream("POST", EDITS, data=data, files={"image": IMAGE}) as response:
        (completed,) = sent(response)
    assert completed["type"] == "image_edit.completed"


# ── Models ─────────────────────────────────────────────────────────────────────────────────────


def test_the_model_is_listed(real: Threaded) -> None:
    (model,) = real.client.get("/v1/models").json()["data"]
    assert model.keys() == {"id", "object", "created", "owned_by"}
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert real.client.get("/v1/models/tiny").json() == model
    assert "tiny" in error(real.client.get(f"/v1/models/{MARK}"), 404, "not_found")["message"]


# ── Errors ─────────────────────────────────────────────────────────────────────────────────────


def test_what_is_invalid_is_a_400_that_echoes_nothing(real: Threaded) -> None:
    headers = {"content-type": "application/json"}
    for name, body in BODIES.items():
        if "field" not in name and "name" not in name:
            found = error(
                real.client.post(GENERATIONS, content=body, headers=headers), 400, "invalid_request"
            )
            assert found["type"] == "invalid_request_error", name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": f"a {MARK}"}, "prompt"),
        ({"prompt": "a dog", "n": 0}, "n"),
        ({"prompt": "a dog", "n": 65}, "n"),
        ({"prompt": "a dog", "n": "1"}, "n"),
        ({"prompt": "a dog", "size": "large"}, "size"),
        ({"prompt": "a dog", "size": "9x9"}, "size"),
        ({"prompt": "a dog", "partial_images": 4}, "partial_images"),
        ({"prompt": "a dog", "output_format": "gif"}, "output_format"),
        ({"prompt": "a dog", "num_inference_steps": 101}, "num_inference_steps"),
        ({"prompt": "", "guidance_scale": 3.0}, "guidance_scale"),
        ({"prompt": "a dog", "background": "transparent"}, "background"),
    ],
    ids=str,
)
def test_the_param_is_named(real: Threaded, fields: dict[str, Any], param: str) -> None:
    assert error(real.client.post(GENERATIONS, json=fields), 400, "invalid_request")["param"] == param


def test_an_edit_needs_a_picture(real: Threaded) -> None:
    found = error(real.client.post(EDITS, json={"prompt": "a dog"}), 400, "invalid_request")
    assert found["param"] == "image"
    files = [("image[]", IMAGE), ("image[]", IMAGE)]
    found = error(real.client.post(EDITS, data={"prompt": "a dog"}, files=files), 400, "invalid_request")
    assert found["param"] == "image"


def test_bodies_are_limited(real: Threaded) -> None:
    for path, limit in ((GENERATIONS, MAX_BODY_BYTES), (EDITS, MAX_UPLOAD_BYTES)):
        content = b'{"prompt": "' + b"x" * limit + b'"}'
        response = real.client.post(path, content=content, headers={"content-type": "application/json"})
        error(response, 413, "content_too_large")


def test_no_such_route_or_method(real: Threaded) -> None:
    error(real.client.get("/v1"), 404, "not_found")
    error(real.client.post("/v1/chat/completions", json={}), 404, "not_found")
    error(real.client.get(GENERATIONS), 405, "method_not_allowed")
    assert real.client.get("/v2").headers["content-type"] == "application/problem+json"


def test_a_key_is_needed_where_there_are_keys(serve: Serve) -> None:
    client = serve(api_keys="secret").client
    for path in (GENERATIONS, EDITS):
        found = error(client.post(path, json={"prompt": "a dog"}), 401, "unauthorized")
        assert found["type"] == "authentication_error"
    error(client.get("/v1/models"), 401, "unauthorized")
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_a_full_queue_is_a_429_before_the_stream_begins(serve: Serve) -> None:
    server = serve(max_queue=2)
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.client.post, "/generate", json={"n": 2, **FEW})
        server.gate.wait_for_arrival(1)
        for stream in (False, True):
            refused = server.client.post(GENERATIONS, json={"prompt": "a dog", "stream": stream})
            assert error(refused, 429, "queue_full")["type"] == "rate_limit_error"
            assert 0 < int(refused.headers["retry-after"]) <= 120
            assert "x-should-retry" not in refused.headers
        server.gate.open()
        assert waiting.result().status_code == 200


def test_errors_that_another_try_meets_again_say_so(serve: Serve) -> None:
    server = serve(FakeDenoiser(gives_nan={7}))
    failed = server.client.post(GENERATIONS, json={"prompt": "a dog", **FEW})
    error(failed, 500, "non_finite")
    assert failed.headers["x-should-retry"] == "false"
    late = serve(deadline_s=1e-6).client.post(GENERATIONS, json={"prompt": "a dog", **FEW})
    error(late, 504, "deadline_exceeded")
    assert late.headers["x-should-retry"] == "false"


def test_a_failure_in_a_stream_is_its_last_event(serve: Serve) -> None:
    server = serve(FakeDenoiser(gives_nan={7}))
    with server.client.stream(
        "POST", GENERATIONS, json={"prompt": "a dog", "stream": True, **FEW}
    ) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "non_finite"
