"""Which model a request is for: its field `model`, wherever that is. Pure."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import msgspec
from starlette.datastructures import Headers, QueryParams
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from service.http.event_ids import request_of

MODELS = "/v1/models/"
FORMS = {"multipart/form-data": MultiPartParser, "application/x-www-form-urlencoded": FormParser}


class _Named(msgspec.Struct):
    model: Any = None


def models_of(text: str) -> dict[str, str]:
    """Where each model comes from, by its name: of `name=SOURCE,…`, or of `SOURCE,…`.

    Raises ValueError for a name that is given twice, or a text without models.
    """
    found: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, source = part.rpartition("=")
        name = name or PurePosixPath(source.partition("@")[0]).name
        if not name or not source or name in found:
            raise ValueError(f"{part!r}: models are SOURCE or name=SOURCE, each of another name")
        found[name] = source
    if not found:
        raise ValueError("there is no model")
    return found


async def model_named(scope: dict[str, Any], body: bytes) -> str | None:
    """The model that a request names; None where it names none, or cannot be read.

    The path may say it (`/v1/models/NAME`), the id of an event whose stream goes on, the body as JSON or as a
    form, or the query.
    """
    path: str = scope["path"]
    if path.startswith(MODELS):
        return path.removeprefix(MODELS)
    headers = Headers(scope=scope)
    if event_id := headers.get("last-event-id"):
        body = request_of(event_id)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    found: Any = None
    if body and kind in FORMS:
        found = await _in_form(FORMS[kind], headers, body)
    elif body:
        try:
            found = msgspec.json.decode(body, type=_Named).model
        except msgspec.DecodeError:  # whoever answers it will say what is wrong
            return None
    if found is None:
        found = QueryParams(scope["query_string"]).get("model")
    return found if isinstance(found, str) and found else None


async def _in_form(parser: type[Any], headers: Headers, body: bytes) -> Any:
    async def stream() -> Any:
        yield body

    try:
        form = await parser(headers, stream()).parse()
    except (MultiPartException, KeyError, UnicodeError):
        return None
    found = form.get("model")
    await form.close()
    return found
