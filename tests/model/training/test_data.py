from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.training import data
from model.training.data import (
    DataError,
    Dataset,
    MissingSplitError,
    PictureFiles,
    choose_images,
    load,
    load_idx,
    load_pictures,
    load_splits,
    pad_to,
    read_idx,
)

IMAGES = np.arange(5 * 6 * 4, dtype=np.uint8).reshape(5, 6, 4)
LABELS = np.array([0, 2, 1, 1, 0], np.uint8)


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_split(folder: Path, split: str = "train") -> None:
    (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_idx_plain_and_gzipped(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(idx(IMAGES))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(IMAGES)))
    np.testing.assert_array_equal(read_idx(tmp_path / "plain"), IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / "zipped.gz"), IMAGES)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("magic", b"PNG!" + bytes(20), "not an IDX file of unsigned bytes .it starts with 50 4e 47 21"),
        ("type", struct.pack(">HBBI", 0, 0x0D, 1, 4) + bytes(16), "not an IDX file of unsigned bytes"),
        ("empty", b"", "not an IDX file"),
        ("short", idx(IMAGES)[:-1], "135 bytes, but its header promises 136"),
        ("long", idx(IMAGES) + b"!", "137 bytes, but its header promises 136"),
        ("header", idx(IMAGES)[:9], "9 bytes, but its header promises"),
        ("scalar", b"\0\0\x08\0", "4 bytes, but its header promises"),
        ("cut.gz", gzip.compress(idx(IMAGES), mtime=0)[:-12], "cannot be read"),
        (
            "corrupt.gz",
            gzip.compress(idx(IMAGES), mtime=0)[:10] + b"\xff" * 40,
            "cannot be read.*invalid block type",
        ),
        ("plain.gz", idx(IMAGES), "cannot be read"),
    ],
)
def test_a_bad_idx_file_is_named_with_its_fault(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {reason}"):
        read_idx(tmp_path / name)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        read_idx(tmp_path / "nowhere")


def test_padding_centres_on_black() -> None:
    padded = pad_to(IMAGES + 1, (9, 9))
    assert padded.shape == (5, 9, 9)
    np.testing.assert_array_equal(padded[:, 1:7, 2:6], IMAGES + 1)
    assert padded.sum() == (IMAGES + 1).sum(dtype=np.int64)
    with pytest.raises(DataError, match="6×4 do not fit into 5×5"):
        pad_to(IMAGES, (5, 5))


def test_an_idx_folder(tmp_path: Path) -> None:
    write_split(tmp_path)
    dataset = load(tmp_path, (8, 8), 1)
    assert len(dataset) == 5
    assert dataset.images.shape == (5, 1, 8, 8)
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.labels.dtype == np.int64
    assert dataset.class_names == ("0", "1", "2")
    batch = dataset.batch(np.array([3, 0]))
    assert batch.dtype == np.float32
    np.testing.assert_array_equal(batch[:, 0, 1:7, 2:6], IMAGES[[3, 0]].astype(np.float32) / 127.5 - 1)
    assert batch.min() == -1


def test_names_for_idx_classes(tmp_path: Path) -> None:
    write_split(tmp_path)
    assert load_idx(tmp_path, "train", (8, 8), ["cat", "dog", "fox"]).class_names == ("cat", "dog", "fox")
    with pytest.raises(DataError, match="label 2 has no name among 2"):
        load_idx(tmp_path, "train", (8, 8), ["cat", "dog"])


def test_fashion_mnist_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((10, 4, 4), np.uint8)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(10, dtype=np.uint8)))
    assert load(folder, (4, 4), 1).class_names[-1] == "ankle boot"


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    write_split(tmp_path)
    for labels in (LABELS[:4], LABELS.reshape(5, 1)):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        with pytest.raises(DataError, match="do not belong together"):
            load(tmp_path, (8, 8), 1)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:0]))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:0])))
    with pytest.raises(DataError, match="do not belong together"):
        load(tmp_path, (8, 8), 1)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere", (8, 8), 1)
    with pytest.raises(DataError, match="no pictures"):
        load(tmp_path, (8, 8), 1)
    write_split(tmp_path)
    with pytest.raises(MissingSplitError, match="no file t10k-images"):
        load(tmp_path, (8, 8), 1, "t10k")
    with pytest.raises(DataError, match="one channel, the network wants 3"):
        load(tmp_path, (8, 8), 3)


def test_a_class_is_a_sub_folder_with_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "red" / "b.png", (255, 0, 0))
    picture(tmp_path / "red" / "deeper" / "a.JPEG", (250, 0, 0))
    picture(tmp_path / "green" / "c.webp", (0, 255, 0))
    (tmp_path / "red" / "notes.txt").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    dataset = load(tmp_path, (8, 8), 3)
    assert dataset.class_names == ("green", "red")
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.images.shape == (3, 3, 8, 8)
    channel = dataset.batch(np.arange(3)).mean(axis=(2, 3)).argmax(axis=1)
    assert channel.tolist() == [1, 0, 0]


def test_pictures_without_sub_folders_have_no_class(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (255, 255, 255))
    dataset = load(tmp_path, (4, 4), 1)
    assert (dataset.class_names, dataset.labels.tolist()) == ((), [0])
    np.testing.assert_array_equal(dataset.batch(np.array([0])), np.ones((1, 1, 4, 4), np.float32))


def test_splits_of_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "red" / "a.png", (255, 0, 0))
    with pytest.raises(MissingSplitError, match="no sub-folder test"):
        load(tmp_path, (8, 8), 3, "test")  # the training pictures must not pass for held-out ones
    picture(tmp_path / "test" / "red" / "b.png", (255, 0, 0))
    picture(tmp_path / "test" / "red" / "c.png", (255, 0, 0))
    assert [len(load(tmp_path, (8, 8), 3, split)) for split in ("train", "test")] == [1, 2]
    assert load(tmp_path, (8, 8), 3).class_names == ("red",)


def test_pictures_are_cropped_to_their_centre_and_scaled(tmp_path: Path) -> None:
    wide = Image.new("RGB", (24, 8), (255, 255, 255))
    wide.paste((0, 0, 0), (8, 0, 16, 8))
    wide.save(tmp_path / "wide.png")
    assert load(tmp_path, (4, 4), 3).batch(np.array([0])).max() == -1, "only the black middle"


def test_sizes_need_not_be_square(tmp_path: Path) -> None:
    assert pad_to(IMAGES, (6, 8)).shape == (5, 6, 8)
    with pytest.raises(DataError, match="6×4 do not fit into 8×3"):
        pad_to(IMAGES, (8, 3))
    wide = Image.new("RGB", (24, 12), (255, 255, 255))
    wide.paste((0, 0, 0), (0, 0, 24, 6))  # black above white
    wide.save(tmp_path / "wide.png")
    images = load(tmp_path, (4, 8), 3).images[np.arange(1)]  # of the same aspect: nothing is cropped
    assert images.shape == (1, 3, 4, 8)
    assert images[0, :, 0].max() < 64 < 192 < images[0, :, 3].min()
    tall = Image.new("RGB", (8, 24), (255, 255, 255))
    tall.paste((0, 0, 0), (0, 10, 8, 14))
    tall.save(tmp_path / "wide.png")
    assert load(tmp_path, (2, 4), 3).images[np.arange(1)].max() == 0, "only the black middle"


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pictures_have_as_many_channels_as_the_network(tmp_path: Path, channels: int) -> None:
    Image.new("RGBA", (4, 4), (200, 200, 200, 50)).save(tmp_path / "a.png")
    pixels = load(tmp_path, (4, 4), channels).images[np.arange(1)][0, :, 0, 0]
    assert pixels.tolist() == {1: [200], 2: [200, 50], 3: [200] * 3, 4: [200, 200, 200, 50]}[channels]
    with pytest.raises(DataError, match="1 to 4 channels, the network wants 5"):
        load(tmp_path, (4, 4), 5)


def test_pictures_over_the_limit_are_decoded_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        picture(tmp_path / "class" / f"{i}.png", (i, i, i))
    at_once = load_pictures(tmp_path, (8, 8))
    monkeypatch.setattr(data, "IN_MEMORY_BYTES", 3 * 3 * 8 * 8 - 1)
    opened: list[Path] = []
    read = PictureFiles._read

    def noted(self: PictureFiles, path: Path) -> data.Pixels:
        opened.append(path)
        return read(self, path)

    monkeypatch.setattr(PictureFiles, "_read", noted)
    lazy = load_pictures(tmp_path, (8, 8))
    assert not opened
    assert lazy.images.shape == at_once.images.shape
    np.testing.assert_array_equal(lazy.batch(np.array([2, 1])), at_once.batch(np.array([2, 1])))
    assert [path.name for path in opened] == ["2.png", "1.png"]


def corrupted(good: bytes) -> dict[str, bytes]:
    middle = len(good) // 2
    return {
        "text": b"not a picture",
        "cut": good[:middle],
        "flipped": good[:middle] + bytes(b ^ 0xFF for b in good[middle : middle + 8]) + good[middle + 8 :],
        "empty": b"",
    }


@pytest.mark.parametrize("fault", ["text", "cut", "flipped", "empty"])
def test_a_bad_picture_is_named(tmp_path: Path, fault: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes(corrupted((tmp_path / "bad.png").read_bytes())[fault])
    with pytest.raises(DataError, match=r"bad.png: not a readable picture"):
        load(tmp_path, (8, 8), 3)


def write_digits(folder: Path, digits: dict[int, np.ndarray]) -> None:
    """As the npm package has them: thousandths from 0 to 1."""
    for digit, images in digits.items():
        values = [round(value / 255, 3) for value in images.ravel().tolist()]
        (folder / f"{digit}.json").write_text(json.dumps({"data": values}))


def test_digits_as_json(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    digits = {digit: random.integers(0, 256, (count, 28, 28)) for digit, count in ((0, 2), (1, 3))}
    write_digits(tmp_path, digits)
    found = data.load(tmp_path, (32, 32), 1)
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.class_names == ("0", "1")
    images = found.images[np.arange(5)]
    np.testing.assert_array_equal(images[:, 0, 2:30, 2:30], np.concatenate(list(digits.values())))
    assert images.dtype == np.uint8
    assert images[:, :, :2].max() == 0
    with pytest.raises(DataError, match="no sub-folder test"):
        data.load(tmp_path, (32, 32), 1, "test")


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"data": [1, 2, 3]}', '{"data": "x"}'])
def test_bad_digits_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "0.json").write_text(text)
    with pytest.raises(DataError, match=r"0\.json: not digits"):
        data.load(tmp_path, (32, 32), 1)


def labelled(counts: list[int]) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    names = tuple(str(i) for i in range(len(counts)))
    return Dataset(np.zeros((len(labels), 1, 8, 8), np.uint8), labels, names)


def test_a_balanced_draw_has_the_classes_that_are_asked_for() -> None:
    dataset = labelled([20, 30, 10])
    index = choose_images(dataset, 25, balanced=True)
    assert (dataset.labels[index] == np.arange(25) % 3).all()
    assert len(set(index.tolist())) == 25
    assert (index == choose_images(dataset, 25, balanced=True)).all()
    assert (index != choose_images(dataset, 25, balanced=True, seed=1)).any()


def test_an_unbalanced_draw_takes_the_classes_as_they_come() -> None:
    dataset = labelled([900, 100])
    index = choose_images(dataset, 500, balanced=False)
    assert len(set(index.tolist())) == 500
    assert dataset.labels[index].mean() == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize(("balanced", "most"), [(True, 30), (False, 60)])
def test_no_more_is_drawn_than_there_is(balanced: bool, most: int) -> None:
    dataset = labelled([20, 30, 10])
    assert len(choose_images(dataset, most, balanced)) == most
    with pytest.raises(DataError, match=f"at most {most}"):
        choose_images(dataset, most + 1, balanced)


def test_folders_of_pictures_need_both_splits(tmp_path: Path) -> None:
    def fill(split: str) -> None:
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 9), "teal").save(tmp_path / split / name / "1.png")

    fill("train")
    with pytest.raises(DataError, match="no folder test/"):
        load_splits(tmp_path, (8, 8), 3, None)
    fill("test")
    train_set, test_set = load_splits(tmp_path, (8, 8), 3, None)
    assert train_set.class_names == test_set.class_names == ("cat", "dog")
    assert train_set.images.shape == (2, 3, 8, 8)
