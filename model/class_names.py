"""Class names as people write them: which classes a name could mean, and a name for each that means only it.

ImageNet has two classes called "crane". Names may also differ by their Unicode form alone (é is one character
in NFC and two in NFD), which nobody sees, or be the number of another class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from unicodedata import normalize


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, with the index after those that alone would not say which class: "crane (134)".

    A number is such a name where it is the index of another class.
    """
    while True:
        counts = Counter(map(_as_seen, names))
        unclear = {
            i
            for i, name in enumerate(names)
            if counts[_as_seen(name)] > 1 or _index(name, len(names)) not in (None, i)
        }
        if not unclear:
            return names
        names = tuple(f"{name} ({i})" if i in unclear else name for i, name in enumerate(names))


def meant_by(wanted: str, names: Sequence[str]) -> list[int]:
    """The indices of all classes that a text could mean. names: as `distinct` returns them.

    A name, in any Unicode form; in any case too, unless there is one in just this; a name that `distinct` has
    put an index after, without it; or an index.
    """
    seen = _as_seen(wanted)
    folded = seen.casefold()
    exact = [i for i, name in enumerate(names) if _as_seen(name) == seen]
    found = set(exact or [i for i, name in enumerate(names) if _as_seen(name).casefold() == folded])
    if not exact:
        suffixed = ((i, name.removesuffix(f" ({i})")) for i, name in enumerate(names))
        found |= {i for i, base in suffixed if base != names[i] and _as_seen(base).casefold() == folded}
    if (index := _index(seen, len(names))) is not None:
        found.add(index)
    return sorted(found)


def _as_seen(name: str) -> str:
    return normalize("NFC", name.strip())


def _index(text: str, count: int) -> int | None:
    """The class that a text means as an index, if it is one."""
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= len(str(count)) and str(int(text)) == text:
        return int(text) if int(text) < count else None
    return None
