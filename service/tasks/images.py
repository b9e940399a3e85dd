"""Pixels → encoded pictures, with the parameters that made them inside, or raw arrays.

One channel is grey, three are RGB, and four RGB and alpha. Any other number is no picture, two included:
nothing says that the second is an alpha, and where it is not, it would hide the first. Such samples are
arrays; as pictures they are shown channel by channel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image

from model.sheets import channel_sheet, enlarge
from service.engine.messages import Pixels
from service.tasks.arrays import encode_npy
from service.tasks.png import encode_png

ImageFormat = Literal["png", "jpeg", "webp", "npy"]
MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "npy": "application/x-npy",
}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's, by channels of what is a picture."""
NO_ALPHA = "A JPEG has no transparency, which this model's pictures have."


def formats_of(channels: int) -> tuple[ImageFormat, ...]:
    """What samples of so many channels can be sent as; the default comes first."""
    if channels not in MODES:
        return "npy", "png", "jpeg", "webp"
    return ("png", "webp", "npy") if channels == 4 else ("png", "jpeg", "webp", "npy")


def picture_size(shape: tuple[int, int, int]) -> tuple[int, int]:
    """(height, width) of the picture file of a sample, whose shape is (C, H, W)."""
    channels, height, width = shape
    if channels not in MODES:
        height, width, _ = channel_sheet(np.empty((height, width, channels), np.uint8)).shape
    return height, width


SMALL_BYTES = 4096
"""Of pixels. So few fit into three packets as they are; compressing them is most of what a stream costs."""


def encode(
    pixels: Pixels,
    image_format: ImageFormat,
    parameters: Mapping[str, Any] | str | None = None,
    scale: int = 1,
    *,
    quality: int | None = None,
    passing: bool = False,
) -> bytes:
    """[H, W, C] uint8 → a file in one of `formats_of(C)`. The same input gives the same bytes.

    parameters: written as JSON, or as the text they are, into a PNG's `parameters` text chunk (the field's
    habit) or, in JPEG and WebP, into the EXIF user comment; an array has no room for them. scale: pixels of
    the file per pixel and side. quality: from 0 to 100, of a JPEG (absent: 95) or a WebP (absent: lossless).
    passing: nobody keeps it, so a PNG of few pixels is not compressed.
    """
    if image_format == "npy":
        return encode_arrays([pixels], scale)
    if pixels.shape[-1] not in MODES:
        pixels = channel_sheet(pixels)
    pixels = enlarge(pixels, scale)
    text = parameters
    if text is not None and not isinstance(text, str):
        text = json.dumps(text, sort_keys=True)
    if image_format == "png":
        texts = None if text is None else {"parameters": text}
        compressed = not passing or pixels.size > SMALL_BYTES
        return encode_png(pixels, texts, enlarged=scale > 1, compressed=compressed)
    options: dict[str, Any] = {"quality": 95 if quality is None else quality}
    if text is not None:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text.encode(
            "ascii", "backslashreplace"
        )  # Exif IFD, UserComment
        options["exif"] = exif
    if image_format == "webp":
        options["lossless"] = quality is None
        if pixels.shape[-1] == 4:
            options["exact"] = True  # colours too where nothing of them is to be seen
    buffer = BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def on_white(pixels: Pixels) -> Pixels:
    """RGB and alpha [H, W, 4] over white: [H, W, 3]."""
    picture = Image.fromarray(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture))[..., :3]


def encode_arrays(pictures: Sequence[Pixels], scale: int = 1) -> bytes:
    """Pictures of one shape → a NumPy file: [H, W, C] uint8 of a single one, else [N, H, W, C]."""
    arrays = [enlarge(pixels, scale) for pixels in pictures]
    return encode_npy(arrays[0] if len(arrays) == 1 else np.stack(arrays))
