"""Manifests in all forms that sha256sum writes, and files that are not what they should be."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from model.folder import MANIFEST, CheckpointError, check_manifest, manifest_of, read_json, sha256

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 35746866\n"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder with a file of a few bytes in it, and another."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "a (1).bin").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    return tmp_path


DIGEST = hashlib.sha256(b"abc").hexdigest()
FORMS = {
    "text": f"{DIGEST}  unet/a (1).bin\n",
    "binary": f"{DIGEST} *unet/a (1).bin\n",
    "upper case": f"{DIGEST.upper()}  unet/a (1).bin\n",
    "tag": f"SHA256 (unet/a (1).bin) = {DIGEST}\n",
    "dot": f"{DIGEST}  ./unet/a (1).bin\n",
    "blank lines and comments": f"# weights\n\n{DIGEST}  unet/a (1).bin\n  \n",
    "Windows": f"\ufeff{DIGEST}  unet/a (1).bin\r\n",
    "no end of line": f"{DIGEST}  unet/a (1).bin",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_manifest_is_read(listed: Path, form: str) -> None:
    (listed / MANIFEST).write_bytes(FORMS[form].encode())
    check_manifest(listed)
    (listed / "unet" / "a (1).bin").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=r"unet/a \(1\).bin: its sha256 is not the one"):
        check_manifest(listed)


@pytest.mark.parametrize(
    "line",
    [
        DIGEST,
        f"{DIGEST} unet/a",
        f"{DIGEST[:-1]}  unet/a",
        f"{'g' * 64}  unet/a",
        f"MD5 (unet/a) = {DIGEST[:32]}",
        f"SHA256 unet/a = {DIGEST}",
        "unet/a",
    ],
)
def test_a_malformed_line_is_named(listed: Path, line: str) -> None:
    (listed / MANIFEST).write_text(f"# checksums\n{line}\n")
    with pytest.raises(CheckpointError, match=r"SHA256SUMS: line 2 is neither") as refused:
        check_manifest(listed)
    assert "\n" not in str(refused.value)


def test_a_manifest_of_bytes_is_refused(listed: Path) -> None:
    (listed / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="SHA256SUMS: cannot be read"):
        check_manifest(listed)


def test_only_of_a_part_may_files_be_missing(listed: Path) -> None:
    (listed / MANIFEST).write_text(f"{DIGEST}  README.md\n{'0' * 64}  b\n")
    with pytest.raises(CheckpointError, match=r"README.md: listed in SHA256SUMS but missing"):
        check_manifest(listed)
    with pytest.raises(CheckpointError, match="b: its sha256 is not the one"):
        check_manifest(listed, partial=True)


def test_what_is_written_is_read(listed: Path) -> None:
    (listed / MANIFEST).write_text(manifest_of(listed, [listed / "unet" / "a (1).bin", listed / "b"]))
    assert (listed / MANIFEST).read_text().splitlines()[1] == FORMS["text"].strip()
    check_manifest(listed)


def test_the_checksum_of_several_files_is_that_of_all_their_bytes(listed: Path) -> None:
    assert sha256(listed / "b", listed / "unet" / "a (1).bin") == DIGEST
    with pytest.raises(CheckpointError, match=r"c: cannot be read \(No such file"):
        sha256(listed / "c")


def test_a_pointer_of_git_lfs_is_named(listed: Path) -> None:
    path = listed / "b"
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match="b: a Git LFS pointer, not the file itself: run git lfs pull"):
        read_json(path)
    (listed / MANIFEST).write_text(f"{DIGEST}  b\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer"):
        check_manifest(listed)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_what_is_not_an_object_is_named(listed: Path, content: bytes) -> None:
    (listed / "b").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"/b: (not readable as JSON|a JSON object is expected)"):
        read_json(listed / "b")
