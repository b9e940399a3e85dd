"""Pictures survive their files, and carry what made them."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.sheets import contact_sheet, enlarge
from service.engine.messages import Pixels
from service.tasks.images import MEDIA_TYPES, ImageFormat, encode, encode_arrays, picture_size

PARAMETERS: dict[str, Any] = {"seed": 7, "sampler": "ddim", "class_label": "T-shirt/\u00e9\u4e2d"}
USER_COMMENT = (0x8769, 0x9286)


def picture(channels: int, size: int = 32) -> Pixels:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, channels))
    return noise.astype(np.uint8)


def smooth(channels: int, size: int = 32) -> Pixels:
    ramp = np.linspace(0, 255, size)
    return np.broadcast_to(((ramp[:, None] + ramp) / 2)[..., None], (size, size, channels)).astype(np.uint8)


def read(data: bytes) -> tuple[Image.Image, Pixels]:
    image = Image.open(BytesIO(data))
    image.load()
    return image, np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_lossless_formats_keep_every_pixel(image_format: ImageFormat, channels: int) -> None:
    pixels = picture(channels)
    image, found = read(encode(pixels, image_format, PARAMETERS))
    assert image.get_format_mimetype() == MEDIA_TYPES[image_format]  # type: ignore[attr-defined]
    found = found[..., None] if found.ndim == 2 else found
    assert (found[..., :channels] == pixels).all()


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_alpha_and_what_lies_beneath_it_are_kept(image_format: ImageFormat) -> None:
    pixels = picture(4)
    pixels[:9, :, 3] = 0
    image, found = read(encode(pixels, image_format, PARAMETERS))
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("channels", [2, 5, 6])
@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_what_is_no_picture_is_shown_channel_by_channel(image_format: ImageFormat, channels: int) -> None:
    pixels = picture(channels, 8)[:5]
    image, found = read(encode(pixels, image_format, PARAMETERS, scale=2))
    assert (image.height // 2, image.width // 2) == picture_size((channels, 5, 8))
    wanted = contact_sheet([pixels[..., [channel]] for channel in range(channels)])
    found = found.reshape(*found.shape[:2], -1)
    np.testing.assert_array_equal(found[::2, ::2, :1], wanted)


def test_an_array_is_a_picture_or_a_stack_of_them() -> None:
    pixels, other = picture(5, 8), 255 - picture(5, 8)
    alone = np.load(BytesIO(encode(pixels, "npy", PARAMETERS, scale=2)))
    np.testing.assert_array_equal(alone, enlarge(pixels, 2))
    together = np.load(BytesIO(encode_arrays([pixels, other])))
    np.testing.assert_array_equal(together, np.stack([pixels, other]))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_what_can_be_seen(channels: int) -> None:
    pixels = smooth(channels)
    image, found = read(encode(pixels, "jpeg"))
    assert image.format == "JPEG"
    assert np.abs(found.reshape(pixels.shape).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
def test_an_enlarged_pixel_is_a_square(channels: int) -> None:
    pixels = picture(channels, size=5)
    image, found = read(encode(pixels, "png", PARAMETERS, scale=4))
    assert image.size == (20, 20)
    assert json.loads(image.info["parameters"]) == PARAMETERS
    for y in range(20):
        for x in range(20):
            assert (found[y, x] == pixels[y // 4, x // 4]).all()


def test_what_is_not_enlarged_is_not_copied() -> None:
    pixels = picture(3)
    assert enlarge(pixels, 1) is pixels


def test_a_png_tells_its_parameters() -> None:
    image, _ = read(encode(picture(1), "png", PARAMETERS))
    assert json.loads(image.info["parameters"]) == PARAMETERS


def test_a_text_is_told_as_it_is() -> None:
    image, _ = read(encode(picture(1), "png", "Steps: 20, Größe: 8×8"))
    assert image.info["parameters"] == "Steps: 20, Größe: 8×8"


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_the_others_tell_them_in_their_exif(image_format: ImageFormat) -> None:
    image, _ = read(encode(picture(3), image_format, PARAMETERS))
    comment = image.getexif().get_ifd(USER_COMMENT[0])[USER_COMMENT[1]]
    assert comment.startswith(b"ASCII\0\0\0")
    assert json.loads(comment[8:]) == PARAMETERS


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_nothing_is_told_unasked(image_format: ImageFormat) -> None:
    image, _ = read(encode(picture(1), image_format))
    assert "parameters" not in image.info
    assert not image.getexif().get_ifd(USER_COMMENT[0])


@pytest.mark.parametrize("image_format", MEDIA_TYPES)
def test_the_same_input_gives_the_same_bytes(image_format: ImageFormat) -> None:
    backwards = dict(reversed(PARAMETERS.items()))
    assert encode(picture(3), image_format, PARAMETERS) == encode(picture(3), image_format, backwards)


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (9, 3, 3), (10, 4, 3)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_is_about_as_wide_as_high(count: int, columns: int, rows: int, channels: int) -> None:
    tiles = [np.full((8, 6, channels), i, np.uint8) for i in range(count)]
    sheet = contact_sheet(tiles, gap=2)
    assert sheet.shape == (rows * 10 - 2, columns * 8 - 2, channels)
    seen = np.zeros(sheet.shape[:2], bool)
    for i in range(count):
        place = np.s_[i // columns * 10 : i // columns * 10 + 8, i % columns * 8 : i % columns * 8 + 6]
        assert (sheet[place] == i).all()
        seen[place] = True
    assert (sheet[~seen] == 255).all()


def test_or_in_so_many_columns() -> None:
    tiles = [np.full((8, 6, 1), i, np.uint8) for i in range(5)]
    assert contact_sheet(tiles, columns=5).shape == (8, 38, 1)
    assert contact_sheet(tiles, columns=1).shape == (48, 6, 1)
