"""What our own answers contain."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import numpy as np
from PIL import Image

from service.engine.jobs import SnapshotKind
from service.engine.messages import Finished, Picture, Preview, Queued
from service.http.bodies import ImageBodies, queued_body
from tests.service.tasks.test_sampling import prepare


def picture(index: int, kind: SnapshotKind = "xt") -> Picture:
    return Picture(index, 40 + index, kind, np.full((8, 8, 1), index, np.uint8))


def test_the_answer_to_generate() -> None:
    made = prepare({"n": 2, "seed": 40, "class_label": 0})
    body = ImageBodies(made).completed(Finished(made.spec.id, (picture(0), picture(1)), 0.25, 1.5), "tiny")
    assert body.keys() == {"id", "model", "images", "parameters", "timings"}
    assert (body["id"], body["model"]) == (made.spec.id, "tiny")
    assert body["timings"] == {"queue_s": 0.25, "run_s": 1.5, "total_s": 1.75}
    assert [(image["index"], image["seed"]) for image in body["images"]] == [(0, 40), (1, 41)]
    image = Image.open(BytesIO(base64.b64decode(body["images"][1]["b64_json"])))
    assert json.loads(image.info["parameters"]) == {**made.parameters, "n": 1, "seed": 41, "model": "tiny"}
    json.dumps(body, allow_nan=False)


def test_pictures_are_enlarged_in_answers_and_previews() -> None:
    made = prepare({"scale": 3})
    completed = ImageBodies(made).completed(Finished(made.spec.id, (picture(0),), 0.0, 0.0), "tiny")
    preview = ImageBodies(made).preview(Preview(made.spec.id, 1, 50, 980, 1.0, (picture(0, "x0"),)))
    for body in (completed, preview):
        image = Image.open(BytesIO(base64.b64decode(body["images"][0]["b64_json"])))
        assert image.size == (24, 24)


def test_the_events_of_a_stream() -> None:
    made = prepare({"seed": 40, "output_format": "webp"})
    assert queued_body(Queued(made.spec.id, 3, 1.23456), made) == {
        "id": made.spec.id,
        "position": 3,
        "eta_s": 1.235,
        "seed": 40,
    }
    body = ImageBodies(made).preview(
        Preview(made.spec.id, 4, 50, 920, 1.5, (picture(0, "x0"), picture(0, "xt")))
    )
    assert {key: body[key] for key in ("step", "steps", "timestep", "eta_s")} == {
        "step": 4,
        "steps": 50,
        "timestep": 920,
        "eta_s": 1.5,
    }
    assert [(image["kind"], image["media_type"]) for image in body["images"]] == [
        ("x0", "image/webp"),
        ("xt", "image/webp"),
    ]
