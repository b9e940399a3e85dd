"""OpenAI's official clients for Python and Node, unmodified, against a real server."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from tests.service.fakes import PATIENCE_S, SIZE, FakeDenoiser
from tests.service.live import Serve, Threaded, serving
from tests.service.tasks.test_openai import mask
from tests.service.tasks.test_uploads import file, noise

NODE = Path(__file__).parent.parent.parent / "node"
KEY = "secret"
GREY = noise(SIZE, SIZE)
IMAGE = file(Image.fromarray(GREY))
FAILS = 13
"""A seed whose images come out not finite."""
FEW: dict[str, Any] = {"seed": 7, "num_inference_steps": 3}
ROUTE = "/v1/images/generations"


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    servers = serving()
    yield next(servers)(FakeDenoiser(gives_nan={FAILS}), api_keys=KEY)
    next(servers, None)


def client_of(server: Threaded, **options: Any) -> OpenAI:
    # No certificates on loopback, whose loading is most of a client's cost.
    http = httpx2.Client(verify=False, timeout=PATIENCE_S)
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http, **options)


@pytest.fixture
def client(server: Threaded) -> Iterator[OpenAI]:
    with client_of(server) as made:
        yield made


def attempts(server: Threaded, outcome: str) -> float:
    return server.metric("ddpm_requests_total", route=ROUTE, outcome=outcome)


def pixels(text: str | None) -> Any:
    assert text is not None
    return np.asarray(Image.open(BytesIO(base64.b64decode(text))))


# ── Python ─────────────────────────────────────────────────────────────────────────────────────


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError, match=model.id):
        client.models.retrieve("zebra")


def test_generate(client: OpenAI) -> None:
    made = client.images.generate(model="gpt-image-1", prompt="two dogs", n=2, size="16x16", extra_body=FEW)
    assert made.data is not None
    assert [image.revised_prompt for image in made.data] == ["dog", "dog"]
    assert {pixels(image.b64_json).shape for image in made.data} == {(16, 16)}
    assert made._request_id
    assert (made.size, made.background, made.output_format) == ("16x16", "opaque", "png")
    assert made.usage is not None
    assert made.usage.total_tokens == 0


def test_a_data_url(client: OpenAI) -> None:
    made = client.images.generate(prompt="a dog", response_format="url", output_format="jpeg", extra_body=FEW)
    assert made.data is not None
    assert str(made.data[0].url).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("pictures", [IMAGE, [IMAGE]], ids=["one", "a list"])
def test_edit(client: OpenAI, pictures: Any) -> None:
    made = client.images.edit(
        image=pictures, mask=mask(255, 255, 255, 255), prompt="a cat", n=2, extra_body=FEW
    )
    assert made.data is not None
    assert len(made.data) == 2
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.edit(image=[IMAGE, IMAGE], prompt="a cat")
    assert refused.value.param == "image"


def test_stream(client: OpenAI) -> None:
    with client.images.generate(prompt="a dog", n=2, stream=True, partial_images=2, extra_body=FEW) as stream:
        events = list(stream)
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert completed == events[-2:]
    assert [pixels(event.b64_json).shape for event in completed] == [(SIZE, SIZE)] * 2
    assert len(events) <= 6
    with client.images.edit(image=IMAGE, prompt="a dog", stream=True, extra_body=FEW) as edits:
        assert [event.type for event in edits] == ["image_edit.completed"]


def test_the_asynchronous_client(server: Threaded) -> None:
    async def calls() -> tuple[Any, list[Any], Any]:
        http = httpx2.AsyncClient(verify=False, timeout=PATIENCE_S)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http) as client:
            made = await client.images.generate(prompt="a dog", extra_body=FEW)
            stream = await client.images.generate(prompt="a dog", stream=True, extra_body=FEW)
            events = [event async for event in stream]
            edited = await client.images.edit(image=IMAGE, prompt="a dog", extra_body=FEW)
            return made, events, edited

    made, events, edited = asyncio.run(calls())
    assert events[-1].b64_json == made.data[0].b64_json
    assert edited.data[0].b64_json


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"prompt": "a zebra"}, openai.BadRequestError, "prompt"),
        ({"prompt": "a dog", "size": "9x9"}, openai.BadRequestError, "size"),
        ({"prompt": "a dog", "extra_body": {**FEW, "seed": FAILS}}, openai.InternalServerError, None),
    ],
    ids=["an unknown class", "an impossible size", "not finite"],
)
def test_an_error_that_another_try_meets_again_is_tried_once(
    server: Threaded, client: OpenAI, fields: Any, kind: type[openai.APIStatusError], param: str | None
) -> None:
    before = attempts(server, "4xx") + attempts(server, "5xx")
    with pytest.raises(kind) as failed:
        client.images.generate(**fields)
    assert failed.value.param == param
    assert failed.value.code == ("non_finite" if param is None else "invalid_request")
    assert failed.value.request_id
    assert attempts(server, "4xx") + attempts(server, "5xx") == before + 1


def test_a_wrong_key(server: Threaded) -> None:
    with client_of(server) as client, pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_failure_in_a_stream_raises(client: OpenAI) -> None:
    with (
        pytest.raises(openai.APIError, match="NaN") as failed,
        client.images.generate(prompt="a dog", stream=True, extra_body={**FEW, "seed": FAILS}) as stream,
    ):
        list(stream)
    assert failed.value.code == "non_finite"


def test_a_missed_deadline_is_not_tried_again(serve: Serve) -> None:
    server = serve(deadline_s=1e-6)
    with client_of(server) as client, pytest.raises(openai.InternalServerError) as failed:
        client.images.generate(prompt="a dog")
    assert failed.value.status_code == 504
    assert attempts(server, "5xx") == 1


def test_a_full_queue_is_tried_again_when_it_says(serve: Serve) -> None:
    server = serve(max_queue=1)
    server.gate.shut()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        server.gate.open()  # by then there is room
        first.result()

    with ThreadPoolExecutor(1) as pool, client_of(server) as client:
        first = pool.submit(server.client.post, "/generate", json=FEW)
        server.gate.wait_for_arrival(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openai._base_client.time.sleep", sleep)
            made = client.images.generate(prompt="a dog", extra_body=FEW)
    assert made.data
    assert waits == [1.0]  # the Retry-After of the refusal, and not the client's own half second
    assert (attempts(server, "4xx"), attempts(server, "2xx")) == (1, 1)


# ── Node ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(
    not (shutil.which("node") and (NODE / "node_modules" / "openai").is_dir()),
    reason="needs node and `npm ci --prefix tests/node`",
)
def test_the_node_client(server: Threaded, tmp_path: Path) -> None:
    picture, hole = tmp_path / "picture.png", tmp_path / "mask.png"
    picture.write_bytes(IMAGE)
    hole.write_bytes(mask(0, 0, 0, 255))
    before = attempts(server, "5xx")
    arguments = ["node", "images.mjs", f"{server.url}/v1", KEY, str(picture), str(hole)]
    ran = subprocess.run(arguments, cwd=NODE, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["models"] == ["tiny"]
    assert found["model"] == "tiny"
    assert [image["revised_prompt"] for image in found["generated"]] == ["dog", "dog"]
    assert pixels(found["generated"][0]["b64_json"]).shape == (64, 64)
    assert found["requestId"]
    assert pixels(found["edited"]).shape == (SIZE, SIZE)
    assert found["events"][-1]["type"] == "image_generation.completed"
    assert {event["type"] for event in found["events"][:-1]} <= {"image_generation.partial_image"}
    refused = {"code": "invalid_request", "name": "BadRequestError", "param": "prompt", "status": 400}
    assert found["unknownPrompt"] == refused
    assert found["unknownModel"]["name"] == "NotFoundError"
    assert found["wrongKey"]["name"] == "AuthenticationError"
    assert found["failedInStream"]["code"] == "non_finite"
    assert attempts(server, "5xx") == before
