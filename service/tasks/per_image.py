"""Fields that have one value for all images of a request, or a list with one for each."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo

from service.errors import InvalidRequestError

MAX_SEED = 2**53 - 1  # what every JSON reader can hold
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Label = int | str
"""A class, by its index or name."""


def _form_of(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "single"


def _empty_is_null(entries: object, info: ValidationInfo) -> object:
    """A query and a form have no null."""
    if not isinstance(entries, list) or info.mode == "json":
        return entries
    return [None if entry == "" else entry for entry in entries]


# Told apart by what is given, so that an error is about that form alone.
Seeds = Annotated[
    Annotated[Seed | None, Tag("single")]
    | Annotated[Annotated[list[Seed], Field(min_length=1)], Tag("list")],
    Discriminator(_form_of),
]
"""Of the first image, or of each."""
Labels = Annotated[
    Annotated[Label | None, Tag("single")]
    | Annotated[
        Annotated[list[Label | None], Field(min_length=1), BeforeValidator(_empty_is_null)], Tag("list")
    ],
    Discriminator(_form_of),
]
"""Of all images, or of each."""


def count_of(*, n: int | None, **values: object) -> tuple[str, int]:
    """How many images there are, and the field that says so: `n`, or the length of the lists, or one.

    Raises InvalidRequestError where these disagree.
    """
    counts = {"n": n} if n is not None else {}
    counts |= {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if len({*counts.values()}) > 1:
        said = " and ".join(f"{count} from {name}" for name, count in counts.items())
        raise InvalidRequestError([*counts][-1], f"A list has one entry for each image; these are {said}.")
    return next(iter(counts.items()), ("n", 1))


def consecutive(seed: int | None, count: int) -> tuple[int, ...]:
    """So many seeds from this one on, or from a random one. Raises InvalidRequestError unless they fit."""
    first = secrets.randbits(32) if seed is None else seed
    if first + count - 1 > MAX_SEED:
        raise InvalidRequestError("seed", f"Image i has seed + i, and the largest seed is {MAX_SEED}.")
    return tuple(range(first, first + count))


def labels_of(
    wanted: Label | list[Label | None] | None, count: int, label: Callable[[Label | None], int | None]
) -> tuple[int | None, ...]:
    """The label of each of so many images. label: of one. Raises its errors, which name a list's entry."""
    if not isinstance(wanted, list):
        return (label(wanted),) * count
    labels = []
    for index, entry in enumerate(wanted):
        try:
            labels.append(label(entry))
        except InvalidRequestError as error:
            raise InvalidRequestError(error.field, f"Index {index}: {error.detail}") from None
    return tuple(labels)
