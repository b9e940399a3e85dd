"""What noise costs one core: `python -m bench.noise --before ../before`.

Nanoseconds of processor time for each number of a step's noise, by `model.noise.normals`, by the same in
tensor operations, and by NumPy's own generator over a Philox, whose bits depend on the machine. `--before`
names a checkout of other code, whose `model.noise.normals` takes turns with this one's. Each measurement has
a process of its own, which keeps freed memory as an engine does, unless `--give-back`. Medians are printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import median

from service.engine.process import KEPT, KEPT_PIECES

ROOT = Path(__file__).parent.parent
STEPS = ((8, (1, 28, 28)), (64, (3, 32, 32)), (8, (3, 256, 256)))
"""Samples of a step, and their shape."""
OURS, TENSORS, NUMPY, BEFORE = "model.noise", "in tensor operations", "NumPy's generator", "before"
PREPARED = {
    OURS: """
from model.noise import normals
def draw(step):
    return normals(range(count), [step] * count, shape)
""",
    TENSORS: """
import torch
from model import device_noise
torch.set_num_threads(1)
table, seeds = device_noise.table(), torch.arange(count)
def draw(step):
    return device_noise.normals(seeds, torch.full_like(seeds, step), shape, 0, table)
""",
    NUMPY: """
import numpy as np
generator = np.random.Generator(np.random.Philox(0))
def draw(step):
    return generator.standard_normal((count, *shape), dtype=np.float32)
""",
}
PREPARED[BEFORE] = PREPARED[OURS]
TIMED = """
import time
draw(0)
begun, steps = time.process_time(), 0
while (taken := time.process_time() - begun) < seconds:
    steps += 1
    draw(steps)
print(taken / steps)
"""


def seconds_a_step(
    way: str, folder: Path, count: int, shape: tuple[int, ...], seconds: float, *, give_back: bool = False
) -> float:
    """Processor time of a step's noise, by the code in `folder`. Raises CalledProcessError if it has none."""
    given = f"count, shape, seconds = {count}, {shape}, {seconds}\n"
    command = [sys.executable, "-c", given + PREPARED[way] + TIMED]
    kept = {"MALLOC_MMAP_THRESHOLD_": str(KEPT_PIECES), "MALLOC_TRIM_THRESHOLD_": str(KEPT)}
    ran = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **({} if give_back else kept)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(ran.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m bench.noise", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout of other code")
    parser.add_argument("--give-back", action="store_true", help="freed memory, as the C library does")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of processor time, of each measurement")
    args = parser.parse_args(arguments)
    folders = {OURS: ROOT, TENSORS: ROOT, NUMPY: ROOT}
    if args.before is not None:
        folders[BEFORE] = args.before
    print("|ns a number|" + "|".join(folders) + "|\n|---" + "|--:" * len(folders) + "|")
    for count, shape in STEPS:
        numbers = count * prod(shape)
        taken: dict[str, list[float]] = {way: [] for way in folders}
        for _ in range(args.rounds):
            for way, folder in folders.items():
                found = seconds_a_step(way, folder, count, shape, args.seconds, give_back=args.give_back)
                taken[way].append(found)
        cells = [f"{median(each) / numbers * 1e9:.1f}" for each in taken.values()]
        print(f"|{count} of {'×'.join(map(str, shape))}|" + "|".join(cells) + "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
