"""Numbers that come as text, in queries and forms: those of JSON, and not all that Python takes for one."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

WHOLE = re.compile(r"\s*[+-]?\d+\s*", re.ASCII)
REAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
Kind = Literal["int", "float"]


class TextNumbers(BaseModel):
    """A model that is made of text alone."""

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        kind = misread(cls, info.field_name, value)
        if kind is not None:
            raise PydanticKnownError("int_parsing" if kind == "int" else "float_parsing")
        return value


def misread(model: type[BaseModel], field: str, value: object) -> Kind | None:
    """What number a field is, if its text, or one of several, is none: `1_000`, or `1.0` for an integer.

    An empty text is for the model to judge.
    """
    kind = _number(model, field) if isinstance(value, str | list) else None
    if kind is None:
        return None
    entries = value if isinstance(value, list) else [value]
    pattern = WHOLE if kind == "int" else REAL
    wrong = any(isinstance(each, str) and each and not pattern.fullmatch(each) for each in entries)
    return kind if wrong else None


@lru_cache(1024)
def _number(model: type[BaseModel], field: str) -> Kind | None:
    """Which number a field is, alone or in a list; None where it may be a text, or is no field."""
    found = model.model_fields.get(field)
    kinds = set() if found is None else _kinds(found.annotation)
    if str in kinds:
        return None
    return "int" if int in kinds else "float" if float in kinds else None


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    arguments = get_args(annotation)
    return set().union(*map(_kinds, arguments)) if arguments else {annotation}
