"""Files of a model folder: read as what they should be, and compared with a manifest of their checksums.

The manifest is what `sha256sum` writes and `sha256sum --check` reads, in both of its forms: `DIGEST  PATH`
and, with `--tag`, `SHA256 (PATH) = DIGEST`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "SHA256SUMS"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins; what it stands for is elsewhere."""
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<path>.+)", re.IGNORECASE)
_TAGGED_LINE = re.compile(r"SHA256 \((?P<path>.+)\) ?= ?(?P<digest>[0-9a-f]{64})", re.IGNORECASE)


class CheckpointError(ValueError):
    """A model folder cannot be loaded; the message is one line that names the file and the reason."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises CheckpointError for any other."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return content


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError for a file that Git LFS keeps elsewhere."""
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except OSError:
        return
    if begins == POINTER:
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the file itself: run git lfs pull in its repository"
        )


def sha256(*paths: Path) -> str:
    """The checksum of these files, one after the other. Raises CheckpointError where one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def manifest_of(folder: Path, files: Iterable[Path]) -> str:
    """The text of a manifest of these files, in order of their names."""
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(files))


def check_manifest(folder: Path, *, partial: bool = False) -> None:
    """Compare the folder with its manifest, when it has one. Raises CheckpointError at a difference.

    partial: files that are listed may be missing, since only some were downloaded.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    for path, expected in _read_manifest(manifest):
        if not path.is_file():
            if partial:
                continue
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing")
        if sha256(path) != expected:
            refuse_pointer(path)
            raise CheckpointError(f"{path}: its sha256 is not the one in {MANIFEST}")


def _read_manifest(manifest: Path) -> Iterator[tuple[Path, str]]:
    """The files that a manifest lists, and their digests in lower case."""
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line) or _TAGGED_LINE.fullmatch(line)
        if found is None:
            raise CheckpointError(
                f"{manifest}: line {number} is neither `DIGEST  PATH` nor `SHA256 (PATH) = DIGEST`"
            )
        yield manifest.parent / found["path"], found["digest"].lower()
