"""Uploaded pictures: checked, decoded, and fitted to the model.

PNG, JPEG and WebP files of one frame. The number of pixels that a file claims is checked before any of them
is decoded. A decoded picture is rotated as its EXIF says, composited over white where it is transparent, and
converted to grey or RGB, 16 bits by their high byte; colour profiles are not applied. A picture of the
model's size then passes unchanged; another is cropped around the middle to the model's proportions and
resized (Lanczos).
"""

from __future__ import annotations

import binascii
import re
from io import BytesIO
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import WithJsonSchema

from service.engine.messages import Pixels
from service.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 24
"""Of a picture before it is fitted: a photograph of 16 megapixels, 64 MiB in memory."""
TOO_LARGE = f"A picture has at most {MAX_PIXELS} pixels."
Upload = Annotated[
    str | bytes,
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}),
]
"""A PNG, JPEG or WebP: in JSON as base64 or a data URL, in a form also as a file."""
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")


def unpack(upload: str | bytes, field: str = "image") -> bytes:
    """The file in a field: as it is, or from base64 (RFC 4648, §4), with or without a data URL's prefix.

    Raises InvalidRequestError for anything that is not strict base64.
    """
    if isinstance(upload, bytes):
        return upload
    head = DATA_URL.match(upload)
    text = upload[head.end() :] if head else upload
    try:
        if len(text) % 4 or text.endswith("==="):  # which the strict mode of some Pythons lets pass
            raise ValueError
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidRequestError(field, "It is not base64.") from None


def decode(data: bytes, shape: tuple[int, int, int], field: str = "image") -> Pixels:
    """A file as the model's pixels: [H, W, C] uint8. shape: the model's (C, H, W).

    Raises InvalidRequestError, with the reason, for a file that is not an accepted picture. How long it takes
    depends on the picture's size, which is known only once it is open: call it away from an event loop.
    """
    return _fitted(_opened(data, field), shape)


def decode_masked(image: bytes, mask: bytes, shape: tuple[int, int, int]) -> tuple[Pixels, NDArray[np.bool_]]:
    """A picture [H, W, C] uint8, and which of its pixels are kept, [1, H, W] bool.

    The mask is a picture of the same size, fitted in the same way: at least half white (or transparent) is
    regenerated, darker is kept. Raises as `decode`, and for a mask of another size or without any white.
    """
    picture, mask_picture = _opened(image, "image"), _opened(mask, "mask")
    if picture.size != mask_picture.size:
        raise InvalidRequestError("mask", "It must have the same width and height as the image.")
    kept = _fitted(mask_picture, (1, *shape[1:]))[..., 0] < 128
    if kept.all():
        raise InvalidRequestError("mask", "It has no white, so there is nothing to regenerate.")
    return _fitted(picture, shape), kept[None]


def _opened(data: bytes, field: str) -> Image.Image:
    """A file decoded, rotated upright, opaque, as "L" or "RGB"."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequestError(field, TOO_LARGE)
            # Cameras append a second picture to a JPEG (MPO): the first one is what viewers show.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise InvalidRequestError(field, "It is animated; a single picture is needed.")
            return _plain(ImageOps.exif_transpose(image))
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequestError(field, TOO_LARGE) from None
    except UnidentifiedImageError:
        raise InvalidRequestError(field, "It is not a PNG, JPEG or WebP file.") from None
    except Exception:  # noqa: BLE001 (decoders fail in many ways on broken or hostile files)
        raise InvalidRequestError(field, "It is damaged or truncated.") from None


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: the high byte, as Pillow does for colours
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _fitted(image: Image.Image, shape: tuple[int, int, int]) -> Pixels:
    """[H, W, C] uint8 of the model's shape (C, H, W), C 1 or 3."""
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)
