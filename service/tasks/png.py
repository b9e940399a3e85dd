"""PNG files of eight-bit pictures, by zlib alone: a small picture takes a fraction of Pillow's time.

The format is W3C's Portable Network Graphics Specification (https://www.w3.org/TR/png-3/); the numbers of its
sections are below.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

from service.engine.messages import Pixels

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""§11.2.1, by channels: grey, grey and alpha, RGB, RGB and alpha."""
NONE, UP = 0, 2
END = b"\0\0\0\0IEND\xaeB`\x82"


def encode_png(
    pixels: Pixels,
    text: Mapping[str, str] | None = None,
    *,
    enlarged: bool = False,
    compressed: bool = True,
) -> bytes:
    """[H, W, C] uint8, C from 1 to 4 → a file. The same input gives the same bytes.

    text: keyword → value, where a keyword is 1 to 79 characters of Latin-1. enlarged: most pixels equal the
    one before. compressed: or the bytes as they are, in a tenth of the time. Raises KeyError for another C.
    """
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)
    # Every row begins with its filter (§9.2). Up, the difference from the row above: colour pictures become
    # smaller by it than by none, a third smaller where they are smooth, for a few microseconds.
    values = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = UP if compressed else NONE
    rows[:, 1:] = values
    if compressed:
        rows[1:, 1:] -= values[:-1]  # modulo 256, as the format wants it
    # Runs of a byte give files as short as a search for repetitions does, in less time. But pixels of
    # several bytes that repeat are no such runs.
    strategy = zlib.Z_DEFAULT_STRATEGY if enlarged and channels > 1 else zlib.Z_RLE
    deflate = zlib.compressobj(int(compressed), zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    data = deflate.compress(rows.data) + deflate.flush()
    texts = [_text(keyword, value) for keyword, value in (text or {}).items()]
    return b"".join([SIGNATURE, _chunk(b"IHDR", head), *texts, _chunk(b"IDAT", data), END])


def _text(keyword: str, value: str) -> bytes:
    """§11.3.3: `tEXt` where the value is Latin-1, `iTXt` in UTF-8 where it is not."""
    name = keyword.encode("latin-1")
    try:
        return _chunk(b"tEXt", name + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode())


def _chunk(kind: bytes, data: bytes) -> bytes:
    """§5.3: length, type, data, checksum of type and data."""
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
