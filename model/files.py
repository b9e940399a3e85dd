"""Write a file completely or not at all: into a part file beside it, which then takes its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It becomes `path` when the block ends, and is removed when it raises.

    Whoever reads `path` sees the old content or the new, never a part of it.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as part:
        part.write_text(text)
