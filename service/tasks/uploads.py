"""Uploaded pictures: checked, decoded, and fitted to the model.

PNG, JPEG and WebP files of one frame, and NumPy arrays (arrays.py), the only form for a model whose samples
are no pictures. The number of pixels that a file claims is checked before any of them is decoded. Of its
metadata only the orientation is read (containers.py). A decoded picture is turned as its EXIF says,
composited over white where it is transparent and the model has no alpha, and converted to the model's
channels, 16 bits by their high byte; colour profiles are not applied. A picture of the model's size then
passes unchanged; another is cropped around the middle to the model's proportions and resized (Lanczos). An
array that does not have the model's shape is refused.
"""

from __future__ import annotations

import binascii
import re
from io import BytesIO
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import WithJsonSchema

from service.engine.messages import Pixels
from service.errors import InvalidRequestError
from service.tasks.arrays import decode_npy, is_npy
from service.tasks.containers import PixelData, TooManyPartsError, pixel_data
from service.tasks.images import MODES
from service.tasks.masks import to_regenerate
from service.tasks.png import encode_png

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 24
"""Of a picture before it is fitted: a photograph of 16 megapixels, 64 MiB in memory."""
MAX_SCANS = 100
"""Of a JPEG: encoders write about ten of a progressive one, and libjpeg itself sets no limit."""
MAX_SCANNED = 20 * MAX_PIXELS
"""Pixels times scans, which is what a JPEG takes to decode, whatever its bytes: a second or two."""
TOO_SLOW = "It is made of too many parts: saved again as a PNG, or as a baseline JPEG, it is accepted."
TOO_LARGE = f"A picture has at most {MAX_PIXELS} pixels."
ACCEPTED = "PNG, JPEG, WebP or NumPy (.npy) file"
OTHER_FORMATS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"PK\3\4": "zip archive",
}
"""By how their files begin."""
OTHER_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}
"""Of ISO base media files: what follows `ftyp`."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by its orientation; those from 5 on swap its width and height."""
Upload = Annotated[
    str | bytes,
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}),
]
"""A PNG, JPEG, WebP or .npy: in JSON as base64 or a data URL, in a form also as a file."""
MAX_PREFIX = 1000
"""Characters of a data URL before its data."""
DATA_URL = re.compile(r"data:[^,;]{0,100}(;[^,;]{0,100})*;base64,", re.IGNORECASE)
URL_SAFE = str.maketrans("-_", "+/")


def unpack(upload: str | bytes, field: str = "image") -> bytes:
    """The file in a field: as it is, or from base64, with or without a data URL's prefix.

    Either alphabet of RFC 4648 (§4, §5), in one line or several, padded or not. The media type of a data URL
    does not matter. Raises InvalidRequestError for anything else.
    """
    if isinstance(upload, bytes):
        return upload
    head = DATA_URL.match(upload, 0, MAX_PREFIX)
    text = upload[head.end() :] if head else upload
    try:
        return _base64(text)
    except ValueError:
        pass
    lines = "".join(line.strip() for line in text.splitlines()).translate(URL_SAFE)
    digits = lines.rstrip("=")
    padding = -len(digits) % 4
    try:
        if len(lines) - len(digits) > padding:
            raise ValueError
        return _base64(digits + padding * "=")
    except ValueError:
        raise InvalidRequestError(field, "It is not base64.") from None


def _base64(text: str) -> bytes:
    if len(text) % 4 or text.endswith("==="):  # which the strict mode of some Pythons lets pass
        raise ValueError
    return binascii.a2b_base64(text, strict_mode=True)


def decode(data: bytes, shape: tuple[int, int, int], field: str = "image") -> Pixels:
    """A file as the model's pixels: [H, W, C] uint8. shape: the model's (C, H, W).

    Raises InvalidRequestError, with the reason, for a file that is not an accepted picture. How long it takes
    depends on the picture's size, which is known only once it is open: call it away from an event loop.
    """
    if is_npy(data):
        return _array(data, shape, field)
    return _fitted(upright(*_opened(data, field, shape[0])), shape)


def decode_masked(image: bytes, mask: bytes, shape: tuple[int, int, int]) -> tuple[Pixels, NDArray[np.bool_]]:
    """A picture [H, W, C] uint8, and which of its pixels are kept, [1, H, W] bool.

    The mask is a picture of the same size, or an array [H, W], fitted in the same way; masks.py says what of
    it is regenerated. Where EXIF turns the picture, a mask of the size in which it is stored is turned with
    it. Raises as `decode`, and for a mask of another size, or one after which there is nothing to regenerate.
    """
    if is_npy(image):
        pixels, stored, turned = _array(image, shape, "image"), (shape[2], shape[1]), 1
    else:
        picture, turned = _opened(image, "image", shape[0])
        pixels, stored = _fitted(upright(picture, turned), shape), picture.size
    size = stored[::-1] if turned >= 5 else stored
    drawn, own = _opened_mask(mask)
    if own == 1 and drawn.size != size and drawn.size == stored:
        own = turned
    drawn = upright(drawn, own)
    if drawn.size != size:
        turns = f" The image is {size[0]} × {size[1]} once turned as its EXIF orientation, {turned}, says."
        reason = "It must have the same width and height as the image."
        raise InvalidRequestError("mask", reason + turns * (turned != 1))
    kept = _fitted(to_regenerate(drawn), (1, *shape[1:]))[..., 0] < 128
    if kept.all():
        raise InvalidRequestError("mask", "It has no white, so there is nothing to regenerate.")
    return pixels, kept[None]


def opened(data: bytes, field: str = "image") -> Image.Image:
    """A picture decoded and upright, but not fitted: "L", "RGB" or "RGBA". Raises as `decode`."""
    return upright(*_opened(data, field))


def mask_of_alpha(data: bytes) -> bytes:
    """A mask by alpha, transparent where pixels are regenerated, as a PNG that is white there.

    Raises InvalidRequestError for a file that is not an accepted picture, has no alpha channel, or is opaque.
    """
    mask = opened(data, "mask")
    if mask.mode != "RGBA":
        raise InvalidRequestError("mask", "It has no alpha channel: transparent is edited, opaque is kept.")
    clear = 255 - np.asarray(mask.getchannel("A"))
    if clear.max() < 128:
        raise InvalidRequestError("mask", "It is opaque everywhere, so there is nothing to edit.")
    return encode_png(clear[..., None])


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """A picture turned as its EXIF orientation, from 1 to 8, says."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _array(data: bytes, shape: tuple[int, int, int], field: str) -> Pixels:
    channels, height, width = shape
    pixels = decode_npy(data, channels, field)
    if pixels.shape[:2] != (height, width):
        raise InvalidRequestError(
            field, f"An array must have the model's shape, [{height}, {width}, {channels}]."
        )
    return pixels


def _opened_mask(data: bytes) -> tuple[Image.Image, int]:
    if is_npy(data):
        return Image.fromarray(decode_npy(data, 1, "mask")[..., 0]), 1
    return _opened(data, "mask")


def _opened(data: bytes, field: str, channels: int = 3) -> tuple[Image.Image, int]:
    """A file decoded, as "L", "RGB" or "RGBA", and its orientation. channels: of the model."""
    if channels not in MODES:
        raise InvalidRequestError(
            field,
            f"This model has {channels} channels: send a NumPy (.npy) file of [height, width, {channels}].",
        )
    try:
        found = pixel_data(data)
    except TooManyPartsError:
        raise InvalidRequestError(field, TOO_SLOW) from None
    if found is None:
        raise InvalidRequestError(field, _no_picture(data))
    try:
        with Image.open(BytesIO(found.data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidRequestError(field, TOO_LARGE)
            if found.scans > MAX_SCANS or found.scans * image.width * image.height > MAX_SCANNED:
                raise InvalidRequestError(field, TOO_SLOW)
            if getattr(image, "is_animated", False):
                raise InvalidRequestError(field, "It is animated; a single picture is needed.")
            return _plain(image, found), found.orientation
    except InvalidRequestError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequestError(field, TOO_LARGE) from None
    except Exception:  # noqa: BLE001 (decoders fail in many ways on broken or hostile files)
        raise InvalidRequestError(field, "It is damaged or truncated.") from None


def _no_picture(data: bytes) -> str:
    if not data:
        return "It is empty."
    brand = OTHER_BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    name = brand or next((name for head, name in OTHER_FORMATS.items() if data.startswith(head)), None)
    return (
        f"It is a file of another format ({name}), not a {ACCEPTED}." if name else f"It is not a {ACCEPTED}."
    )


def _plain(image: Image.Image, found: PixelData) -> Image.Image:
    """The picture as "L" or "RGB", or as "RGBA" where anything in it may be transparent."""
    image.load()
    clear = None if found.key is None else _keyed(image, found)
    if image.mode.startswith("I"):  # 16 bits of grey: the high byte, as Pillow does for colours
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is not None:
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))
    elif image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in MODES.values() else image.convert("L" if image.mode == "1" else "RGB")


def _keyed(image: Image.Image, found: PixelData) -> NDArray[np.bool_]:
    """Where a PNG's pixels have the value that stands for transparent: [H, W] bool (§11.3.1.1)."""
    assert found.key is not None
    if len(found.key) == 3:
        values = np.asarray(image).astype(np.uint16)
        if found.bits == 16:
            values = (values << 8 | _low_bytes(found.data)).astype(np.uint16)
        return np.asarray((values == found.key).all(-1))
    if found.bits == 16:
        return np.asarray(np.asarray(image) == found.key[0])
    # A decoder spreads the values of fewer bits over all eight.
    return np.asarray(np.asarray(image.convert("L")) == found.key[0] * 255 // ((1 << found.bits) - 1))


def _low_bytes(png: bytes) -> NDArray[np.uint8]:
    """Of a PNG with 16 bits a colour, whose high bytes are what Pillow decodes: its low ones, [H, W, 3]."""
    with Image.open(BytesIO(png), formats=("PNG",)) as image:
        # Read in the other byte order, the low byte is the high one.
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)


def _fitted(image: Image.Image, shape: tuple[int, int, int]) -> Pixels:
    """[H, W, C] uint8 of the model's shape (C, H, W), C 1, 3 or 4."""
    channels, height, width = shape
    if image.mode == "RGBA" and channels != 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(height, width, channels)
