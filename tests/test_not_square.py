"""A trained model whose pictures are not square, from its folder to pictures, edits and scores over HTTP.

tests/weights/digit-pairs shows the digit d on the left and 9 − d on the right, in 16×32 pixels (height ×
width). What a sample shows is told by the mean digits that lie beside the weights.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.test_end_to_end import generate, pixels, serving

FOLDER = Path(__file__).parent / "weights" / "digit-pairs"
SIDE = 16


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving("--model", str(FOLDER)) as connected:
        yield connected


def kinds() -> NDArray[np.float64]:
    """The mean digits 0 to 9 [10, 256], each with mean 0 and length 1."""
    means = np.asarray(Image.open(FOLDER / "means.png")).astype(np.float64)
    return normalised(means.reshape(SIDE, 10, SIDE).swapaxes(0, 1))


def normalised(pictures: NDArray[Any]) -> NDArray[np.float64]:
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    flat -= flat.mean(1, keepdims=True)
    unit: NDArray[np.float64] = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    return unit


def shown(pictures: NDArray[Any]) -> NDArray[np.int64]:
    """Which digit each picture [N, 16, 16] is most like."""
    return np.asarray((normalised(pictures) @ kinds().T).argmax(1), np.int64)


def png(picture: NDArray[Any]) -> str:
    buffer = BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def samples(client: httpx.Client) -> NDArray[np.int64]:
    """Four of each class [40, 16, 32], class by class."""
    labels = [label for label in range(10) for _ in range(4)]
    images = generate(client, class_label=labels, n=len(labels), seed=0, num_inference_steps=10)
    return np.stack([pixels(image) for image in images])


def test_the_left_and_the_right_half_show_the_digits_of_the_class(samples: NDArray[np.int64]) -> None:
    assert samples.shape == (40, SIDE, 2 * SIDE)
    wanted = np.repeat(np.arange(10), 4)
    left, right = shown(samples[:, :, :SIDE]), shown(samples[:, :, SIDE:])
    assert (left == wanted).mean() >= 0.75
    assert (right == 9 - wanted).mean() >= 0.75
    assert (right == wanted).mean() < 0.2  # the halves are not exchanged, nor the picture turned


def test_a_half_is_kept_and_the_other_made_anew(client: httpx.Client, samples: NDArray[np.int64]) -> None:
    given = samples[3 * 4]  # "3 and 6"
    mask = np.zeros((SIDE, 2 * SIDE))
    mask[:, SIDE:] = 255
    request = {"image": png(given), "mask": png(mask), "class_label": "3 and 6", "n": 8, "seed": 100}
    response = client.post("/edit", json=request | {"num_inference_steps": 10})
    assert response.status_code == 200, response.text
    edits = np.stack([pixels(image["b64_json"]) for image in response.json()["images"]])
    assert (edits[:, :, :SIDE] == given[:, :SIDE]).all()
    assert len(np.unique(edits[:, :, SIDE:], axis=0)) == 8
    assert (shown(edits[:, :, SIDE:]) == 6).sum() >= 6


def test_the_right_class_takes_fewer_bits(client: httpx.Client, samples: NDArray[np.int64]) -> None:
    def bits(digit: int, label: int) -> float:
        request = {"images": [png(samples[4 * digit])], "class_label": label, "terms": 100, "seed": 0}
        response = client.post("/score", json=request)
        assert response.status_code == 200, response.text
        return float(response.json()["scores"][0]["bits_per_dim"])

    for digit, other in ((1, 8), (3, 6)):
        assert bits(digit, digit) < bits(digit, other)


def test_the_shape_is_said(client: httpx.Client) -> None:
    info = client.get("/info").json()["model"]
    assert (info["height"], info["width"], info["channels"]) == (SIDE, 2 * SIDE, 1)
