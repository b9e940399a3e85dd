from __future__ import annotations

from pathlib import Path

import pytest

from model.files import replace_text, replacing


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_content_stays_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    replace_text(path, "old")
    with replacing(path) as part:
        part.write_text("ne")
        assert path.read_text() == "old"
    assert path.read_text() == "ne"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_content_and_no_part(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.npz"
    replace_text(path, "old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert not path.exists()
