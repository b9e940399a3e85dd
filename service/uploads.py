"""Pictures that come in: checked, decoded, and fitted to the model.

PNG, JPEG and WebP files of one frame. How many pixels a file claims to have is looked at before any of them
is decoded. What is decoded is turned upright as its EXIF says, laid on white where it is transparent, and
brought to grey or RGB, 16 bits by their high ones; colour profiles are not applied. A picture of the model's
size then passes exactly; another one's largest middle part of the model's proportions is resized (Lanczos).
"""

from __future__ import annotations

import binascii
import re
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidRequestError
from service.events import Pixels

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 24
"""Of a picture before it is fitted: a photograph of 16 megapixels, 64 MiB in memory."""
TOO_LARGE = f"A picture has at most {MAX_PIXELS} pixels."
DATA_URL = re.compile(r"data:image/(png|jpeg|webp);base64,")


def unpack(upload: str | bytes, field: str = "image") -> bytes:
    """The file in a field: as it is, or from base64 (RFC 4648, §4), with a data URL's head or without.

    Raises InvalidRequestError for what is not base64 to the letter.
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

    Raises InvalidRequestError, with the reason, for what is no picture or not one that is taken. It takes as
    long as the picture is large, which only shows once it is open: call it away from an event loop.
    """
    return _fitted(_opened(data, field), shape)


def decode_masked(image: bytes, mask: bytes, shape: tuple[int, int, int]) -> tuple[Pixels, NDArray[np.bool_]]:
    """A picture [H, W, C] uint8, and which of its pixels are kept, [1, H, W] bool.

    The mask is a picture of the same size, fitted alike: at least half white (or transparent, which is laid
    on white) is to be made anew, darker is kept. Raises as `decode`, and for a mask that fits no such picture
    or leaves nothing to be made.
    """
    picture, drawn = _opened(image, "image"), _opened(mask, "mask")
    if picture.size != drawn.size:
        raise InvalidRequestError("mask", "It must be as wide and as high as the image.")
    kept = _fitted(drawn, (1, *shape[1:]))[..., 0] < 128
    if kept.all():
        raise InvalidRequestError("mask", "Nothing of it is white, so there is nothing to make anew.")
    return _fitted(picture, shape), kept[None]


def _opened(data: bytes, field: str) -> Image.Image:
    """A file decoded, upright, opaque, as "L" or "RGB"."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequestError(field, TOO_LARGE)
            # Cameras put a second picture behind a JPEG (MPO): the first one is what everybody sees.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise InvalidRequestError(field, "It is animated, and one picture is wanted.")
            return _plain(ImageOps.exif_transpose(image))
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequestError(field, TOO_LARGE) from None
    except UnidentifiedImageError:
        raise InvalidRequestError(field, "It is no PNG, JPEG or WebP.") from None
    except Exception:  # noqa: BLE001 (decoders fail in many ways on files that are broken or made to be)
        raise InvalidRequestError(field, "It is damaged or cut short.") from None


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey: the high ones, which is what Pillow takes of colours
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _fitted(image: Image.Image, shape: tuple[int, int, int]) -> Pixels:
    """[H, W, C] uint8 of the model's shape (C, H, W), C 1 or 3."""
    channels, height, width = shape
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)
