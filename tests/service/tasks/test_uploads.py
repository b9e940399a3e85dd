"""Pictures that come in: exactly where they fit, upright and opaque where not, and refused with a reason."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.engine.messages import Pixels
from service.errors import InvalidRequestError
from service.tasks import uploads
from service.tasks.arrays import encode_npy
from service.tasks.uploads import MAX_PIXELS, decode, decode_masked, unpack

GREY, RGB = (1, 8, 8), (3, 8, 8)
ORIENTATION = 0x0112


def noise(*shape: int, dtype: type[np.generic] = np.uint8, high: int = 256) -> Any:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def file(image: Image.Image, name: str = "png", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def refusal(data: bytes, shape: tuple[int, int, int] = GREY) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        decode(data, shape, "face")
    assert refused.value.field == "face"
    return refused.value.detail


# ── What passes exactly ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 4, 6)])
@pytest.mark.parametrize(
    "options", [{"name": "png"}, {"name": "webp", "lossless": True}], ids=["png", "webp"]
)
def test_a_picture_of_the_models_size_passes_exactly(
    shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    channels, height, width = shape
    pixels = noise(height, width, channels)
    found = decode(file(Image.fromarray(pixels[..., 0] if channels == 1 else pixels), **options), shape)
    assert found.dtype == np.uint8
    assert found.shape == (height, width, channels)
    np.testing.assert_array_equal(found, pixels)


def as_rgb(grey: Pixels) -> Image.Image:
    return Image.fromarray(grey).convert("RGB")


def as_palette(grey: Pixels) -> Image.Image:
    image = Image.fromarray(255 - grey).convert("P")
    image.putpalette([level for value in range(255, -1, -1) for level in (value,) * 3])
    return image


def as_opaque(grey: Pixels) -> Image.Image:
    return Image.merge("LA", (Image.fromarray(grey), Image.new("L", (8, 8), 255)))


def as_opaque_rgb(grey: Pixels) -> Image.Image:
    return as_opaque(grey).convert("RGBA")


def as_16_bits(grey: Pixels) -> Image.Image:
    return Image.fromarray(grey.astype(np.uint16) * 257)


@pytest.mark.parametrize("dressed", [as_rgb, as_palette, as_opaque, as_opaque_rgb, as_16_bits])
def test_grey_passes_exactly_in_any_dress(dressed: Callable[[Pixels], Image.Image]) -> None:
    grey = noise(8, 8)
    data = file(dressed(grey))
    np.testing.assert_array_equal(decode(data, GREY)[..., 0], grey)
    np.testing.assert_array_equal(decode(data, RGB), np.stack([grey] * 3, -1))


def test_of_16_bits_the_high_ones_count() -> None:
    deep = noise(8, 8, dtype=np.uint16, high=65536)
    np.testing.assert_array_equal(decode(file(Image.fromarray(deep)), GREY)[..., 0], deep >> 8)


def test_black_and_white() -> None:
    bits = noise(8, 8, high=2).astype(bool)
    np.testing.assert_array_equal(decode(file(Image.fromarray(bits)), GREY)[..., 0], bits * 255)


# ── What is made to fit ────────────────────────────────────────────────────────────────────────


def test_what_is_transparent_lies_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:, 3] = 255  # black, and on the left not there at all
    pixels[0, 0, 3] = 128
    found = decode(file(Image.fromarray(pixels)), GREY)[..., 0]
    assert found[0, 0] == 127
    assert (found[1:, :4] == 255).all()
    assert (found[:, 4:] == 0).all()
    palette = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    found = decode(file(palette, transparency=5), GREY)[..., 0]
    assert found[0, 5] == 255
    assert found[0, 4] == 4


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = decode(file(image, "jpeg", quality=100), RGB)
    assert found.reshape(-1, 3).mean(0) == pytest.approx([255, 0, 0], abs=6)


@pytest.mark.parametrize("size", [(24, 24), (40, 16), (16, 40), (100, 3), (3, 3), (1, 1), (8, 9), (21, 8)])
def test_of_another_size_the_largest_middle_part_is_resized_by_lanczos(size: tuple[int, int]) -> None:
    width, height = size
    side = min(size)
    image = Image.fromarray(noise(height, width))
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    wanted = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS, box))
    np.testing.assert_array_equal(decode(file(image), GREY)[..., 0], wanted)


def test_the_part_has_the_models_proportions() -> None:
    image = Image.fromarray(noise(24, 24))
    wanted = np.asarray(image.resize((12, 6), Image.Resampling.LANCZOS, (0, 6, 24, 18)))
    np.testing.assert_array_equal(decode(file(image), (1, 6, 12))[..., 0], wanted)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_camera_held_upright(name: str) -> None:
    dark = np.zeros((8, 8), np.uint8)
    dark[:4] = 255  # a light upper half, and a sensor that lay on its side
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = file(Image.fromarray(np.rot90(dark)), name, exif=exif.tobytes())
    assert np.abs(decode(data, GREY)[..., 0].astype(int) - dark).max() < 16


def test_a_second_picture_behind_a_jpeg_is_no_animation() -> None:
    first, second = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 200)
    data = file(first, "mpo", save_all=True, append_images=[second])
    with Image.open(BytesIO(data)) as opened:
        assert opened.is_animated  # type: ignore[attr-defined]
    assert (decode(data, GREY) == 40).all()


# ── Four channels ──────────────────────────────────────────────────────────────────────────────


def test_a_model_with_alpha_keeps_that_of_a_picture_and_its_colours() -> None:
    rgba = noise(8, 8, 4)
    rgba[2:4, :, 3] = 0
    image = Image.fromarray(rgba)
    for data in (file(image), file(image, "webp", lossless=True, exact=True)):
        np.testing.assert_array_equal(decode(data, (4, 8, 8)), rgba)


def test_a_picture_without_alpha_is_opaque_to_a_model_with_it() -> None:
    rgb, grey, alpha = noise(8, 8, 3), noise(8, 8), 255 - noise(8, 8)
    opaque = np.full((8, 8, 1), 255, np.uint8)
    for image, wanted in (
        (Image.fromarray(rgb), [rgb, opaque]),
        (Image.fromarray(grey), [grey, grey, grey, opaque]),
        (Image.fromarray(np.dstack([grey, alpha])), [grey, grey, grey, alpha]),
    ):
        np.testing.assert_array_equal(decode(file(image), (4, 8, 8)), np.dstack(wanted))


def test_nothing_bleeds_from_what_is_transparent_when_it_is_resized() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (0, 0, 255, 0)  # blue, and not there
    pixels[:, 16:] = (200, 100, 0, 255)
    found = decode(file(Image.fromarray(pixels)), (4, 8, 8))
    assert (found[:, 4:, 3] > 200).all()
    assert (found[found[..., 3] > 0][:, 2] == 0).all()


# ── What is refused ────────────────────────────────────────────────────────────────────────────


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claims(width: int, height: int) -> bytes:
    """A PNG that says it is so large, and is not there."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")


WHOLE = file(Image.fromarray(noise(64, 64)))
DAMAGED = {
    "png cut short": WHOLE[: len(WHOLE) // 2],
    "jpeg cut short": file(Image.fromarray(noise(64, 64)), "jpeg")[:900],
    "webp cut short": file(Image.fromarray(noise(64, 64, 3)), "webp")[:-500],
    "a wrong checksum": WHOLE[:60] + bytes([WHOLE[60] ^ 1]) + WHOLE[61:],
    "a wrong checksum of the head": WHOLE[:18] + bytes([WHOLE[18] ^ 1]) + WHOLE[19:],
    "half a head": WHOLE[:20],
    "nothing but a head": claims(8, 8),
    "no size": claims(0, 8),
    "nothing but a beginning": WHOLE[:8],
    "an array cut short": encode_npy(noise(8, 8, 1))[:-1],
    "an array too long": encode_npy(noise(8, 8, 1)) + b"x",
    "half an array's head": encode_npy(noise(8, 8, 1))[:50],
}
NO_PICTURE = {
    "text": b"zebra-crossing",
    "a beginning": WHOLE[:6],
    "ico": file(Image.new("L", (16, 16)), "ico"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}
OTHERS = {
    "GIF": file(Image.new("L", (8, 8)), "gif"),
    "BMP": file(Image.new("L", (8, 8)), "bmp"),
    "TIFF": file(Image.new("L", (8, 8)), "tiff"),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0",
    "HEIC": b"\0\0\0\x1cftypheic\0\0\0\0",
    "zip archive": b"PK\3\4",
}
FRAMES = [Image.fromarray(noise(8, 8)), Image.fromarray(255 - noise(8, 8))]
ANIMATED = {
    name: file(FRAMES[0], name, save_all=True, append_images=FRAMES[1:], duration=100)
    for name in ("png", "webp")
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged(data: bytes) -> None:
    assert "damaged" in refusal(data)


@pytest.mark.parametrize("data", NO_PICTURE.values(), ids=NO_PICTURE)
def test_what_is_no_picture(data: bytes) -> None:
    assert refusal(data) == "It is not a PNG, JPEG, WebP or NumPy (.npy) file."


@pytest.mark.parametrize("name", OTHERS)
def test_a_picture_in_another_format_is_named(name: str) -> None:
    found = refusal(OTHERS[name])
    assert f"({name})" in found
    assert "PNG, JPEG, WebP or NumPy (.npy)" in found


def test_nothing_at_all() -> None:
    assert refusal(b"") == "It is empty."


@pytest.mark.parametrize("data", ANIMATED.values(), ids=ANIMATED)
def test_what_moves(data: bytes) -> None:
    assert "animated" in refusal(data)


@pytest.mark.parametrize(
    "size", [(4096, 4097), (1 << 24, 2), (20_000, 5_000), (1_000_000, 1_000_000), (2**31 - 1, 2**31 - 1)]
)
def test_what_claims_to_be_too_large_is_not_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is there to decode: it would be damaged, had anybody looked."""
    monkeypatch.setattr(Image.Image, "load", lambda _self: pytest.fail("it was decoded"))
    assert refusal(claims(*size)) == f"A picture has at most {MAX_PIXELS} pixels."


def test_as_large_as_is_allowed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PIXELS", 64 * 64)
    assert decode(WHOLE, GREY).shape == (8, 8, 1)
    assert "at most" in refusal(file(Image.new("L", (64, 65))))


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_other_formats_claim_sizes_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PIXELS", 64 * 64)
    assert "at most" in refusal(file(Image.new("L", (65, 64)), name))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_is_a_picture_or_a_refusal(seed: int) -> None:
    """Bytes of real pictures, some of them changed."""
    random = np.random.default_rng(seed)
    kinds = ("png", "jpeg", "webp")
    whole = np.frombuffer(file(as_rgb(noise(16, 16)), kinds[seed % 3]), np.uint8).copy()
    whole[random.integers(8, len(whole), 6)] = random.integers(0, 256, 6)
    with suppress(InvalidRequestError):
        assert decode(whole.tobytes(), GREY).shape == (8, 8, 1)


# ── Base64 ─────────────────────────────────────────────────────────────────────────────────────

TEXT = base64.b64encode(b"any bytes").decode()


HEADS = [
    "",
    "data:image/png;base64,",
    "data:image/jpg;base64,",
    "data:application/x-npy;base64,",
    "data:;base64,",
    "data:image/png;name=a.png;charset=utf-8;base64,",
    "DATA:Image/PNG;BASE64,",
]


@pytest.mark.parametrize("head", HEADS)
def test_base64_with_a_data_urls_head_or_without(head: str) -> None:
    assert unpack(head + TEXT) == b"any bytes"


@pytest.mark.parametrize("data", [b"any", b"bytes", b"\xff\xef\xbe\xfb", bytes(range(256))])
def test_base64_of_any_dialect(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    safe = base64.urlsafe_b64encode(data).decode()
    lines = base64.encodebytes(data).decode()  # 76 characters each, as MIME wants it
    indented = lines.replace("\n", "\r\n    ")
    for text in (plain, safe, safe.rstrip("="), plain.rstrip("="), lines, indented, f" {plain}\n"):
        assert unpack(text) == data
        assert unpack(f"data:image/png;base64,{text}") == data


def test_a_file_is_as_it_is() -> None:
    assert unpack(TEXT.encode()) == TEXT.encode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:4] + " " + TEXT[4:],  # a form that lost its plus signs
        TEXT + "=",
        TEXT + "==",
        TEXT + "====",
        "QQ===",
        "QQ==QQ==",
        "=" + TEXT,
        TEXT + TEXT[:1],
        "é",
        "\ud800",
        "data:image/png," + TEXT,
        "data:image/png;base64,data:image/png;base64," + TEXT,
        "https://example.org/picture.png",
    ],
)
def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="not base64") as refused:
        unpack(text, "face")
    assert refused.value.field == "face"


# ── Masks ──────────────────────────────────────────────────────────────────────────────────────


def halves(size: int = 8, left: int = 0, right: int = 255) -> Image.Image:
    pixels = np.full((size, size), left, np.uint8)
    pixels[:, size // 2 :] = right
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("level", "regenerated"), [(0, False), (127, False), (128, True), (255, True)])
def test_half_white_is_white_enough(level: int, regenerated: bool) -> None:
    _, kept = decode_masked(file(halves()), file(halves(left=level)), GREY)
    assert kept.dtype == bool
    assert kept.shape == (1, 8, 8)
    assert (kept[0, :, :4] != regenerated).all()
    assert not kept[0, :, 4:].any()


def test_a_transparent_part_is_regenerated() -> None:
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[2:4] = 0
    mask = Image.merge("LA", (Image.new("L", (8, 8)), Image.fromarray(alpha)))
    _, kept = decode_masked(file(halves()), file(mask), RGB)
    np.testing.assert_array_equal(kept[0], alpha == 255)


def test_a_mask_is_fitted_as_its_image_is() -> None:
    pixels, kept = decode_masked(file(halves(32)), file(halves(32)), RGB)
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_array_equal(kept[0], np.arange(8) < np.full((8, 1), 4))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (file(halves(16)), "the same width and height"),
        (file(halves(8, right=127)), "It has no white"),
        (b"", "It is empty"),
        (b"zebra-crossing", "not a PNG"),
    ],
    ids=["another size", "black", "nothing", "no picture"],
)
def test_a_mask_that_will_not_do(mask: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        decode_masked(file(halves()), mask, GREY)
    assert refused.value.field == "mask"


# ── What takes long ────────────────────────────────────────────────────────────────────────────


def scanned(times: int, size: int = 8) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = file(Image.new("RGB", (size, size)), "jpeg", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * (times + 1) + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        scanned(100),
        scanned(200_000),
        b"\xff\xd8" + b"\xff\xfe\0\2" * 100_000 + scanned(1)[2:],
        scanned(1)[:-2] + b"\xff\xfe\0\2" * 100_000 + b"\xff\xd9",
        b"\x89PNG\r\n\x1a\n" + chunk(b"teXt", b"") * 100_000,
        b"RIFF\0\0\0\0WEBP" + b"EXIF\0\0\0\0" * 100_000,
    ],
    ids=["scans", "very many scans", "segments", "segments between scans", "PNG chunks", "WebP chunks"],
)
def test_a_file_of_too_many_parts_is_not_decoded(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_plain", lambda *_: pytest.fail("it is decoded"))
    assert "too many parts" in refusal(data)


def test_more_scans_are_allowed_of_a_small_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(scanned(50), GREY).shape == (8, 8, 1)
    monkeypatch.setattr(uploads, "MAX_SCANNED", 20 * 64)
    assert decode(scanned(5), GREY).shape == (8, 8, 1)  # beside the ten that it has
    assert "too many parts" in refusal(scanned(20))


def test_what_follows_a_jpeg_or_lies_inside_a_segment_is_no_scan_of_it() -> None:
    assert decode(scanned(0) + b"\xff\xda" * 1000, GREY).shape == (8, 8, 1)
    comment = b"\xff\xfe" + (2 + 2000).to_bytes(2) + b"\xff\xda" * 1000
    data = scanned(0)
    last = data.rfind(b"\xff\xda")
    assert decode(data[:last] + comment + data[last:], GREY).shape == (8, 8, 1)


def test_a_data_urls_head_is_only_looked_for_at_the_beginning() -> None:
    with pytest.raises(InvalidRequestError):
        unpack("data:" + ";" * uploads.MAX_PREFIX + ";base64,AAAA")
