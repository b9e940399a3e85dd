"""Arrays in and out: NumPy reads what is written, and only 8-bit arrays of the model's shape come in."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequestError
from service.tasks.arrays import encode_npy
from service.tasks.uploads import decode, decode_masked
from tests.service.tasks.test_uploads import file, halves, noise

FIVE = (5, 6, 4)
PIXELS = noise(6, 4, 5)


def saved(array: Any, **options: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def refusal(data: bytes, shape: tuple[int, int, int] = FIVE) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        decode(data, shape, "face")
    assert refused.value.field == "face"
    return refused.value.detail


@pytest.mark.parametrize("shape", [(6, 4, 1), (6, 4, 5), (3, 6, 4, 2)])
def test_numpy_reads_what_is_written(shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    for array in (pixels, np.asfortranarray(pixels), pixels[::-1]):
        found = np.load(BytesIO(encode_npy(array)), allow_pickle=False)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_an_array_of_the_models_shape_passes_exactly(channels: int) -> None:
    pixels = noise(6, 4, channels)
    for data in (saved(pixels), saved(np.asfortranarray(pixels)), encode_npy(pixels)):
        np.testing.assert_array_equal(decode(data, (channels, 6, 4)), pixels)


def test_one_channel_needs_no_axis() -> None:
    np.testing.assert_array_equal(decode(saved(PIXELS[..., 0]), (1, 6, 4))[..., 0], PIXELS[..., 0])


def test_other_versions_of_the_format() -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        buffer = BytesIO()
        np.lib.format.write_array(buffer, PIXELS, version=version)
        np.testing.assert_array_equal(decode(buffer.getvalue(), FIVE), PIXELS)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (PIXELS.astype(np.float32), "must be uint8"),
        (PIXELS.astype(np.int8), "must be uint8"),
        (PIXELS > 5, "must be uint8"),
        (PIXELS[..., 0], "[height, width, 5]"),
        (PIXELS[..., :4], "[height, width, 5]"),
        (PIXELS[None], "[height, width, 5]"),
        (np.moveaxis(PIXELS, -1, 0), "[height, width, 5]"),
        (np.moveaxis(PIXELS, 0, 1), "the model's shape, [6, 4, 5]"),
        (noise(12, 8, 5), "the model's shape, [6, 4, 5]"),
    ],
    ids=["float", "int8", "bool", "grey", "four", "four axes", "channels first", "turned", "larger"],
)
def test_an_array_of_another_kind_is_refused(array: Any, reason: str) -> None:
    assert reason in refusal(saved(array))


def test_nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was unpickled",)

    objects = np.array([Bomb()], object)
    assert "must be uint8" in refusal(saved(objects, allow_pickle=True))


def headed(literal: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + len(literal).to_bytes(2, "little") + literal + data


@pytest.mark.parametrize(
    "data",
    [
        saved(PIXELS)[:-1],
        saved(PIXELS) + b"x",
        saved(PIXELS)[:40],
        b"\x93NUMPY",
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 5)}\n"),
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 5)}\n", bytes(120)),
        headed(b"{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os')}\n"),
        headed(b"(" * 5000),
        b"\x93NUMPY\2\0\xff\xff\xff\xff",
        b"\x93NUMPY\x09\0" + saved(PIXELS)[8:],
    ],
    ids=["short", "long", "half", "magic", "huge", "negative", "code", "deep", "endless", "version"],
)
def test_a_broken_array_is_damaged(data: bytes) -> None:
    assert refusal(data) == "It is damaged or truncated."


@pytest.mark.parametrize("channels", [2, 5])
def test_what_is_no_picture_comes_in_as_an_array_alone(channels: int) -> None:
    detail = refusal(file(halves()), (channels, 8, 8))
    assert f"This model has {channels} channels" in detail
    assert f"(.npy) file of [height, width, {channels}]" in detail


def test_an_array_takes_a_picture_for_its_mask() -> None:
    mask = halves(8).resize((4, 6))
    pixels, kept = decode_masked(saved(PIXELS), file(mask), FIVE)
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(kept[0], np.asarray(mask) < 128)
    with pytest.raises(InvalidRequestError, match="the same width and height"):
        decode_masked(saved(PIXELS), file(halves(8)), FIVE)
