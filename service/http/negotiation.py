"""The `Accept` header: which form of an answer a client gets, of those that can hold the model's samples."""

from __future__ import annotations

from functools import lru_cache

from fastapi import Request

from service.errors import NotAcceptableError
from service.http.answers import EVENTS, JSON
from service.http.state import app_state
from service.tasks.images import MEDIA_TYPES, NO_ALPHA, formats_of

MEDIA = (JSON, *MEDIA_TYPES.values(), EVENTS)
"""What answers come as, in our order of preference."""


def negotiate(request: Request) -> str:
    """The media type of a request's answer.

    Raises NotAcceptableError when it accepts none of those that can hold the model's samples, and
    LoadingError as long as it is not known what they are.
    """
    channels = app_state(request).capabilities.shape[0]
    return choose_media_type(", ".join(request.headers.getlist("accept")), channels)


@lru_cache(256)
def choose_media_type(accept: str, channels: int = 3) -> str:
    """The media type for an Accept header (RFC 9110, §12.5.1) and so many channels; JSON when it is empty.

    Raises NotAcceptableError when there is none.
    """
    best, quality = "", 0.0
    unfit = {MEDIA_TYPES[name] for name in MEDIA_TYPES.keys() - set(formats_of(channels))}
    media = [offered for offered in MEDIA if offered not in unfit]
    for offered in media:
        found = max(_quality(part, offered) for part in (accept or "*/*").split(","))
        if found[1] > quality:
            best, quality = offered, found[1]
    if not best:
        reason = f" {NO_ALPHA}" if unfit else ""
        raise NotAcceptableError(f"Answers come as {', '.join(media)}.{reason}")
    return best


def _quality(part: str, offered: str) -> tuple[int, float]:
    """(specificity, quality) that one part of an Accept header gives a media type; specific parts win."""
    pattern, *options = (piece.strip().lower() for piece in part.split(";"))
    specificity = {"*/*": 1, f"{offered.split('/')[0]}/*": 2, offered: 3}.get(pattern, 0)
    if not specificity:
        return 0, 0.0
    for option in options:
        if option.startswith("q="):
            try:
                return specificity, min(1.0, max(0.0, float(option[2:])))
            except ValueError:
                return specificity, 0.0
    return specificity, 1.0
