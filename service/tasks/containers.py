"""What of a picture file is pixels. The rest of it, however broken, is no reason to refuse them.

PNG (https://www.w3.org/TR/png-3/) and WebP (RFC 9649) are chunks, a JPEG's head (ITU-T T.81, annex B) is
segments. Those that decide a pixel are kept byte for byte, so that a decoder checks them as ever. Of all the
others only the orientation in an EXIF block is read.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
RIFF, WEBP = b"RIFF", b"WEBP"

PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
KEY_BYTES = {0: 2, 2: 6}
"""Of a tRNS chunk, by colour type: grey, RGB."""
WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04
"""Of VP8X: there is a colour profile, an EXIF block, an XMP packet."""
APPLICATION, COMMENT, SCAN = range(0xE0, 0xF0), 0xFE, 0xDA
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
COLOUR_SEGMENTS = {0xE0, 0xEE}
"""JFIF and Adobe: which colour space the components are."""
SHORTEST_COLOUR_SEGMENT = 16
END = 0xD9
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""What ends the coded data of a scan (§B.1.1.2): zeros are stuffed, and restarts belong to it."""
MAX_PARTS = 10_000
"""Chunks, or segments and scans, of a file: encoders write one for every 8 KiB, or fewer."""
EXIF = b"Exif\0\0"
ORIENTATION = 0x0112
SHORT, LONG = 3, 4


@dataclass(frozen=True)
class PixelData:
    """A picture file without its metadata.

    orientation: how it is to be turned, from 1, not at all, to 8 (EXIF 2.32, §4.6.4). bits: of a PNG's value.
    key: the value or the values of a grey or RGB PNG that are transparent; its tRNS chunk is taken out.
    scans: of a JPEG, each of which may go over the whole picture.
    """

    data: bytes
    orientation: int = 1
    bits: int = 8
    key: tuple[int, ...] | None = None
    scans: int = 1


class TooManyPartsError(ValueError):
    """A file has more than MAX_PARTS, so that reading it would take long, however small it is."""


def pixel_data(file: bytes) -> PixelData | None:
    """A PNG, a JPEG or a WebP without its metadata; None for any other file. Raises TooManyPartsError."""
    if file.startswith(PNG):
        return _png(file)
    if file.startswith(JPEG):
        return _jpeg(file)
    if file[:4] == RIFF and file[8:12] == WEBP:
        return _webp(file)
    return None


def _png(file: bytes) -> PixelData:
    kept, exif, key, bits, at = [PNG], b"", None, 8, len(PNG)
    colour_type, parts = -1, 0
    while at < len(file):
        parts = _another(parts)
        size, kind = int.from_bytes(file[at : at + 4]), file[at + 4 : at + 8]
        chunk = file[at : at + 12 + size]
        content = chunk[8:-4]
        if kind == b"IHDR" and len(content) == 13:
            bits, colour_type = content[8], content[9]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind == b"eXIf" and whole:
            exif = content
        if kind == b"tRNS" and whole and size == KEY_BYTES.get(colour_type):
            # The bits above a value's own are none of it.
            key = tuple(value & ((1 << bits) - 1) for value in struct.unpack(f">{size // 2}H", content))
        elif kind in PNG_PIXELS:
            kept.append(chunk)
        at += len(chunk)
        if kind == b"IEND":
            break
    return PixelData(b"".join(kept), orientation(exif), bits, key)


def _jpeg(file: bytes) -> PixelData:
    kept, exif, at, parts = [file[:2]], b"", 2, 0
    while file[at : at + 1] == b"\xff" and at + 1 < len(file):
        parts = _another(parts)
        marker = file[at + 1]
        if marker == 0xFF:  # any number of them may precede a marker
            at += 1
            continue
        size = 0 if marker in WITHOUT_LENGTH else int.from_bytes(file[at + 2 : at + 4])
        if marker == SCAN or (size < 2 and marker not in WITHOUT_LENGTH):
            break
        segment = file[at : at + 2 + size]
        if marker == 0xE1 and segment[4:10] == EXIF and not exif:
            exif = segment[10:]
        colour = marker in COLOUR_SEGMENTS and len(segment) >= SHORTEST_COLOUR_SEGMENT
        if colour or (marker not in APPLICATION and marker != COMMENT):
            kept.append(segment)
        at += len(segment)
    return PixelData(b"".join(kept) + file[at:], orientation(exif), scans=_scans(file, at, parts))


def _scans(file: bytes, at: int, parts: int) -> int:
    """How many scans follow, up to the picture's end. at: where the first begins. parts: those before it."""
    scans = 0
    while (found := MARKER.search(file, at)) is not None:
        parts = _another(parts)
        at, marker = found.end(), file[found.end() - 1]
        if marker == END:
            break
        scans += marker == SCAN
        if marker not in WITHOUT_LENGTH:
            at += int.from_bytes(file[at : at + 2])
    return max(scans, 1)


def _another(parts: int) -> int:
    """One part more. Raises TooManyPartsError."""
    if parts >= MAX_PARTS:
        raise TooManyPartsError
    return parts + 1


def _webp(file: bytes) -> PixelData:
    kept, exif, at, parts = [], b"", 12, 0
    while at < len(file):
        parts = _another(parts)
        kind, size = file[at : at + 4], int.from_bytes(file[at + 4 : at + 8], "little")
        chunk = file[at : at + 8 + size + size % 2]
        if kind == b"EXIF":
            exif = chunk[8:]
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_METADATA_FLAGS]) + chunk[9:]
        if kind in WEBP_PIXELS:
            kept.append(chunk)
        at += max(len(chunk), 1)
    body = WEBP + b"".join(kept)
    return PixelData(RIFF + struct.pack("<I", len(body)) + body, orientation(exif))


def orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, from 1 to 8: tag 0x0112 of its first directory; 1 if it says none."""
    block = exif.removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", block, at)
            if tag == ORIENTATION and kind in (SHORT, LONG):
                (value,) = struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", block, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:  # it ends before that
        pass
    return 1
