"""Request bodies that may carry pictures: JSON with base64, or a form with files. One model for both."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.errors import CancelledError
from service.tasks.texts import misread

MAX_PARTS = 100
MAX_VALUES = 10_000
"""Commas and colons of a JSON body, which is about how many values it has."""
CHARSET = re.compile(r";\s*charset\s*=\s*(\"[^\"]*\"|[^;]*)", re.IGNORECASE)
HALVES = (  # black on the left, white on the right
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACAQAAAABazTCJAAAADElEQVR42mNwYHAAAAEEAIFW8NEDAAAAAElFTkSuQmCC"
)
"""A picture for examples."""
NO_BODY = "The body is empty; it is a JSON object, {} where there is nothing to say."
OTHER_TYPE = "The header Content-Type must be application/json or multipart/form-data."
OTHER_TYPES = {
    "": f"{OTHER_TYPE} There is none; a request without a body sends {{}} as JSON.",
    "application/x-www-form-urlencoded": (
        f"{OTHER_TYPE} It is application/x-www-form-urlencoded, as curl says with -d unless told otherwise: "
        "use --json for a JSON body, or -F for a form."
    ),
}
"""What is said of a body by its media type, where it is one that clients choose without being asked."""
Model = TypeVar("Model", bound=BaseModel)


class _InMemory(MultiPartParser):
    """Keeps files out of the temporary folder: a whole body is small enough (middleware.py)."""

    spool_max_size = 1 << 30


async def read_body(request: Request, model: type[Model]) -> Model:
    """Read a request's body into a model: strictly from JSON, or from the text and files of a form.

    A part that comes several times is a list; an empty file without a name is none: a browser sends it for
    an input that was left empty. Raises RequestValidationError for an invalid body, and CancelledError when
    the client disconnects.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return model.model_validate_json(await _json(request))
        if kind == "multipart/form-data":
            return model.model_validate(_numbers(model, await _form(request)), strict=False)
    except ClientDisconnect:
        raise CancelledError("The client disconnected.") from None
    except MultiPartException as error:
        raise _invalid(error.message) from None
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]) from None
    raise _invalid(OTHER_TYPES.get(kind, OTHER_TYPE))


def _invalid(reason: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body",), "msg": reason}])


async def _json(request: Request) -> bytes:
    """A JSON body. It is bounded before it is parsed, since each value of it may be an error of its own."""
    content = b"".join([chunk async for chunk in request.stream()])  # which nobody keeps, unlike body()
    content = content.removeprefix(codecs.BOM_UTF8)  # PowerShell and .NET write one
    if not content.strip():
        raise _invalid(NO_BODY)
    if content.count(b",") + content.count(b":") > MAX_VALUES:
        raise _invalid(f"The body has more than {MAX_VALUES} commas and colons.")
    return content


async def _form(request: Request) -> dict[str, object]:
    # Without a charset: it means nothing in a form (RFC 7578, §5.1.2), and may name any of Python's codecs.
    headers = Headers({"Content-Type": CHARSET.sub("", request.headers["content-type"])})
    parser = _InMemory(headers, request.stream(), max_files=MAX_PARTS, max_fields=MAX_PARTS)
    form = await parser.parse()
    values: dict[str, list[str | bytes]] = {}
    for name, part in form.multi_items():
        if isinstance(part, str):
            values.setdefault(name, []).append(part)
        elif part.filename or part.size:
            values.setdefault(name, []).append(await part.read())
    await form.close()
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def _numbers(model: type[BaseModel], values: dict[str, object]) -> dict[str, object]:
    """The fields of a form as they are. Raises RequestValidationError where a number is none."""
    wrong = {name: kind for name, value in values.items() if (kind := misread(model, name, value))}
    if wrong:
        message = {"int": "Input should be a valid integer", "float": "Input should be a valid number"}
        raise RequestValidationError(
            [{"loc": ("body", name), "msg": message[kind]} for name, kind in wrong.items()]
        )
    return values


def body_schema(model: type[BaseModel], examples: Mapping[str, object]) -> dict[str, Any]:
    """The OpenAPI description of a body that `read_body` reads: `openapi_extra` of its route."""
    schema = model.model_json_schema()
    named = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema, "examples": named},
                "multipart/form-data": {"schema": _with_files(schema)},
            },
        }
    }


def _with_files(schema: Any) -> Any:
    """The same, with files instead of base64."""
    if isinstance(schema, list):
        return [_with_files(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "contentEncoding" in schema:
        kept = {name: schema[name] for name in ("title", "description") if name in schema}
        return {**kept, "type": "string", "format": "binary"}
    return {name: _with_files(part) for name, part in schema.items()}
