"""A student's folder, served: the pictures are those of its own few steps."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import TorchRuntime
from model.samplers import build_plan
from service.engine.messages import Pixels
from service.engine.warmup import warm_up
from tests.service.http.test_problems import problem
from tests.service.live import Threaded, serving, sse
from tests.service.tasks.test_distilled import distilled, picture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("models") / "student"
    checkpoint.save(folder, distilled())
    return checkpoint.load(folder)


@pytest.fixture(scope="module")
def served(model: Checkpoint) -> Iterator[Threaded]:
    servers = serving()
    limits: dict[str, Any] = {"runtime": "torch", "device": "cpu", "max_batch": 4}
    yield next(servers)(warm=lambda config: warm_up(model, config), **limits).ready()
    next(servers, None)


def images(answer: Any) -> list[Pixels]:
    assert answer.status_code == 200, answer.text
    return [
        np.asarray(Image.open(BytesIO(base64.b64decode(image["b64_json"]))))
        for image in answer.json()["images"]
    ]


def test_a_request_that_says_nothing_takes_the_students_steps(served: Threaded, model: Checkpoint) -> None:
    answer = served.client.post("/generate", json={"seed": 7, "n": 2, "class_label": "dog"})
    plan = build_plan(model.schedule, "ddim", 4)
    denoiser = Denoiser.of(model, TorchRuntime(model))
    expected = to_pixels(generate(denoiser, [Chain(plan, 7, 1), Chain(plan, 8, 1)]))
    for found, wanted in zip(images(answer), expected, strict=True):
        assert np.abs(found.astype(int) - wanted[0]).max() <= 1
    assert answer.json()["parameters"]["num_inference_steps"] == 4


def test_every_step_of_a_stream_is_shown(served: Threaded) -> None:
    with served.client.stream("GET", "/stream?seed=1&class_label=dog&preview_every=1") as response:
        events = list(sse(response))
    assert [event.name for event in events] == ["queued", *["preview"] * 4, "completed"]
    assert [event.data["step"] for event in events if event.name == "preview"] == [1, 2, 3, 4]


def test_what_needs_the_teacher_is_refused(served: Threaded) -> None:
    encoded = base64.b64encode(picture()).decode()
    refused = problem(served.client.post("/score", json={"images": [encoded]}), 422, "invalid_request")
    assert "distilled" in str(refused["detail"])
    for path, fields in (
        ("/generate", {"class_label": "dog", "guidance_scale": 4}),
        ("/generate", {"num_inference_steps": 20}),
        ("/interpolate", {"images": [encoded, encoded], "method": "inversion"}),
    ):
        refused = problem(served.client.post(path, json=fields), 422, "invalid_request")
        assert "distilled" in str(refused), path


def test_an_edit_and_a_path_run_on_its_own_steps(served: Threaded) -> None:
    encoded = base64.b64encode(picture()).decode()
    edited = served.client.post("/edit", json={"image": encoded, "strength": 0.5, "seed": 1})
    assert len(images(edited)) == 1
    assert edited.json()["parameters"]["num_inference_steps"] == 4
    path = served.client.post("/interpolate", json={"seeds": [1, 2], "points": 3})
    assert len(images(path)) == 3


def test_info_follows_the_folder(served: Threaded) -> None:
    info = served.client.get("/info").json()
    assert info["model"]["distilled_guidance"] == 2.0
    assert info["defaults"]["num_inference_steps"] == 4
    assert info["samplers"] == ["ddim"]
