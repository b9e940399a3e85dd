"""Samples of any number of channels, higher than wide or wider than high: every route, by a real network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.sheets import GAP, channel_sheet
from service.engine.messages import Pixels
from service.engine.warmup import warm_up
from service.tasks.images import MODES
from tests.service.fakes import tiny_model
from tests.service.http.test_problems import problem
from tests.service.live import Threaded, serving, sse
from tests.service.tasks.test_arrays import saved
from tests.service.tasks.test_uploads import file, noise

SHAPES = [(3, 10, 4), (4, 4, 10), (5, 4, 10)]
"""(C, H, W). No two sides are alike, so that none can take the place of another."""
FEW: dict[str, Any] = {"seed": 7, "num_inference_steps": 4}


class Served(Threaded):
    """A server, and the shape of its samples as its clients see it: (H, W, C)."""

    shape: tuple[int, int, int]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def real(request: pytest.FixtureRequest) -> Iterator[Served]:
    servers = serving()
    channels, height, width = request.param
    model = tiny_model(shape=request.param)
    limits: dict[str, Any] = {"runtime": "torch", "device": "cpu", "max_batch": 4, "max_images": 8}
    server: Any = next(servers)(warm=lambda config: warm_up(model, config), **limits).ready()
    server.shape = height, width, channels
    yield server
    next(servers, None)


def post(server: Threaded, path: str, accept: str = "application/json", **fields: Any) -> httpx.Response:
    response = server.client.post(path, json=fields, headers={"accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == accept
    return response


def array(data: bytes) -> Pixels:
    found: Pixels = np.load(BytesIO(data), allow_pickle=False)
    assert found.dtype == np.uint8
    return found


def picture(data: bytes) -> Pixels:
    """[H, W, C] of a file, in the mode in which it is stored."""
    found = np.asarray(Image.open(BytesIO(data)))
    return found[..., None] if found.ndim == 2 else found


def generated(server: Threaded, path: str = "/generate", **fields: Any) -> Pixels:
    """[N, H, W, C] of a JSON answer."""
    body = post(server, path, output_format="npy", **fields).json()
    assert {image["media_type"] for image in body["images"]} == {"application/x-npy"}
    return np.stack([array(base64.b64decode(image["b64_json"])) for image in body["images"]])


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uploaded(server: Served, seed: int = 0) -> tuple[Pixels, str]:
    """A sample, and a file of it: a picture where it is one."""
    height, width, channels = server.shape
    pixels = np.roll(noise(height, width, channels), seed, 0)
    if channels not in MODES:
        return pixels, text(saved(pixels))
    return pixels, text(file(Image.fromarray(pixels[..., 0] if channels == 1 else pixels)))


def seen(pixels: Pixels) -> Pixels:
    """What a picture file shows of an array."""
    return pixels if pixels.shape[-1] in MODES else channel_sheet(pixels)


def row(pictures: NDArray[np.uint8]) -> Pixels:
    gap = np.full((pictures.shape[1], GAP, pictures.shape[3]), 255, np.uint8)
    parts = [part for each in pictures for part in (each, gap)]
    return np.concatenate(parts[:-1], axis=1)


def test_an_array_is_what_the_png_shows(real: Served) -> None:
    arrays = generated(real, n=2, **FEW)
    assert arrays.shape == (2, *real.shape)
    assert (arrays[0] != arrays[1]).any()
    body = post(real, "/generate", n=2, output_format="png", **FEW).json()
    for image, pixels in zip(body["images"], arrays, strict=True):
        np.testing.assert_array_equal(picture(base64.b64decode(image["b64_json"])), seen(pixels))
    alone = array(post(real, "/generate", "application/x-npy", **FEW).content)
    np.testing.assert_array_equal(alone, arrays[0])
    together = array(post(real, "/generate", "application/x-npy", n=2, **FEW).content)
    np.testing.assert_array_equal(together, arrays)
    large = array(post(real, "/generate", "application/x-npy", n=2, scale=3, **FEW).content)
    np.testing.assert_array_equal(large, arrays.repeat(3, 1).repeat(3, 2))


def test_a_contact_sheet_and_a_webp(real: Served) -> None:
    arrays = generated(real, n=2, **FEW)
    for kind in ("image/png", "image/webp"):
        sheet = picture(post(real, "/generate", kind, n=2, **FEW).content)
        wanted = seen(row(arrays))
        np.testing.assert_array_equal(sheet[..., : wanted.shape[-1]], wanted)
    large = picture(post(real, "/generate", "image/png", scale=2, **FEW).content)
    np.testing.assert_array_equal(large, seen(arrays[0]).repeat(2, 0).repeat(2, 1))


def test_a_jpeg_unless_it_is_transparent(real: Served) -> None:
    channels = real.shape[2]
    if channels != 4:
        shown = picture(post(real, "/generate", "image/jpeg", **FEW).content)
        assert shown.shape[:2] == seen(generated(real, **FEW)[0]).shape[:2]
        return
    refused = real.client.post("/generate", json=FEW, headers={"accept": "image/jpeg"})
    assert "no transparency" in problem(refused, 406, "not_acceptable")["detail"]  # type: ignore[operator]
    refused = real.client.post("/generate", json={"output_format": "jpeg"})
    found = problem(refused, 422, "invalid_request")
    assert found["errors"] == [{"field": "output_format", "message": found["detail"]}]


def test_what_is_known_comes_back_in_its_place(real: Served) -> None:
    height, width, _ = real.shape
    pixels, data = uploaded(real)
    mask = np.zeros((height, width), np.uint8)
    mask[1:, 2:] = 255  # neither axis can be taken for the other
    edited = generated(real, "/edit", image=data, mask=text(file(Image.fromarray(mask))), **FEW)[0]
    np.testing.assert_array_equal(edited[mask == 0], pixels[mask == 0])
    assert (edited[mask > 0] != pixels[mask > 0]).any()
    near = generated(real, "/edit", image=data, strength=0.01, seed=7, num_inference_steps=100)[0]
    assert np.abs(near.astype(int) - pixels).mean() < 10


def test_a_way_ends_at_its_pictures(real: Served) -> None:
    (first, a), (last, b) = uploaded(real), uploaded(real, 1)
    near = {"strength": 0.01, "num_inference_steps": 100, "seed": 7}
    found = array(post(real, "/interpolate", "application/x-npy", images=[a, b], points=3, **near).content)
    assert found.shape == (3, *real.shape)
    for made, wanted in ((found[0], first), (found[2], last)):
        assert np.abs(made.astype(int) - wanted).mean() < 10
    sheet = picture(post(real, "/interpolate", "image/png", images=[a, b], points=3, **near).content)
    np.testing.assert_array_equal(sheet, seen(row(found)))


def test_scores_and_their_strip(real: Served) -> None:
    pixels, data = uploaded(real)
    scores = post(real, "/score", images=[data], terms=8, seed=1).json()["scores"]
    shown = scores[0]["guesses"]
    wanted = "application/x-npy" if real.shape[2] not in MODES else "image/png"
    assert {guess["media_type"] for guess in shown} == {wanted}
    strip = array(post(real, "/score", "application/x-npy", images=[data], terms=8, seed=1).content)
    assert strip.shape == (len(shown) + 1, *real.shape)
    np.testing.assert_array_equal(strip[-1], pixels)
    sheet = picture(post(real, "/score", "image/png", images=[data], terms=8, seed=1).content)
    np.testing.assert_array_equal(sheet, seen(row(strip)))


def test_a_stream_ends_with_the_image(real: Served) -> None:
    query = {**FEW, "preview": "both", "preview_every": "1", "output_format": "png"}
    with real.client.stream("GET", "/stream", params=query) as response:
        *previews, last = [event for event in sse(response) if event.name != "queued"]
    shown = [
        picture(base64.b64decode(image["b64_json"])) for each in previews for image in each.data["images"]
    ]
    assert len(shown) == 8
    final = picture(base64.b64decode(last.data["images"][0]["b64_json"]))
    np.testing.assert_array_equal(final, seen(generated(real, **FEW)[0]))
    assert {each.shape for each in shown} == {final.shape}


def test_info_says_what_to_expect(real: Served) -> None:
    info = real.client.get("/info").json()
    channels = real.shape[2]
    model = info["model"]
    assert (model["height"], model["width"], model["channels"]) == real.shape
    shown = seen(np.zeros(real.shape, np.uint8))
    assert model["picture"] == {"height": shown.shape[0], "width": shown.shape[1]}
    assert model["formats"][0] == info["defaults"]["output_format"]
    assert ("jpeg" in model["formats"]) == (channels != 4)
    body = post(real, "/generate", **FEW).json()
    assert body["parameters"]["output_format"] == info["defaults"]["output_format"]
    assert body["images"][0]["media_type"].endswith(info["defaults"]["output_format"])
    accepted = info["editing"]["pictures"]["formats"]
    assert accepted == (["png", "jpeg", "webp", "npy"] if channels in MODES else ["npy"])
