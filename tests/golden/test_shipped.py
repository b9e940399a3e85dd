"""The included models make the pictures that shipped.json has: the same bytes on machines of one kind.

`python -m tests.golden.shipped` writes that file; it is written anew only where pictures are meant to change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint
from tests.golden.shipped import FILE, NAMES, WEIGHTS, Pixels, kind_of_machine, pictures, pixels_of

GOLDEN: dict[str, Any] = json.loads(FILE.read_text())
TOLERANCES = {"float32": 0.05, "bfloat16": 2.5}
"""Mean difference of pixels, in levels of 255, from those of another kind of machine."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As when they were recorded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mean_difference(found: Pixels, golden: Pixels) -> float:
    return float(np.abs(found.astype(np.int16) - golden).mean())


def test_every_model_runtime_and_dtype_is_there() -> None:
    assert GOLDEN["pictures"].keys() == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_are_the_golden_ones(name: str) -> None:
    model, runtime, dtype = name.split()
    found, golden = pictures(checkpoint.load(WEIGHTS / model), runtime, dtype), GOLDEN["pictures"][name]
    assert mean_difference(found, pixels_of(golden)) <= TOLERANCES[dtype]
    if kind_of_machine() == GOLDEN["machine"]:
        assert hashlib.sha256(found.tobytes()).hexdigest() == golden["sha256"]


def test_other_weights_are_seen() -> None:
    model = checkpoint.load(WEIGHTS / "avatars")
    with torch.no_grad():
        model.unet.get_parameter("conv_out.weight").mul_(1.02)
    found = pictures(model, "torch", "float32")
    golden = pixels_of(GOLDEN["pictures"]["avatars torch float32"])
    assert mean_difference(found, golden) > TOLERANCES["float32"]


def test_dtypes_come_near_each_other() -> None:
    for name in NAMES[::2]:
        other = name.replace("float32", "bfloat16")
        one, two = (pixels_of(GOLDEN["pictures"][each]) for each in (name, other))
        assert mean_difference(one, two) < 3
