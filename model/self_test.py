"""One evaluation of the network whose result is known: does this machine compute what the weights' maker did?

A folder may have the file `self_test.json`: an input by seed, a timestep and a label, and some values of what
the network makes of them in float32. Every engine evaluates that before it is ready. A faulty driver, memory
that flips bits, or a kernel that is wrong for one processor then shows before anybody gets a picture.
`python -m model.evaluation.self_test FOLDER` writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.files import replace_text
from model.folder import CheckpointError, read_json
from model.noise import MAX_SEED, START, normal

FILE = "self_test.json"
MAX_VALUES = 4096
TOLERANCES = {"float32": 0.02, "bfloat16": 0.1, "float16": 0.02}
"""Of the largest difference, in standard deviations of the values. Float32 may be TF32 on a GPU."""
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class SelfTest:
    """What goes in, and what comes out.

    seed: of x, by model/noise.py. timestep: as the network sees it. values: evenly spaced ones of its output.
    tolerances: by dtype, of `difference`.
    """

    seed: int
    timestep: float
    label: int | None
    values: tuple[float, ...]
    tolerances: dict[str, float]

    def evaluate(
        self, forward: Forward, shape: Sequence[int], device: torch.device | str
    ) -> tuple[float, ...]:
        """As many values of the network's output as there are here. shape: of one input, (C, H, W)."""
        return evaluate(forward, shape, self.seed, self.timestep, self.label, len(self.values), device)

    def difference(self, found: Sequence[float]) -> float:
        """How far values are from these: the largest difference, in standard deviations of these."""
        expected = np.asarray(self.values)
        return float(np.abs(np.asarray(found) - expected).max() / max(expected.std(), 1e-12))


def evaluate(
    forward: Forward,
    shape: Sequence[int],
    seed: int,
    timestep: float,
    label: int | None,
    count: int,
    device: torch.device | str = "cpu",
) -> tuple[float, ...]:
    """Evenly spaced values of the output for one row of noise: `count`, or all where there are fewer."""
    x = torch.from_numpy(normal(seed, START, shape))[None].to(device)
    t = torch.tensor([timestep], dtype=torch.float32, device=device)
    y = None if label is None else torch.tensor([label], dtype=torch.int64, device=device)
    with torch.inference_mode():
        out = forward(x, t, y).flatten().float().cpu().numpy()
    places = np.linspace(0, len(out) - 1, min(count, len(out))).astype(np.int64)
    return tuple(float(value) for value in out[places])


def load(path: Path, outputs: int) -> SelfTest:
    """Read a `self_test.json`. outputs: values of one output of the network. Raises CheckpointError."""
    content = read_json(path)
    try:
        found = SelfTest(
            int(content["seed"]),
            float(content["timestep"]),
            None if content["label"] is None else int(content["label"]),
            tuple(float(value) for value in content["values"]),
            {str(name): float(value) for name, value in content["tolerances"].items()},
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as a self-test ({error!r})") from error
    if not 1 <= len(found.values) <= min(MAX_VALUES, outputs) or not 0 <= found.seed <= MAX_SEED:
        raise CheckpointError(f"{path}: its values or its seed cannot be of this network")
    numbers = (found.timestep, *found.values, *found.tolerances.values())
    if not np.isfinite(numbers).all() or not 0 <= found.timestep < 1e9:
        raise CheckpointError(f"{path}: it has numbers that are not finite, or a negative timestep")
    return found


def save(path: Path, test: SelfTest) -> None:
    """Write it, completely or not at all."""
    replace_text(path, json.dumps(asdict(test), indent=1) + "\n")
