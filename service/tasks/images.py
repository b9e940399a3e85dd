"""Pixels → encoded pictures, with the parameters that made them inside; contact sheets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model.sheets import enlarge
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
