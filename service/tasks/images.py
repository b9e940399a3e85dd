"""Pixels → encoded pictures, with the parameters that made them inside; contact sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from model.sheets import enlarge
from service.engine.messages import Pixels
from service.tasks.png import encode_png

ImageFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


SMALL_BYTES = 4096
"""Of pixels. So few fit into three packets as they are; compressing them is most of what a stream costs."""


def encode(
    pixels: Pixels,
    image_format: ImageFormat,
    parameters: Mapping[str, Any] | None = None,
    scale: int = 1,
    *,
    passing: bool = False,
) -> bytes:
    """[H, W, C] uint8, C 1 or 3 → a file. The same input gives the same bytes.

    parameters: written as JSON into a PNG's `parameters` text chunk (the field's habit) or, in JPEG and WebP,
    into the EXIF user comment. scale: pixels of the file per pixel and side. passing: nobody keeps it, so a
    PNG of few pixels is not compressed.
    """
    pixels = enlarge(pixels, scale)
    text = json.dumps(parameters, sort_keys=True) if parameters is not None else None
    if image_format == "png":
        texts = None if text is None else {"parameters": text}
        compressed = not passing or pixels.size > SMALL_BYTES
        return encode_png(pixels, texts, enlarged=scale > 1, compressed=compressed)
    options: dict[str, Any] = {"quality": 95}
    if text is not None:
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text.encode("ascii")  # Exif IFD, UserComment
        options["exif"] = exif
    if image_format == "webp":
        options["lossless"] = True
    buffer = BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()
