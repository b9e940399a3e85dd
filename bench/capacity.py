"""What the machine can do: rows per second of a bare loop over the runtime, at its best batch.

`python -m bench.capacity` prints a line for each batch size. Load 1 of the comparison is the best of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from bench.roofline import row_rates
from model import checkpoint
from model.runtimes import DtypeName, load_runtime

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Capacity:
    """The best batch size and its rows per second; all sizes tried; what ran them."""

    batch_size: int
    rows_per_s: float
    by_batch_size: dict[int, float]
    runtime: str
    dtype: str


def measure(folder: Path, runtime: str = "auto", dtype: str = "auto", seconds: float = 2.0) -> Capacity:
    """Run calls of each batch size for `seconds`. The median call counts, whatever disturbs others."""
    model = checkpoint.load(folder)
    loaded = load_runtime(model, cast("Any", runtime), "cpu", cast("DtypeName", dtype), batch_invariant=False)
    rates = dict(zip(BATCH_SIZES, row_rates(loaded, model, BATCH_SIZES, seconds), strict=True))
    best = max(rates, key=lambda size: rates[size])
    return Capacity(best, rates[best], rates, loaded.name, loaded.dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser("python -m bench.capacity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("weights/fashion-mnist"), help="model folder")
    parser.add_argument("--runtime", default="auto", help="as in the service's settings")
    parser.add_argument("--dtype", default="auto", help="the same")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each batch size")
    parser.add_argument("--json", action="store_true", help="one line for programs")
    args = parser.parse_args(arguments)
    found = measure(args.model, args.runtime, args.dtype, args.seconds)
    if args.json:
        print(json.dumps(asdict(found)))
        return
    for size, rate in found.by_batch_size.items():
        best = "  best" if size == found.batch_size else ""
        print(f"{found.runtime} {found.dtype}, {size:3} rows: {rate:7.1f} rows/s{best}")


if __name__ == "__main__":
    main()
