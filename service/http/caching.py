"""What caches are told of a picture that a seed decides: `ETag` and `Cache-Control` (RFC 9110, RFC 9111).

The tag names everything that the bytes follow from, so it is known before anything is computed: the request
with its defaults, the model's files, this service's version, and what runs the network.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256

from service import __version__
from service.engine.messages import EngineInfo, ModelInfo
from service.tasks.sampling import PreparedRequest

FOREVER_S = 31_536_000
"""A year, the longest that RFC 2616 allowed, and what caches take for ever."""
NOT_STORED = {"Cache-Control": "no-store"}


def entity_tag(prepared: PreparedRequest, media_type: str, model: ModelInfo, engine: EngineInfo) -> str:
    """The tag of a job's picture: a strong one where batch neighbours cannot change its bytes."""
    decisive = {
        "parameters": prepared.parameters,
        "media_type": media_type,
        "computed_by": computed_by(model, engine),
    }
    digest = sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
    return f'"{digest}"' if engine.invariance.holds else f'W/"{digest}"'


def computed_by(model: ModelInfo, engine: EngineInfo) -> str:
    """All that a job's bytes follow from besides its request, as one line of JSON."""
    # Of torch a batch's size may change the last bit of a result.
    widest = engine.max_batch_size if engine.runtime.startswith("torch") else None
    runtime = [engine.runtime, engine.device, engine.dtype, widest]
    return json.dumps([__version__, model.name, model.checksum, model.shape, runtime])


def kept(tag: str, *, private: bool) -> dict[str, str]:
    """The headers of an answer that never changes. private: not for caches that several people share."""
    scope = "private" if private else "public"
    return {"ETag": tag, "Cache-Control": f"{scope}, max-age={FOREVER_S}, immutable"}


def matches(if_none_match: str, tag: str) -> bool:
    """Whether an If-None-Match header names a tag, by the weak comparison (RFC 9110, §8.8.3.2, §13.1.2)."""
    if if_none_match.strip() == "*":
        return True
    return tag.removeprefix("W/") in re.findall(r'"[^"]*"', if_none_match)
