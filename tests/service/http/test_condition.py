"""A network that takes a picture beside x, served: what /edit answers is what it makes of that picture."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.chain import Chain, from_pixels
from model.condition import Part
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import TorchRuntime
from model.samplers import build_plan
from service.engine.messages import Pixels
from service.engine.warmup import warm_up
from tests.model.test_condition import conditioned
from tests.service.http.test_problems import problem
from tests.service.live import Threaded, serving
from tests.service.tasks.test_uploads import file, noise

FEW: dict[str, Any] = {"seed": 7, "num_inference_steps": 4, "class_label": "dog", "guidance_scale": 1}


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Threaded]:
    condition: tuple[Part, ...] = request.param
    servers = serving()
    limits: dict[str, Any] = {"runtime": "torch", "device": "cpu", "max_batch": 4}
    yield next(servers)(warm=lambda config: warm_up(conditioned(condition), config), **limits).ready()
    next(servers, None)


def picture(answer: Any) -> Pixels:
    (image,) = answer.json()["images"]
    found: Pixels = np.asarray(Image.open(BytesIO(base64.b64decode(image["b64_json"]))))
    return found


@pytest.mark.parametrize("served", [("image",)], indirect=True)
def test_a_picture_from_a_picture(served: Threaded) -> None:
    model, pixels = conditioned(), noise(8, 8)
    chain = Chain(build_plan(model.schedule, "dpmpp_2m", 4), 7, 1, condition=from_pixels(pixels[..., None]))
    (expected,) = to_pixels(generate(Denoiser.of(model, TorchRuntime(model)), [chain]))
    answer = served.client.post(
        "/edit", json={"image": base64.b64encode(file(Image.fromarray(pixels))).decode(), **FEW}
    )
    assert answer.status_code == 200, answer.text
    assert np.abs(picture(answer).astype(int) - expected[0]).max() <= 1
    assert served.client.get("/info").json()["model"]["condition"] == ["image"]
    refused = problem(served.client.post("/generate", json={}), 422, "invalid_request")
    assert "/edit" in str(refused["detail"])


@pytest.mark.parametrize("served", [("mask", "masked_image")], indirect=True)
def test_a_hole_is_filled_and_the_rest_is_kept(served: Threaded) -> None:
    pixels = noise(8, 8)
    hole = np.zeros((8, 8), np.uint8)
    hole[2:5, 3:7] = 255
    fields = {
        "image": base64.b64encode(file(Image.fromarray(pixels))).decode(),
        "mask": base64.b64encode(file(Image.fromarray(hole))).decode(),
        **FEW,
    }
    answer = served.client.post("/edit", json=fields)
    assert answer.status_code == 200, answer.text
    made = picture(answer)
    np.testing.assert_array_equal(made[hole == 0], pixels[hole == 0])
    assert (made[hole > 0] != pixels[hole > 0]).mean() > 0.5
