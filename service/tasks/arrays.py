"""NumPy's `.npy` files, for samples that no picture file holds: 8-bit arrays, never a pickle.

The format is NumPy's own (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from service.engine.messages import Pixels
from service.errors import InvalidRequestError

MAGIC = b"\x93NUMPY"


def encode_npy(pixels: Pixels) -> bytes:
    """An array of any shape → a file. The same input gives the same bytes."""
    buffer = BytesIO()
    npy.write_array(buffer, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def is_npy(data: bytes) -> bool:
    """Whether a file says that it is one."""
    return data.startswith(MAGIC)


def decode_npy(data: bytes, channels: int, field: str = "image") -> Pixels:
    """A file → [H, W, C] uint8; one channel may also be [H, W].

    The header is checked before anything is made of the rest. Raises InvalidRequestError, with the reason.
    """
    shape, fortran_order, dtype, values = _read(data, field)
    if dtype != np.uint8:
        raise InvalidRequestError(field, "An array must be uint8, with values from 0 to 255.")
    if len(shape) == 2 and channels == 1:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] != channels:
        raise InvalidRequestError(field, f"An array must have the shape [height, width, {channels}].")
    if len(values) != shape[0] * shape[1] * shape[2]:
        raise InvalidRequestError(field, "It is damaged or truncated.")
    found: NDArray[np.uint8] = np.frombuffer(values, np.uint8)
    return found.reshape(shape, order="F" if fortran_order else "C")


def _read(data: bytes, field: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], bytes]:
    """(shape, whether the first index runs fastest, dtype, the rest)."""
    file = BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return *read(file), file.read()
    except Exception:  # noqa: BLE001 (a header is a Python literal, and breaks in as many ways)
        raise InvalidRequestError(field, "It is damaged or truncated.") from None
