"""Files of a model folder: read as what they should be, and compared with a manifest of their checksums.

A folder may come from anywhere, so nothing in it is trusted: only regular files are opened, JSON only up to a
size, and a manifest has to list what is loaded. The manifest is what `sha256sum` writes and
`sha256sum --check` reads, in both of its forms: `DIGEST  PATH` and, with `--tag`, `SHA256 (PATH) = DIGEST`.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "SHA256SUMS"
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins; what it stands for is elsewhere."""
MAX_TEXT = 8 << 20
"""Bytes of a JSON file or a manifest. An index of a thousand shards, or 20,000 class names, take a tenth."""
MAX_MESSAGE = 2000
"""Characters; of a longer one the middle is left out."""
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<path>.+)", re.IGNORECASE)
_TAGGED_LINE = re.compile(r"SHA256 \((?P<path>.+)\) ?= ?(?P<digest>[0-9a-f]{64})", re.IGNORECASE)


class CheckpointError(ValueError):
    """A model folder cannot be loaded; the message is one line that names the file and the reason.

    Names and values of the folder are part of it, so that it is made one line here, and not a long one.
    """

    def __init__(self, message: str) -> None:
        line, half = " ".join(message.splitlines()), MAX_MESSAGE // 2
        super().__init__(line if len(line) <= MAX_MESSAGE else f"{line[:half]} … {line[-half:]}")


def is_there(path: Path) -> bool:
    """Whether there is something of this name, if only a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def check_regular(path: Path) -> None:
    """Raises CheckpointError for what is there but no file: a FIFO would be waited for, a device never end.

    Raises FileNotFoundError for what is not there, and OSError for what cannot be looked at.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: not a regular file")


def read_small(path: Path) -> bytes:
    """The content of a small file. Raises CheckpointError where that is not what it is, or it is missing."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(MAX_TEXT + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > MAX_TEXT:
        raise CheckpointError(f"{path}: larger than {MAX_TEXT >> 20} MiB")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises CheckpointError for any other."""
    data = read_small(path)
    try:
        content = json.loads(data.decode())
        # Half a surrogate pair can be written as \ud800, but neither be sent nor stored later.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return content


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError for a file that Git LFS keeps elsewhere."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
    except (OSError, CheckpointError):
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
            check_regular(path)
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def manifest_of(folder: Path, files: Iterable[Path]) -> str:
    """The text of a manifest of these files, in order of their names."""
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in sorted(files))


def check_manifest(folder: Path, loaded: Iterable[Path] = (), *, partial: bool = False) -> None:
    """Compare the folder with its manifest, when it has one. Raises CheckpointError at a difference.

    loaded: files that have to be listed where they are in this folder, since a manifest that leaves them out
    checks nothing. partial: files that are listed may be missing, since only some were downloaded.
    """
    manifest = folder / MANIFEST
    if not is_there(manifest):
        return
    listed = set()
    for path, expected in _read_manifest(manifest):
        listed.add(path)
        if not path.exists():
            if partial:
                continue
            raise CheckpointError(f"{path}: listed in {MANIFEST} but missing")
        if sha256(path) != expected:
            refuse_pointer(path)
            raise CheckpointError(f"{path}: its sha256 is not the one in {MANIFEST}")
    for path in loaded:
        if path.is_relative_to(folder) and path not in listed:
            raise CheckpointError(f"{path}: not listed in {MANIFEST}, so that nothing says what is in it")


def _read_manifest(manifest: Path) -> Iterator[tuple[Path, str]]:
    """The files that a manifest lists, and their digests in lower case."""
    try:
        lines = read_small(manifest).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{manifest}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line) or _TAGGED_LINE.fullmatch(line)
        if found is None:
            raise CheckpointError(
                f"{manifest}: line {number} is neither `DIGEST  PATH` nor `SHA256 (PATH) = DIGEST`"
            )
        place = PurePosixPath(found["path"])
        if place.is_absolute() or ".." in place.parts or "\0" in found["path"]:
            raise CheckpointError(f"{manifest}: line {number} is about a file that is not in this folder")
        yield manifest.parent / place, found["digest"].lower()
