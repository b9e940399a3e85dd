"""Our PNG files: what Pillow reads from them, and what the format asks of every chunk."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from model.sheets import enlarge
from service.engine.messages import Pixels
from service.tasks.png import SIGNATURE, encode_png

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(MODES)))
PICTURES = SHAPES.flatmap(lambda shape: arrays.arrays(np.uint8, shape))


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of every chunk of a file. Fails where one's checksum is wrong."""
    assert data.startswith(SIGNATURE)
    place = len(SIGNATURE)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        content = data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(kind + content)
        yield kind, content
        place += 12 + length
    assert place == len(data)


def read(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def ramp(channels: int, height: int = 5, width: int = 7) -> Pixels:
    return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


@given(PICTURES)
def test_every_picture_survives(pixels: Pixels) -> None:
    image = read(encode_png(pixels))
    assert image.mode == MODES[pixels.shape[-1]]
    assert (np.asarray(image).reshape(pixels.shape) == pixels).all()


@given(PICTURES, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200))
def test_so_does_every_text(pixels: Pixels, text: str) -> None:
    image = read(encode_png(pixels, {"parameters": text}))
    assert image.info["parameters"] == text


@pytest.mark.parametrize("channels", MODES)
def test_a_view_is_as_good_as_a_copy(channels: int) -> None:
    view = np.flip(ramp(channels, 20, 30)[::2, 1::3])
    assert not view.flags.c_contiguous
    assert encode_png(view) == encode_png(view.copy())


def test_chunks_come_in_their_order() -> None:
    found = list(chunks(encode_png(ramp(3), {"first": "1", "second": "2"})))
    assert [kind for kind, _ in found] == [b"IHDR", b"tEXt", b"tEXt", b"IDAT", b"IEND"]
    assert found[1][1] == b"first\x001"
    assert found[-1][1] == b""


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)])
def test_the_header_says_what_the_rows_are(channels: int, colour_type: int) -> None:
    (_, header), (_, data), _ = chunks(encode_png(ramp(channels)))
    assert struct.unpack(">IIBBBBB", header) == (7, 5, 8, colour_type, 0, 0, 0)
    assert len(zlib.decompress(data)) == 5 * (1 + 7 * channels)


@pytest.mark.parametrize(("text", "kind"), [("caf\u00e9", b"tEXt"), ("\u4e2d\u6587", b"iTXt")])
def test_only_what_latin_1_lacks_is_utf_8(text: str, kind: bytes) -> None:
    data = encode_png(ramp(1), {"parameters": text})
    assert [found for found, _ in chunks(data)][1] == kind
    assert read(data).info["parameters"] == text


def test_the_same_input_gives_the_same_bytes() -> None:
    assert encode_png(ramp(3), {"a": "b"}) == encode_png(ramp(3).copy(), {"a": "b"})


@pytest.mark.parametrize("channels", MODES)
def test_an_enlarged_picture_is_hardly_longer(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, channels), np.uint8)
    large = enlarge(pixels, 8)
    data = encode_png(large, enlarged=True)
    assert (np.asarray(read(data)).reshape(large.shape) == large).all()
    assert len(data) < 3 * len(encode_png(pixels))


def test_five_channels_are_none_of_ours() -> None:
    with pytest.raises(KeyError):
        encode_png(ramp(5))
