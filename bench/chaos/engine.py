"""An engine whose network can fail: `python -m bench.chaos.engine FOLDER FD`, started by `.api`."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.chaos import faults
from model.checkpoint import Checkpoint
from service.engine import process
from service.engine.messages import EngineConfig
from service.engine.warmup import Warm, warm_up


@dataclass
class Faulty:
    """A network that fails where a class or the switch says so."""

    network: Any
    folder: Path

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """As the network: x [B, C, H, W], t and y [B]."""
        if y is not None and bool((y == faults.ENDS).any()):
            os._exit(9)
        if y is not None and bool((y == faults.RAISES).any()):
            raise ValueError("a class that raises")
        match faults.take(self.folder, faults.NEXT_STEP):
            case "raise":
                raise ValueError("a step that raises")
            case "out of memory":
                raise torch.OutOfMemoryError("a step without memory")
            case "lose the device":
                raise torch.AcceleratorError("a device that is lost")
            case "hang":
                threading.Event().wait()
            case "abort":
                os.abort()
        out: Tensor = self.network(x, t, y)
        if y is not None:
            out[y == faults.GIVES_NAN] = torch.nan
        return out


def main() -> None:
    """Run as an engine; does not return."""
    folder = Path(sys.argv[1])
    faults.follow_clock(folder)

    def warm(model: Checkpoint, config: EngineConfig) -> Warm:
        torch.set_num_threads(1)
        warmed = warm_up(model, config)
        runtime: Any = warmed.engine.denoiser.runtime  # type: ignore[attr-defined]
        runtime.forward = Faulty(runtime.forward, folder)
        return warmed

    process.main(lambda fd: process.run(fd, warm=warm), sys.argv[2:])


if __name__ == "__main__":
    main()
