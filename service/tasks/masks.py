"""What a mask says is to be regenerated, whichever tool has drawn it.

| the mask | regenerated | kept |
|---|---|---|
| opaque everywhere | at least half white | darker |
| white on transparent: strokes on an empty canvas | the white | the transparent |
| black with transparent holes, as OpenAI's masks | the transparent | the black |

In a mask that is transparent in places, what is opaque is either all white or all black. With anything else
the transparent places could be meant either way, so it is refused.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from service.errors import InvalidRequestError

OPAQUE = 128
"""From this alpha on a pixel is something that was drawn."""
WHITE, BLACK = 240, 15
"""At least, and at most: of 255, with some tolerance for a lossy file."""
ADVICE = "Without transparency white is regenerated and black is kept."


def to_regenerate(mask: Image.Image) -> Image.Image:
    """The mask as "L": from 0 (kept) to 255 (regenerated). mask: as "L", "RGB" or "RGBA".

    Raises InvalidRequestError for one that could be meant in two ways.
    """
    if mask.mode != "RGBA":
        return mask.convert("L")
    alpha = np.asarray(mask.getchannel("A"))
    drawn = alpha >= OPAQUE
    if drawn.all():
        return Image.alpha_composite(Image.new("RGBA", mask.size, "white"), mask).convert("L")
    if not drawn.any():
        raise InvalidRequestError("mask", f"It is transparent everywhere, so it says nothing. {ADVICE}")
    levels = np.asarray(mask.convert("L"))[drawn]
    if levels.min() >= WHITE:
        return Image.fromarray(alpha)
    if levels.max() <= BLACK:
        return Image.fromarray(255 - alpha)
    raise InvalidRequestError(
        "mask",
        "It is transparent in places and neither all white nor all black in the others: what is transparent"
        f" could mean either. {ADVICE}",
    )
