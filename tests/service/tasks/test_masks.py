"""Masks as tools draw them: what is regenerated, and which are refused since they could mean either."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.errors import InvalidRequestError
from service.tasks.arrays import encode_npy
from service.tasks.uploads import decode_masked
from tests.service.tasks.test_containers import turned
from tests.service.tasks.test_uploads import file, noise

GREY = (1, 8, 8)
IMAGE = file(Image.fromarray(noise(8, 8)))
STROKE = np.zeros((8, 8), bool)
STROKE[2:4, 1:7] = True
"""Where a change is wanted."""


def regenerated(mask: bytes, image: bytes = IMAGE, shape: tuple[int, int, int] = GREY) -> NDArray[np.bool_]:
    _, kept = decode_masked(image, mask, shape)
    assert kept.shape == (1, *shape[1:])
    found: NDArray[np.bool_] = ~kept[0]
    return found


def refusal(mask: bytes, image: bytes = IMAGE) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        decode_masked(image, mask, GREY)
    assert refused.value.field == "mask"
    return refused.value.detail


def drawn(colour: Any, alpha: NDArray[Any], beneath: int = 0) -> Image.Image:
    """A colour where alpha is more than nothing, another where it is nothing."""
    pixels = np.full((*alpha.shape, 4), beneath, np.uint8)
    pixels[alpha > 0, :3] = colour
    pixels[..., 3] = alpha
    return Image.fromarray(pixels)


ON, OFF = np.where(STROKE, 255, 0), np.where(STROKE, 0, 255)
PALETTE = Image.fromarray(STROKE.astype(np.uint8)).convert("P")
PALETTE.putpalette([0, 0, 0, 255, 255, 255])
DRAWN = {
    "white on black": file(Image.fromarray(ON.astype(np.uint8))),
    "white on black, one bit": file(Image.fromarray(STROKE)),
    "white on black, 16 bits": file(Image.fromarray((ON * 257).astype(np.uint16))),
    "white on black, a palette": file(PALETTE),
    "white on black, jpeg": file(Image.fromarray(ON.astype(np.uint8)), "jpeg", quality=95),
    "white on black, an opaque canvas": file(Image.fromarray(ON.astype(np.uint8)).convert("RGBA")),
    "an array": encode_npy(ON.astype(np.uint8)),
    "an array of one channel": encode_npy(ON.astype(np.uint8)[..., None]),
    "white on an empty canvas": file(drawn(255, ON)),
    "white on an empty canvas of white": file(drawn(255, ON, beneath=255)),
    "white on an empty canvas, lossy": file(drawn(255, ON), "webp", quality=60),
    "white on an empty canvas, half transparent": file(drawn(255, ON // 255 * 180)),
    "white on an empty canvas, grey and alpha": file(drawn(255, ON).convert("LA")),
    "white, and a colour for transparent": file(Image.fromarray(ON.astype(np.uint8)), transparency=0),
    "a hole in black": file(drawn(0, OFF)),
    "a hole in black over white": file(drawn(0, OFF, beneath=255)),
    "a hole in black, lossy": file(drawn(0, OFF), "webp", quality=60),
    "a hole in black, grey and alpha": file(drawn(0, OFF).convert("LA")),
}


@pytest.mark.parametrize("mask", DRAWN.values(), ids=DRAWN)
def test_what_a_tool_draws_is_understood(mask: bytes) -> None:
    np.testing.assert_array_equal(regenerated(mask), STROKE)


@pytest.mark.parametrize(("colour", "whole"), [(255, ON), (0, OFF)], ids=["white", "black"])
def test_a_soft_edge_is_cut_in_its_middle(colour: int, whole: NDArray[Any]) -> None:
    alpha = whole.copy()
    alpha[0, 0], alpha[0, 1] = 127, 128
    wanted = STROKE.copy()
    wanted[0, 0], wanted[0, 1] = (False, True) if colour else (True, False)
    np.testing.assert_array_equal(regenerated(file(drawn(colour, alpha))), wanted)


def photograph() -> Image.Image:
    pixels = np.concatenate([noise(8, 8, 3), OFF[..., None].astype(np.uint8)], axis=-1)
    return Image.fromarray(pixels)


AMBIGUOUS = {
    "a photograph with a hole": photograph(),
    "white and black on an empty canvas": drawn(
        np.where(np.arange(STROKE.sum()) % 2, 255, 0)[:, None] * np.ones(3, int), ON
    ),
    "grey on an empty canvas": drawn(128, ON),
    "red on an empty canvas": drawn((255, 0, 0), ON),
    "yellow on an empty canvas": drawn((255, 255, 0), ON),
}


@pytest.mark.parametrize("mask", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_mean_either_is_refused(mask: Image.Image) -> None:
    assert "could mean either" in refusal(file(mask))
    assert "white is regenerated and black is kept" in refusal(file(mask))


def test_an_empty_canvas_says_nothing() -> None:
    assert "transparent everywhere" in refusal(file(drawn(255, 0 * ON)))


def test_zeros_and_ones_are_black() -> None:
    assert "no white" in refusal(file(Image.fromarray(STROKE.astype(np.uint8))))
    assert "no white" in refusal(encode_npy(STROKE.astype(np.uint8)))


# ── Beside a picture that EXIF turns ───────────────────────────────────────────────────────────

SHAPE = (1, 6, 4)
"""Of the model: upright. The picture is stored on its side."""
STORED, UPRIGHT = noise(4, 6), np.rot90(noise(4, 6), -1)
ON_ITS_SIDE = file(Image.fromarray(STORED), exif=turned(6))
LEFT = np.arange(4)[None] < np.full((6, 1), 2)
"""Of the upright picture."""


def mask_of(where: NDArray[np.bool_], **options: Any) -> bytes:
    return file(Image.fromarray(np.where(where, 255, 0).astype(np.uint8)), **options)


def test_a_mask_is_as_the_picture_is_seen_or_as_it_is_stored() -> None:
    pixels, _ = decode_masked(ON_ITS_SIDE, mask_of(LEFT), SHAPE)
    np.testing.assert_array_equal(pixels[..., 0], UPRIGHT)
    for mask in (
        mask_of(LEFT),
        mask_of(np.rot90(LEFT)),  # as it is stored, by a tool that knows no EXIF
        mask_of(np.rot90(LEFT), exif=turned(6)),  # by one that copies it
    ):
        np.testing.assert_array_equal(regenerated(mask, ON_ITS_SIDE, SHAPE), LEFT)


def test_a_mask_that_is_turned_itself_is_turned_once() -> None:
    upright = file(Image.fromarray(np.ascontiguousarray(UPRIGHT)))
    found = regenerated(mask_of(np.rot90(LEFT), exif=turned(6)), upright, SHAPE)
    np.testing.assert_array_equal(found, LEFT)
    with pytest.raises(InvalidRequestError, match="the same width and height"):
        decode_masked(upright, mask_of(np.rot90(LEFT)), SHAPE)


def test_a_mask_of_another_size_hears_of_the_orientation() -> None:
    with pytest.raises(InvalidRequestError, match=r"4 × 6 once turned as its EXIF orientation, 6, says"):
        decode_masked(ON_ITS_SIDE, mask_of(LEFT[:, :3]), SHAPE)
    assert "EXIF" not in refusal(mask_of(LEFT[:, :3]))
