"""`python -m model.evaluation.self_test FOLDER`: put a self-test beside a model's weights.

The network is evaluated once in float32 on the CPU, at half of its timesteps, and the values that engines
compare with are written to `self_test.json` and listed in the manifest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model import checkpoint, self_test
from model.checkpoint import Checkpoint, CheckpointError
from model.self_test import TOLERANCES, SelfTest, evaluate

SEED, COUNT = 0, 48


def record(model: Checkpoint) -> SelfTest:
    """The self-test of a network that computes as it should."""
    timestep = model.schedule.timesteps // 2 * model.schedule.timestep_scale
    label = 0 if model.unet.config.conditional else None
    values = evaluate(model.unet, model.unet.config.shape, SEED, timestep, label, COUNT)
    return SelfTest(SEED, timestep, label, values, TOLERANCES)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for a folder that cannot be loaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder, which gets the file")
    folder: Path = parser.parse_args(argv).folder
    try:
        model = checkpoint.load(folder)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 3
    self_test.save(folder / self_test.FILE, record(model))
    checkpoint.write_manifest(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
