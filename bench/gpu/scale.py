"""How much `bench.gpu` does, and on which networks: all of it on a GPU, a little of it in a simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.roofline import CIFAR10_32
from model import checkpoint
from model.checkpoint import Checkpoint
from model.runtimes import DtypeName
from model.unet import UNet, UNetConfig

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ROOT / "weights" / "fashion-mnist"
Figures = Iterator[tuple[str, Any]]
"""(name, figure), as they come."""
Network = Literal["ours", "cifar10-32", "celebahq-256"]
PRECISIONS: dict[str, tuple[DtypeName, bool]] = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
}
"""The runtime's dtype, and whether TF32 is allowed."""
CELEBAHQ_256 = replace(
    CIFAR10_32,
    sample_size=(256, 256),
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
)


@dataclass(frozen=True)
class Scale:
    """How much is done. A simulation does a little of everything on the CPU."""

    device: str = "cuda"
    seconds: float = 0.15  # of each rate of a network
    http_s: float = 3.0
    rows: dict[Network, tuple[int, ...]] = field(
        default_factory=lambda: {
            "ours": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "cifar10-32": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "celebahq-256": (1, 2, 4, 8, 16, 32),
        }
    )
    product: int = 8192  # rows and columns of the matrices whose product is the card's limit
    clients: int = 96
    images: tuple[int, ...] = (1, 64)  # of a call of a pipeline
    steps: int = 50  # of its images
    long: int = 1000  # steps of a request whose engine is killed
    width: int = 64  # rows at most of what is compiled
    compile_s: float = 55.0  # after which nothing more is compiled
    tests: tuple[str, ...] = ("-m", "gpu", "tests/model", "tests/service/engine")
    start_s: float = 60.0
    precisions: tuple[str, ...] = tuple(PRECISIONS)

    @property
    def simulated(self) -> bool:
        """Whether there is no GPU in it."""
        return self.device == "cpu"

    def configs(self) -> dict[Network, UNetConfig]:
        """The shapes that have random weights."""
        if not self.simulated:
            return {"cifar10-32": CIFAR10_32, "celebahq-256": CELEBAHQ_256}
        return {
            "cifar10-32": replace(CIFAR10_32, sample_size=(16, 16), block_out_channels=(32,) * 4),
            "celebahq-256": replace(CELEBAHQ_256, block_out_channels=(32,) * 6, sample_size=(64, 64)),
        }

    def model(self, name: Network) -> Checkpoint:
        """The shipped network, or one of random weights."""
        shipped = checkpoint.load(SHIPPED)
        if name == "ours":
            return shipped
        torch.manual_seed(0)
        unet = UNet(self.configs()[name]).eval()
        return replace(shipped, name=name, unet=unet, null_class=None, classifier=None, class_names=())

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.simulated:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back the memory that torch keeps for what comes next."""
        if not self.simulated:
            torch.cuda.empty_cache()


REAL = Scale()
SIMULATED = Scale(
    device="cpu",
    seconds=0.01,
    http_s=0.5,
    rows={"ours": (1, 2), "cifar10-32": (1,), "celebahq-256": (1,)},
    product=256,
    clients=2,
    images=(1,),
    steps=2,
    long=10,
    width=2,
    tests=("-k", "cpu and 5-fixed-float32", "tests/model/test_recorded.py"),
    precisions=("float32",),
)
