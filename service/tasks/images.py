"""Pixels → encoded pictures, with the parameters that made them inside; contact sheets."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.engine.messages import Pixels

ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(
    pixels: Pixels, image_format: ImageFormat, parameters: Mapping[str, Any] | None = None, scale: int = 1
) -> bytes:
    """[H, W, C] uint8, C 1 or 3 → a file. The same input gives the same bytes.

    parameters: written as JSON into a PNG's `parameters` text chunk (the field's habit) or, in JPEG and WebP,
    into the EXIF user comment. scale: pixels of the file per pixel and side.
    """
    pixels = enlarge(pixels, scale)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    text = json.dumps(parameters, sort_keys=True) if parameters is not None else None
    options: dict[str, Any] = {}
    if image_format == "png":
        # Runs alone: for small pictures as short as a thorough search, in two thirds of the time.
        options |= {"compress_level": 1, "compress_type": zlib.Z_RLE}
        if text is not None:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_text("parameters", text)
    else:
        options["quality"] = 95
        if text is not None:
            exif = Image.Exif()
            exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text.encode("ascii")  # Exif IFD, UserComment
            options["exif"] = exif
        if image_format == "webp":
            options["lossless"] = True
    buffer = BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def enlarge(pixels: Pixels, scale: int) -> Pixels:
    """Every pixel as a square of scale × scale, without smoothing: [H, W, C] → [H·scale, W·scale, C]."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def contact_sheet(pictures: Sequence[Pixels], gap: int = 2, columns: int | None = None) -> Pixels:
    """Pictures of one size [H, W, C] side by side on white: in so many columns, or about as wide as high."""
    if len(pictures) == 1:
        return pictures[0]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width, channels = pictures[0].shape
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, pixels in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = pixels
    return sheet
