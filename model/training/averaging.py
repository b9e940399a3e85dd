"""Averages of the weights whose length is chosen after training (Karras et al. 2024, §3).

An average over a training of t steps gives θ(τ) the weight τ^γ, so it reaches back by a share of the training
and not by so many steps; the width of that profile, σ_rel, stands for γ. Two such averages are kept while
training and written from time to time. Any other is a linear combination of what was written: the one whose
profile comes closest to its own.

    python -m model.training.averaging FOLDER --std 0.1 --out OTHER

writes a model folder with the average of that width over the training in FOLDER, which
`model.training.train --snapshot-steps N` has written snapshots of.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import checkpoint
from model.checkpoint import CheckpointError
from model.files import replacing

STDS = (0.05, 0.10)
"""Widths of the averages that are kept while training, as in the paper."""
Array = NDArray[np.float64]


def gamma(std: float) -> float:
    """The exponent γ of a profile τ^γ of width σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)) (eq. 3 there).

    std: 0 < σ_rel < 0.288, where γ would be 0. Raises ValueError outside.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"the width of an average is between 0 and {12**-0.5:.3f}, not {std}")
    inverse = std**-2
    return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))


class PowerAverages:
    """The averages of a network under training. Their tensors are those of `modules`."""

    def __init__(self, net: nn.Module) -> None:
        self.modules = {std: deepcopy(net).requires_grad_(False).eval() for std in STDS}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, of which the first is 1 (eq. 2 there)."""
        for std, module in self.modules.items():
            weight = 1 - (1 - 1 / step) ** (gamma(std) + 1)
            torch._foreach_lerp_(list(module.parameters()), list(net.parameters()), weight)

    def write(self, folder: Path, step: int) -> None:
        """Write a snapshot of all averages into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{std}.{name}": value.contiguous()
            for std, module in self.modules.items()
            for name, value in module.state_dict().items()
        }
        with replacing(folder / f"{step:08d}.safetensors") as part:
            save_file(tensors, part, {"step": str(step)})


def overlap(steps_a: Array, gammas_a: Array, steps_b: Array, gammas_b: Array) -> Array:
    """∫ of the products of two profiles, each of which has the integral 1. [A], [A], [B], [B] → [A, B].

    A profile of γ at step t is (γ + 1) τ^γ / t^(γ + 1) for 0 < τ ≤ t (the paper's algorithm 3).
    """
    t_a, g_a = steps_a[:, None], gammas_a[:, None]
    t_b, g_b = steps_b[None, :], gammas_b[None, :]
    exponent = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent / ((g_a + g_b + 1) * np.maximum(t_a, t_b))


def coefficients(steps: Array, gammas: Array, step: float, std: float) -> Array:
    """How much of each snapshot makes the average of width `std` at `step`: least squares. [N], [N] → [N]."""
    wanted = overlap(steps, gammas, np.array([float(step)]), np.array([gamma(std)]))
    found, *_ = np.linalg.lstsq(overlap(steps, gammas, steps, gammas), wanted, rcond=None)
    return found[:, 0].astype(np.float64)


def average(folder: Path, std: float) -> dict[str, Tensor]:
    """Names and tensors, in float32, of the average of width `std` at the last of a folder's snapshots.

    Raises CheckpointError where there is no snapshot or one cannot be read, ValueError for a width that no
    average has.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no snapshots of averages; train with --snapshot-steps")
    steps = np.repeat([float(path.stem) for path in paths], len(STDS))
    gammas = np.tile([gamma(std) for std in STDS], len(paths))
    shares = coefficients(steps, gammas, steps[-1], std).reshape(len(paths), len(STDS))
    sums: dict[str, Tensor] = {}
    for path, row in zip(paths, shares, strict=True):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    width, name = _split(key)
                    part = float(row[STDS.index(width)]) * file.get_tensor(key).double()
                    sums[name] = sums[name] + part if name in sums else part
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: not a snapshot of averages") from error
    return {name: value.float() for name, value in sums.items()}


def _split(key: str) -> tuple[float, str]:
    """A tensor's name in a snapshot, as "0.05.conv_in.weight", parted."""
    whole, digits, name = key.split(".", 2)
    return float(f"{whole}.{digits}"), name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for a folder or a width that cannot be used."""
    parser = argparse.ArgumentParser(
        "python -m model.training.averaging", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="model folder that was trained with --snapshot-steps")
    parser.add_argument(
        "--std", type=float, default=0.1, help="width of the average, as a share of the training"
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    args = parser.parse_args(argv)
    try:
        model = checkpoint.load(args.folder)
        state = average(args.folder / "training" / "averages", args.std)
        try:
            model.unet.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{args.folder}: the snapshots are of another network") from error
        checkpoint.save(args.out, model)
    except (CheckpointError, ValueError) as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
