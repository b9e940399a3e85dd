"""The `Accept` header: which form of an answer a client gets, of those that can hold the model's samples."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from fastapi import Request

from service.errors import NotAcceptableError
from service.http.answers import EVENTS, JSON
from service.http.state import app_state
from service.tasks.images import MEDIA_TYPES, NO_ALPHA, ImageFormat, formats_of

MEDIA = (JSON, *MEDIA_TYPES.values(), EVENTS)
"""What answers come as, in our order of preference."""
PIECES = {mark: re.compile(rf'(?:[^{mark}"]|"(?:[^"\\]|\\.)*"?)+') for mark in ",;"}
"""What stands between such marks, but for those inside quotes."""
WEIGHT = re.compile(r"\d+\.?\d*|\.\d+", re.ASCII)
"""Of a media range. By the grammar a digit comes first; Java's client writes `.2`."""
MAX_ACCEPT = 4096
"""Characters; browsers send about 150."""
NONE = 0, 0.0
"""The specificity and quality of no range."""


def negotiate(request: Request) -> str:
    """The media type of a request's answer.

    Raises NotAcceptableError when it accepts none of those that can hold the model's samples, and
    LoadingError as long as it is not known what they are.
    """
    channels = app_state(request).capabilities.shape[0]
    return choose_media_type(_accepted(request), channels)


def negotiate_picture(request: Request, image_format: ImageFormat = "png") -> str:
    """The media type of an answer that is a picture unless something else is asked for.

    A browser's own headers name WebP and HTML before `*/*`; this format is it wherever it is accepted at all.
    Otherwise as `negotiate`.
    """
    wanted = MEDIA_TYPES[image_format]
    accept = _accepted(request) or "*/*"
    acceptable = max(_quality(part, wanted) for part in accept.split(","))[1] > 0
    return wanted if acceptable else negotiate(request)


def _accepted(request: Request) -> str:
    accept = ", ".join(request.headers.getlist("accept"))
    if len(accept) > MAX_ACCEPT:
        raise NotAcceptableError(f"The Accept header has more than {MAX_ACCEPT} characters.")
    return accept


@lru_cache(256)
def choose_media_type(accept: str, channels: int = 3) -> str:
    """The media type for an Accept header (RFC 9110, §12.5.1) and so many channels; JSON when it is empty.

    Raises NotAcceptableError when there is none.
    """
    best, quality = "", 0.0
    unfit = {MEDIA_TYPES[name] for name in MEDIA_TYPES.keys() - set(formats_of(channels))}
    media = [offered for offered in MEDIA if offered not in unfit]
    for offered in media:
        found = max((_quality(part, offered) for part in PIECES[","].findall(accept or "*/*")), default=NONE)
        if found[1] > quality:
            best, quality = offered, found[1]
    if not best:
        reason = f" {NO_ALPHA}" if unfit else ""
        raise NotAcceptableError(f"Answers come as {', '.join(media)}.{reason}")
    return best


def _quality(part: str, offered: str) -> tuple[int, float]:
    """(specificity, quality) that one part of an Accept header gives a media type; specific parts win.

    Our types have no parameters, and a range with some is taken for one without: clients write
    `application/json; charset=utf-8`. But one that has none is more specific. A range with a malformed weight
    is left out.
    """
    pattern, *options = (piece.strip().lower() for piece in PIECES[";"].findall(part) or [""])
    weights = [option[2:] for option in options if option.startswith("q=")]
    specificity = {"*/*": 1, f"{offered.split('/')[0]}/*": 2, offered: 3}.get(pattern, 0)
    quality = 1.0
    if weights:
        quality = float(weights[0]) if WEIGHT.fullmatch(weights[0]) else math.inf
    if not specificity or quality > 1:
        return NONE
    return 2 * specificity - (len(options) > len(weights)), quality
