"""Pictures of one size side by side, as arrays: what the service's sheets and the plots have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""[H, W, C] in [0, 255], any C."""

GAP = 2
"""White pixels between two pictures."""


def enlarge(pixels: Picture, scale: int) -> Picture:
    """Every pixel as a square of scale × scale, without smoothing: [H, W, C] → [H·scale, W·scale, C]."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def contact_sheet(pictures: Sequence[Picture], gap: int = GAP, columns: int | None = None) -> Picture:
    """Pictures [H, W, C] side by side on white, row by row. A single one is returned as it is.

    columns: how many to a row; by default about as many as there are rows.
    """
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


def channel_sheet(pixels: Picture) -> Picture:
    """The channels of a picture [H, W, C] side by side in grey, as a contact sheet [H', W', 1]."""
    return contact_sheet(np.split(pixels, pixels.shape[-1], axis=-1))
