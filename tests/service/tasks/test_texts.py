"""What is a number, and which fields are one."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from service.tasks.texts import TextNumbers, misread


class Fields(BaseModel):
    whole: Annotated[int, Field(ge=0)] | None = None
    wholes: list[int] | int = 0
    real: float | None = None
    label: int | str = 0
    kind: Literal["a"] = "a"
    flag: bool = False


class Query(Fields, TextNumbers):
    """The same, of text alone."""


@pytest.mark.parametrize("text", ["1_0", "1.0", "1e1", "0x1", "１", "+-1", "1 0", "nan"])
def test_what_is_no_integer(text: str) -> None:
    for field, value in (("whole", text), ("wholes", text), ("wholes", ["1", text])):
        assert misread(Fields, field, value) == "int"
    with pytest.raises(ValidationError) as caught:
        Query.model_validate({"whole": text}, strict=False)
    (error,) = caught.value.errors()
    assert (error["loc"], error["type"]) == (("whole",), "int_parsing")


@pytest.mark.parametrize("text", ["1_0", "0_0.5", "１", "nan", "inf", ".", "1e", "infinity"])
def test_what_is_no_number(text: str) -> None:
    assert misread(Fields, "real", text) == "float"


@pytest.mark.parametrize("field", ["label", "kind", "flag", "nowhere"])
def test_what_is_not_a_number_alone_is_left_to_its_field(field: str) -> None:
    assert misread(Fields, field, "1_0") is None


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_what_json_has_is_a_number(value: float) -> None:
    assert misread(Fields, "real", repr(value)) is None
    if isinstance(value, int):
        assert misread(Fields, "whole", f" {value} ") is None


def test_an_empty_text_and_a_file_are_for_the_field_to_judge() -> None:
    assert misread(Fields, "whole", "") is None
    assert misread(Fields, "whole", b"1_0") is None
