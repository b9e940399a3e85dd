"""The state of samples on the device, in slots, and what is uploaded for a step.

A slot holds x_t and the latest x₀ prediction of one sample, and the image of one whose pixels are partly
known. Everything else that a step needs to know of its samples is small, and goes to the device in one array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.chain import Chain, Image, KnownPixels
from model.runtimes import to_device
from model.samplers import COEFFICIENTS

SnapshotKind = Literal["x0", "xt", "before"]
"""A sample's x₀ prediction of a step, its x_t after it, or the x_t that the step began with."""

INTEGERS = ("source", "target", "pair", "t", "y", "seed", "step")
FLOATS = len(COEFFICIENTS) + len(COEFFICIENTS) % 2
"""float32 values of a row: two share the place of an integer."""
Columns = Mapping[str, Tensor]
"""Of an upload: INTEGERS each [R] int64, COEFFICIENTS each [R, 1, 1, 1] float32."""


@dataclass(eq=False, slots=True)
class Row:
    """The next step of one sample.

    slot: where its state is. At step 0 it begins there with its chain's initial latent; carried: what the
    stage before it left, for a chain that begins from that. pictures: what is rendered of this step. arrays:
    what is needed of it as float32.
    """

    chain: Chain
    slot: int
    step: int
    carried: Sequence[Image] = ()
    pictures: tuple[SnapshotKind, ...] = ()
    arrays: tuple[SnapshotKind, ...] = ()


class Slots:
    """x, x0: [1 + S, C, H, W] float32. image, mask: as those, from the first sample with known pixels on.

    condition: [1 + S, K, H, W] float32 for a network that takes K channels beside x; else None.

    Place 0 is nobody's: rows that are not samples are written there. Slot i is at place i + 1.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, conditions: int = 0) -> None:
        self.shape, self.device = shape, device
        self.condition = self._zeros(1, channels=conditions) if conditions else None
        self.image: Tensor | None = None
        self.mask: Tensor | None = None
        self.x, self.x0 = self._zeros(1), self._zeros(1)

    def __len__(self) -> int:
        return len(self.x) - 1

    def reserve(self, count: int) -> bool:
        """Have at least so many slots. Returns whether that took other memory than before."""
        if count <= len(self):
            return False
        self.x, self.x0 = self._grown(self.x, 1 + count), self._grown(self.x0, 1 + count)
        if self.image is not None and self.mask is not None:
            self.image, self.mask = self._grown(self.image, 1 + count), self._grown(self.mask, 1 + count)
        if self.condition is not None:
            self.condition = self._grown(self.condition, 1 + count)
        return True

    def put(self, slot: int, x: Image) -> None:
        """Begin a sample with x [C, H, W], which may be read-only."""
        self.x[place(slot)] = self._sent(x)

    def give(self, slot: int, condition: Image | None) -> None:
        """Note what the network is given beside a sample, if it takes that."""
        if condition is not None and self.condition is not None:
            self.condition[place(slot)] = self._sent(condition)

    def know(self, slot: int, known: KnownPixels | None) -> None:
        """Note which pixels of a sample are known, if any."""
        if known is not None:
            if self.image is None or self.mask is None:
                self.image, self.mask = self._zeros(len(self.x)), self._zeros(len(self.x), torch.bool)
            self.image[place(slot)] = self._sent(known.image)
            self.mask[place(slot)] = self._sent(np.broadcast_to(known.mask, self.shape))
        elif self.mask is not None:
            self.mask[place(slot)] = False

    def _sent(self, values: NDArray[np.float32] | NDArray[np.bool_]) -> Tensor:
        return to_device(torch.from_numpy(np.array(values)), self.device)

    def _zeros(self, count: int, dtype: torch.dtype = torch.float32, channels: int | None = None) -> Tensor:
        shape = count, channels or self.shape[0], *self.shape[1:]
        if self.device.type == "cpu":  # NumPy's zeros take memory only where something is written
            kind = np.bool_ if dtype == torch.bool else np.float32
            return torch.from_numpy(np.zeros(shape, kind))
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _grown(self, old: Tensor, count: int) -> Tensor:
        new = self._zeros(count, old.dtype, old.shape[1])
        new[: len(old)] = old
        return new


def place(slot: int) -> int:
    """Where a slot's state is."""
    return slot + 1


def places_of(rows: Sequence[Row]) -> Tensor:
    """[N] int64, in host memory."""
    return torch.tensor([place(row.slot) for row in rows])


def pack(
    rows: Sequence[Row], coefficients: NDArray[np.float32], guided: Sequence[int], null: int, size: int
) -> NDArray[np.int64]:
    """The upload of a step: [size, len(INTEGERS) + FLOATS / 2] int64. coefficients: of each row's step.

    Samples first, then the unconditional rows of those at `guided`, then padding. source, target: the places
    that a row's state comes from and goes to, which is nobody's for all but the samples. pair: the row of the
    same sample without its class; null: the class of that row.
    """
    count = len(rows)
    upload = np.empty((size, len(INTEGERS) + FLOATS // 2), np.int64)
    upload[:count, : len(INTEGERS)] = [
        (
            place(row.slot),
            place(row.slot),
            index,
            row.chain.plan.timesteps[row.step],
            null if row.chain.label is None else row.chain.label,
            0,
            row.step,
        )
        for index, row in enumerate(rows)
    ]
    upload[:count, INTEGERS.index("seed")] = np.array([row.chain.seed for row in rows], np.uint64).view(
        np.int64
    )
    floats = upload.view(np.float32)[:count, 2 * len(INTEGERS) :]
    floats[:, : len(COEFFICIENTS)] = coefficients
    upload[count:] = upload[0]
    for pair, index in enumerate(guided, count):
        upload[pair] = upload[index]
        upload[pair, INTEGERS.index("y")] = null
        upload[index, INTEGERS.index("pair")] = pair
    upload[count:, INTEGERS.index("target")] = 0
    upload[count:, INTEGERS.index("pair")] = np.arange(count, size)
    return upload


def unpack(upload: Tensor) -> dict[str, Tensor]:
    """The columns of an upload, as views of it."""
    integers = dict(zip(INTEGERS, upload[:, : len(INTEGERS)].unbind(1), strict=True))
    floats = upload.view(torch.float32)[:, 2 * len(INTEGERS) :, None, None, None].unbind(1)
    return integers | dict(zip(COEFFICIENTS, floats, strict=False))
