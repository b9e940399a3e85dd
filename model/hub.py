"""Models on the Hugging Face Hub, by huggingface_hub: `hf:owner/name` or `hf:owner/name@revision`.

Only what is read is downloaded: first the configs, which say what the model is, then the weights of the
network that will be taken, as safetensors. They are kept in huggingface_hub's cache. A commit that is in
there needs no Hub; a branch or a tag is looked up where the Hub can be reached. Every file is compared with
the Hub's checksum of it: sha256 of weights, and git's own of small files.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from model import layout, pipeline
from model.folder import MANIFEST, CheckpointError, read_json, sha256

logger = logging.getLogger(__name__)

PREFIX = "hf:"
_REFERENCE = re.compile(rf"{PREFIX}(?P<repository>[^@\s]+)(?:@(?P<revision>\S+))?")
DESCRIPTIONS = (layout.INDEX, "*config.json", "typicality.json", MANIFEST)
WEIGHTS = ("*.safetensors", "*.index.json")


def locate(model: str) -> Path:
    """The path to a model: itself, or the folder that what is read of a repository has been downloaded to.

    Raises CheckpointError where that is not possible.
    """
    if not model.startswith(PREFIX):
        return Path(model)
    reference = _REFERENCE.fullmatch(model)
    if reference is None:
        raise CheckpointError(f"{model}: a model on the Hub is hf:owner/name or hf:owner/name@revision")
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # which has a line for every request
    repository = reference["repository"]
    folder = _fetch(model, repository, reference["revision"], DESCRIPTIONS, ignore="*/*/*")
    commit = folder.name  # what comes next is of the same one, whatever happens on the Hub meanwhile
    index = folder / layout.INDEX
    try:
        network = pipeline.components_of(read_json(index) if index.exists() else {}).network
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from error
    for place in (f"{network}_ema/", f"{network}/", ""):
        if (folder / place / layout.CONFIG).exists():
            _fetch(model, repository, commit, [place + name for name in WEIGHTS], ignore=f"{place}*/*")
            if any((folder / place).glob(WEIGHTS[0])):
                break
    else:
        raise CheckpointError(
            f"{model}: no network with safetensors weights; pickles that you trust can be downloaded and"
            " converted (python -m model.convert)"
        )
    if (folder / "classifier" / layout.CONFIG).exists():
        _fetch(model, repository, commit, ["classifier/*.safetensors"])
    checked = [_check(path) for path in folder.rglob("*") if path.is_file()]
    share = "all" if all(checked) else f"{sum(checked)} of them"
    logger.info("%s is commit %s: %d files, %s with the Hub's checksums", model, commit, len(checked), share)
    return folder


def _fetch(
    model: str, repository: str, revision: str | None, patterns: Sequence[str], ignore: str | None = None
) -> Path:
    """Download what is not cached of the files of these names. Returns the folder of the revision."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{model}: huggingface_hub is not installed (pip install huggingface_hub)"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignore
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: its owner gives access on request; set HF_TOKEN to a token that has it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such repository, or a private one, which needs HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: the repository has no such revision") from error
    except errors.LocalEntryNotFoundError as error:
        reason = error.__cause__ or "HF_HUB_OFFLINE is set"
        raise CheckpointError(
            f"{model}: not in the cache, and the Hub cannot be reached ({_line(reason)})"
        ) from error
    except Exception as error:  # whatever else a network, a disk or a cache may do
        raise CheckpointError(f"{model}: cannot be downloaded ({_line(error)})") from error
    return Path(folder)


def _line(reason: object) -> str:
    """The first line of a library's message."""
    return str(reason).strip().partition("\n")[0] or type(reason).__name__


def _check(path: Path) -> bool:
    """Compare a cached file with the Hub's checksum, by which the cache names its content, if it is known.

    Raises CheckpointError at a difference.
    """
    if not path.is_symlink():
        return False  # a system without links has copies under the names of the repository
    expected = path.readlink().name
    content = path.resolve()
    if len(expected) == 64:
        found = sha256(content)
    elif len(expected) == 40:  # of a git blob
        data = content.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    else:
        return False
    if found != expected:
        raise CheckpointError(
            f"{path}: damaged, its checksum is not the Hub's: remove {content} and start again"
        )
    return True
