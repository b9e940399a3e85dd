"""Files that are cut off, changed or made up: each becomes the model's pixels or is refused with a reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from service.errors import InvalidRequestError
from service.tasks.arrays import encode_npy
from service.tasks.uploads import decode, decode_masked, mask_of_alpha

MANY = int(os.environ.get("FUZZ_EXAMPLES", "0"))
FEW = 40
SHAPES = [(1, 8, 8), (3, 8, 6), (4, 8, 8)]
SIZE = (20, 12)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(7).integers(0, 256, (*SIZE[::-1], 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


FILES = {
    "PNG": [saved(picture(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
    "PNG with metadata": [saved(picture("RGB"), "PNG", exif=exif(6), transparency=(1, 2, 3))],
    "PNG, 16 bits": [saved(Image.fromarray(np.arange(240, dtype=np.uint16).reshape(12, 20)), "PNG")],
    "JPEG": [
        saved(picture("L"), "JPEG"),
        saved(picture("RGB"), "JPEG", progressive=True, exif=exif(5)),
        saved(picture("CMYK"), "JPEG", subsampling=0),
    ],
    "WebP": [
        saved(picture("RGB"), "WEBP", quality=50),
        saved(picture("RGBA"), "WEBP", lossless=True, exif=exif(3)),
    ],
    "GIF": [
        saved(picture("P"), "GIF"),
        saved(picture("P"), "GIF", save_all=True, append_images=[picture("P")]),
    ],
    "npy": [
        encode_npy(np.asarray(picture("RGB").resize((6, 8)))),
        encode_npy(np.asarray(picture("RGBA").resize((8, 8)))),
        encode_npy(np.asarray(picture("L").resize((8, 8)))),
    ],
}
HEADS = [file[:size] for files in FILES.values() for file in files for size in (8, 33)]


@st.composite
def changed(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """One of the files with bytes changed, taken out, put in or repeated, or cut off."""
    file = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(file) - 1)))
        end = min(len(file), at + draw(st.integers(1, 16)))
        match draw(st.sampled_from(["flip", "set", "remove", "insert", "repeat", "cut"])):
            case "flip" if file:
                file[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                file[at:end] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f"])) * (end - at)
            case "remove":
                del file[at:end]
            case "insert":
                file[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                file[at:at] = file[at:end] * draw(st.integers(1, 64))
            case "cut":
                del file[at:]
    return bytes(file)


def fuzzed(check: Callable[[bytes, tuple[int, int, int]], None], data: st.SearchStrategy[bytes]) -> None:
    """Run a check for many files and for models of every number of channels."""

    @given(data=data, shape=st.sampled_from(SHAPES))
    @examples(
        max_examples=10 * MANY or FEW,
        derandomize=not MANY,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    def run(data: bytes, shape: tuple[int, int, int]) -> None:
        check(data, shape)

    run()


def is_decoded_or_refused(data: bytes, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    with suppress(InvalidRequestError):
        pixels = decode(data, shape)
        assert pixels.shape == (height, width, channels)
        assert pixels.dtype == np.dtype(np.uint8)


def is_a_mask_or_refused(data: bytes, shape: tuple[int, int, int]) -> None:
    with suppress(InvalidRequestError):
        mask_of_alpha(data)
    with suppress(InvalidRequestError):
        kept = decode_masked(FILES["PNG"][4], data, shape)[1]
        assert kept.shape == (1, *shape[1:])
        assert kept.dtype == np.dtype(np.bool_)


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_file_is_decoded_or_refused(kind: str) -> None:
    fuzzed(is_decoded_or_refused, changed(FILES[kind]))


def test_random_bytes_are_decoded_or_refused() -> None:
    random = st.binary(max_size=300)
    fuzzed(is_decoded_or_refused, st.builds(bytes.__add__, st.sampled_from([b"", *HEADS]), random))


@pytest.mark.parametrize("kind", ["PNG", "WebP", "npy"])
def test_a_changed_mask_is_decoded_or_refused(kind: str) -> None:
    fuzzed(is_a_mask_or_refused, changed(FILES[kind]))
