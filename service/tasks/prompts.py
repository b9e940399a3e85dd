"""Prompts: which of the model's classes a text names, and what is said of how it was understood.

A diffusion model of classes understands no sentences. So a prompt is searched for the name of one class, in
any case, in the singular or the plural: "Two ankle boots, please." Names that are lists are known by each of
their parts ("tench, Tinca tinca"), and names of several words also as one ("tshirt"). The longest name wins
where one contains another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from unicodedata import normalize

from model.class_names import meant_by
from service.errors import InvalidRequestError
from service.tasks.sampling import ModelCapabilities

MAX_LISTED = 60
"""Classes that an error lists."""
FILLERS = frozenset({"please", "thanks", "thank", "you", "kindly"})
LEADING = frozenset({"a", "an", "the", "i"})
"""Articles and pronouns before another word; by themselves they may name a class, of letters."""
ENDINGS = (
    *(("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("people", "person")),
    *(("children", "child"), ("mice", "mouse"), ("geese", "goose"), ("feet", "foot"), ("teeth", "tooth")),
)
"""Of plurals, and what they are instead of in the singular."""
SHORTEST = 3
"""Letters of a singular that is made from a plural: "as" is not several of "a"."""
Words = tuple[str, ...]


@dataclass(frozen=True)
class Understood:
    """A prompt as it was understood. label: index or number for the network, or None. text: in words."""

    label: int | None
    text: str


def understand(prompt: str, capabilities: ModelCapabilities) -> Understood:
    """What a prompt asks the model for. A blank one asks for no class.

    Raises InvalidRequestError for one that names no class, or several.
    """
    if not capabilities.conditional:
        return Understood(None, "The model is unconditional: the prompt was not used.")
    if not prompt.strip():
        return Understood(capabilities.label_or_none(None), "No class: unconditional.")
    names = capabilities.class_names
    if not names:
        numbers = re.findall(r"\d+", prompt, re.ASCII)
        label = capabilities.label(numbers[0] if len(numbers) == 1 else "")
        return Understood(label, str(label))
    found = meant_by(prompt, names) or sorted(set(named_in(prompt, names)))
    if len(found) == 1:
        return Understood(found[0], names[found[0]])
    if found:
        several = " or ".join(f"{index} ({names[index]})" for index in found[:MAX_LISTED])
        reason = f"It names several classes, but an image is of one: {several}."
    else:
        more = ", …" * (len(names) > MAX_LISTED)
        reason = f"It names no class of this model. The classes are {', '.join(names[:MAX_LISTED])}{more}."
    raise InvalidRequestError("prompt", reason)


def named_in(prompt: str, names: tuple[str, ...]) -> list[int]:
    """The classes whose names occur in a text, as they occur, but for names within longer ones that do."""
    index, reach = _vocabulary(names)
    words = tuple(word for word in _words(prompt) if word not in FILLERS)
    found: list[int] = []
    end = 0  # of the names so far, in words
    for start, word in enumerate(words):
        for stop in range(min(len(words), start + reach.get(word, 0)), max(start, end), -1):
            classes = index.get(words[start:stop])
            leads = stop == start + 1 < len(words) and word in LEADING
            if classes and not leads:
                found += sorted(classes)
                end = stop
                break
    return found


@lru_cache(maxsize=8)
def _vocabulary(names: tuple[str, ...]) -> tuple[dict[Words, set[int]], dict[str, int]]:
    """What classes may be called → those that are; and for each first word the most words that may follow.

    A whole name as it is means its class only, whatever else is called so in part or in the plural.
    """
    bare = [name.removesuffix(f" ({label})") for label, name in enumerate(names)]
    index: dict[Words, set[int]] = {}
    for called in (
        [[form for part in _parts(name) for form in _forms(_words(part))] for name in bare],
        [list(_forms(_words(name))) for name in names],
        [_as_it_is(_words(name)) for name in names],
    ):
        found: dict[Words, set[int]] = {}
        for label, forms in enumerate(called):
            for words in forms:
                found.setdefault(words, set()).add(label)
        index |= found
    reach: dict[str, int] = {}
    for words in index:
        reach[words[0]] = max(len(words), reach.get(words[0], 0))
    return index, reach


def _parts(name: str) -> list[str]:
    """A name, and each part of one that is a list."""
    return [name, *re.split(r"[,;/|]", name)]


def _as_it_is(words: Words) -> list[Words]:
    """A name, and it as one word."""
    return [words, ("".join(words),)] if words else []


def _forms(words: Words) -> Iterator[Words]:
    """The same, and both in the other number."""
    yield from _as_it_is(words)
    for last in _numbers(words[-1]) if words else ():
        yield from _as_it_is((*words[:-1], last))


def _numbers(word: str) -> Iterator[str]:
    """What may be the plural of a word, or its singular."""
    for plural, singular in ENDINGS:
        if len(word) > 1 and word.isalpha() and word.endswith(singular):
            yield word.removesuffix(singular) + plural
        if word.endswith(plural) and len(word) - len(plural) + len(singular) >= SHORTEST:
            yield word.removesuffix(plural) + singular


def _words(text: str) -> Words:
    return tuple(re.findall(r"[^\W_]+", normalize("NFKC", text).casefold()))
