"""What a network is given beside x: a picture, for super-resolution or inpainting by concatenation.

SR3 (Saharia et al. 2021) takes the small picture, enlarged to the size of x; Palette (Saharia et al. 2022)
and others the picture that has a hole, with or without the mask of the hole. Its channels follow those of x
in the network's input, which is wider than its output: that is how such a network is recognised. Which
picture it is, and in which order, the channels do not say; `model_index.json` does, by `condition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from model.chain import Image, Mask
from model.schedule import DATA_RANGE, DataRange

Part = Literal["image", "masked_image", "mask"]
PARTS: tuple[Part, ...] = get_args(Part)


class ConditionError(ValueError):
    """It is not known what a network takes beside x; the message says what is."""


def width(part: Part, channels: int) -> int:
    """Channels of a part of the condition of a network for pictures of `channels`."""
    return 1 if part == "mask" else channels


def parts_of(extra: int, channels: int, named: object = None) -> tuple[Part, ...]:
    """The parts of a condition of `extra` channels for pictures of `channels`, in order.

    named: what `condition` in model_index.json says, if it is there; absent, as many channels as a picture
    has are one, whole. Raises ConditionError where the channels and the names do not fit together.
    """
    if named is None:
        if extra == 0:
            return ()
        if extra == channels:
            return ("image",)
        raise ConditionError(
            f"the network takes {extra} channels beside the {channels} of x; what they are has to be said by "
            f'"condition" in model_index.json, a list of {", ".join(PARTS)}, such as ["mask", "masked_image"]'
        )
    if not isinstance(named, list) or not all(part in PARTS for part in named) or len({*named}) < len(named):
        raise ConditionError(f'"condition" must be a list of some of {", ".join(PARTS)}')
    parts: tuple[Part, ...] = tuple(named)
    if (wide := sum(width(part, channels) for part in parts)) != extra:
        raise ConditionError(
            f'"condition" has {wide} channels for pictures of {channels}, but the network takes {extra}'
        )
    return parts


def channels_of(in_channels: int, parts: Sequence[Part]) -> int:
    """Channels of the pictures of a network with so many inputs, which are x and these parts."""
    masks = parts.count("mask")
    return (in_channels - masks) // (1 + len(parts) - masks)


def assemble(
    parts: Sequence[Part], image: Image, kept: Mask | None = None, data_range: DataRange = DATA_RANGE
) -> Image:
    """The condition of a sample: [K, H, W] float32.

    image: [C, H, W] in data_range. kept: [1, H, W], which of its pixels are to stay; all, where it is None. A
    masked image is mid-grey, 0 in [-1, 1], where they are not, and the mask is 1 there and 0 elsewhere.
    """
    grey = np.float32(sum(data_range) / 2)
    hole: NDArray[np.float32] = np.zeros((1, *image.shape[1:]), np.float32)
    if kept is not None:
        hole += ~kept
    of = {"image": image, "masked_image": np.where(hole > 0, grey, image), "mask": hole}
    return np.concatenate([of[part] for part in parts])
