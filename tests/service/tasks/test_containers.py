"""Whole pixels are read, whatever the rest of their file says; what is transparent, and which way is up."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from service.errors import InvalidRequestError
from service.tasks.containers import orientation, pixel_data
from service.tasks.uploads import decode
from tests.service.tasks.test_uploads import chunk, file, noise, refusal

GREY, RGB, RGBA = (1, 8, 8), (3, 8, 8), (4, 8, 8)
PIXELS = noise(8, 8, 3)
PICTURE = Image.fromarray(PIXELS)
BOMB = zlib.compress(bytes(80 << 20), 9)


# ── Metadata ───────────────────────────────────────────────────────────────────────────────────


def broken(data: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return data[:-1] + bytes([data[-1] ^ 1])


PNG_METADATA = {
    "an EXIF block that is none": chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
    "an EXIF block cut short": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x40\1\x12"),
    "a colour profile that is none": chunk(b"iCCP", b"x\0\0nonsense"),
    "a colour profile that is a bomb": chunk(b"iCCP", b"x\0\0" + BOMB),
    "a text that is a bomb": chunk(b"zTXt", b"a\0\0" + BOMB),
    "a text of unknown compression": chunk(b"zTXt", b"a\0\7x"),
    "an international text cut short": chunk(b"iTXt", b"a\0\1"),
    "a wrong checksum of a text": broken(chunk(b"tEXt", b"a\0b")),
    "a resolution cut short": chunk(b"pHYs", b"\0\0"),
    "a gamma cut short": chunk(b"gAMA", b"\0"),
    "chromaticities cut short": chunk(b"cHRM", b"\0"),
    "a rendering intent of no byte": chunk(b"sRGB", b""),
    "something private": broken(chunk(b"prVt", b"whatever")),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("metadata", PNG_METADATA.values(), ids=PNG_METADATA)
def test_a_png_with_broken_metadata(metadata: bytes, place: str) -> None:
    data = file(PICTURE)
    at = 33 if place == "before" else len(data) - 12
    np.testing.assert_array_equal(decode(data[:at] + metadata + data[at:], RGB), PIXELS)


def test_a_png_without_its_end() -> None:
    data = file(PICTURE)
    for rest in (b"", b"\0\0\0\0IE", chunk(b"tEXt", b"a\0b")[:-7]):
        np.testing.assert_array_equal(decode(data[:-12] + rest, RGB), PIXELS)
    np.testing.assert_array_equal(decode(data + b"what follows is none of it", RGB), PIXELS)


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


JPEG_METADATA = {
    "an EXIF block that is none": segment(0xE1, b"Exif\0\0nonsense"),
    "an EXIF block cut short": segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
    "an XMP packet that is none": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"),
    "a colour profile that is none": segment(0xE2, b"ICC_PROFILE\0"),
    "an index of pictures that is none": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "Photoshop's, cut short": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\xff\xff"),
    "half a JFIF head": segment(0xE0, b"JFIF\0\1"),
    "half of Adobe's": segment(0xEE, b"Adobe"),
    "a remark": segment(0xFE, b"\xff\xd9 is no end here"),
    "nothing but fill": b"\xff\xff\xff",
}


@pytest.mark.parametrize("metadata", JPEG_METADATA.values(), ids=JPEG_METADATA)
def test_a_jpeg_with_broken_metadata(metadata: bytes) -> None:
    data = file(PICTURE, "jpeg", quality=95)
    found = decode(data[:2] + metadata + data[2:], RGB)
    np.testing.assert_array_equal(found, np.asarray(Image.open(BytesIO(data))))


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


@pytest.mark.parametrize(
    "metadata",
    [
        riff(b"EXIF", b"nonsense"),
        riff(b"EXIF", b"II*\0\xff\xff\xff\x7f"),
        riff(b"XMP ", b"<x"),
        riff(b"abcd", b"?"),
        riff(b"EXIF", bytes(100))[:-40],
        b"EX",
    ],
    ids=["none", "short", "XMP", "private", "cut", "cut at once"],
)
def test_a_webp_with_broken_metadata(metadata: bytes) -> None:
    data = file(PICTURE, "webp", lossless=True, icc_profile=b"no profile", exif=b"no exif")
    assert b"VP8X" in data
    np.testing.assert_array_equal(decode(data + metadata, RGB), PIXELS)


def test_the_colour_space_of_a_jpeg_is_no_metadata() -> None:
    """Adobe's segment says that these components are inverted CMYK, or RGB as it is."""
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = decode(file(image, "jpeg", quality=100), RGB)
    assert found.reshape(-1, 3).mean(0) == pytest.approx([255, 0, 0], abs=6)
    kept = file(Image.new("RGB", (8, 8), (200, 40, 90)), "jpeg", quality=100, keep_rgb=True)
    assert decode(kept, RGB).reshape(-1, 3).mean(0) == pytest.approx([200, 40, 90], abs=3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_no_change_of_a_byte_breaks_more_than_the_picture(kind: str) -> None:
    whole = np.frombuffer(file(PICTURE, kind, exif=turned(6), icc_profile=bytes(40)), np.uint8)
    random = np.random.default_rng(0)
    for _ in range(300):
        changed = whole.copy()
        changed[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        data = changed[: random.integers(1, len(whole) + 1)].tobytes()
        found = pixel_data(data)
        assert found is None or len(found.data) <= len(data) + 12
        with suppress(InvalidRequestError):
            assert decode(data, RGB).shape == (8, 8, 3)


# ── Orientation ────────────────────────────────────────────────────────────────────────────────


def turned(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_picture_is_turned_as_pillow_turns_it(kind: str, value: int) -> None:
    stored = Image.fromarray(noise(6, 4, 3))
    options = {"lossless": True} if kind == "webp" else {}
    data = file(stored, kind, exif=turned(value), **options)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    height, width, _ = wanted.shape
    assert (width > height) == (value in (5, 6, 7, 8))
    np.testing.assert_array_equal(decode(data, (3, height, width)), wanted)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "code"), [(3, "Hxx"), (4, "I")])
def test_an_orientation_in_either_byte_order(order: str, kind: int, code: str) -> None:
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    other = struct.pack(f"{order}HHIHxx", 0x0110, 3, 1, 8)
    found = struct.pack(f"{order}HHI{code}", 0x0112, kind, 1, 6)
    block = head + struct.pack(f"{order}H", 2) + other + found
    assert orientation(block) == orientation(b"Exif\0\0" + block) == 6
    for end in range(len(block) - 4):
        assert orientation(block[:end]) == 1


def test_an_orientation_with_a_wrong_checksum_is_not_believed() -> None:
    data = file(PICTURE)
    block = broken(chunk(b"eXIf", turned(6).removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(decode(data[:33] + block + data[33:], RGB), PIXELS)


# ── A colour that stands for transparent ───────────────────────────────────────────────────────


def png(values: np.ndarray, bits: int, key: bytes, colour_type: int = 0) -> bytes:
    """A PNG of unsigned values [H, W, …] of so many bits, with a tRNS chunk."""
    height, width = values.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    if bits == 16:
        rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        each = np.unpackbits(values.astype(np.uint8).reshape(height, -1, 1), axis=-1)[..., 8 - bits :]
        rows = np.packbits(each.reshape(height, -1), axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"tRNS", key)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_grey_stands_for_transparent_at_any_depth(bits: int) -> None:
    top = (1 << bits) - 1
    values = np.random.default_rng(0).integers(0, top + 1, (8, 8))
    values[0, 0] = key = top // 2
    data = png(values, bits, struct.pack(">H", key))
    levels = values >> 8 if bits == 16 else values * 255 // top
    found = decode(data, RGBA)
    np.testing.assert_array_equal(found[..., 3] == 0, values == key)
    np.testing.assert_array_equal(found[..., 0], levels)
    np.testing.assert_array_equal(decode(data, GREY)[..., 0], np.where(values == key, 255, levels))


@pytest.mark.parametrize("bits", [8, 16])
def test_one_colour_stands_for_transparent_at_any_depth(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, (8, 8, 3))
    near = values[0, 1] = values[0, 0] ^ (0, 0, 1)  # of 16 bits, the high byte is the same
    data = png(values, bits, struct.pack(">3H", *values[0, 0]), colour_type=2)
    assert (near != values[0, 0]).any()
    found = decode(data, RGBA)
    wanted = (values == values[0, 0]).all(-1)
    assert wanted.sum() == 1
    np.testing.assert_array_equal(found[..., 3] == 0, wanted)
    np.testing.assert_array_equal(found[..., :3], values >> (bits - 8))


def test_bits_above_a_value_are_none_of_the_key() -> None:
    values = np.arange(64).reshape(8, 8) % 16
    found = decode(png(values, 4, struct.pack(">H", 0xFF05)), RGBA)
    np.testing.assert_array_equal(found[..., 3] == 0, values == 5)


def test_a_key_with_a_wrong_checksum_is_damage() -> None:
    data = png(noise(8, 8), 8, b"\0\5")
    at = data.index(b"tRNS") + 6
    assert "damaged" in refusal(data[:at] + b"\7" + data[at + 1 :])
