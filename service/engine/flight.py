"""A step on its way, and what the engine needs of whatever makes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from model.chain import Chain, Image
from model.denoiser import Stepped
from model.state import Row
from service.engine.jobs import Sample


class Reads(Protocol):
    """A step on its way."""

    def read(self) -> Sequence[Stepped]:
        """Wait for it. What it left, in order of its rows."""


class Denoises(Protocol):
    """What the engine needs of `model.denoiser.Denoiser`; tests put a fake in its place."""

    def launch(self, rows: Sequence[Row]) -> Reads:
        """Queue one step of each row."""

    def recover(self) -> None:
        """Step again after a step has failed; what was queued before this is skipped."""

    def probe(self) -> None:
        """Call the network for no sample. Raises whatever that does."""

    def measure(
        self, chains: Sequence[Chain], steps: Sequence[int], x0_preds: Sequence[Image]
    ) -> Sequence[tuple[float, float]]:
        """(bits per dimension, mean squared error) of x₀ predictions, in order."""


@dataclass(frozen=True)
class Raised:
    """A step that could not even be queued."""

    error: Exception

    def read(self) -> Sequence[Stepped]:
        """Raise what queueing it did."""
        raise self.error


@dataclass(eq=False)
class Flight:
    """A step on its way. rows: by sample, in order. previews: the samples whose step is to be shown."""

    rows: dict[Sample, Row]
    size: int
    previews: set[Sample]
    step: Reads
    launched: float


def size_of(rows: Iterable[Row]) -> int:
    """Network evaluations of a step of these."""
    return sum(row.chain.plan.evaluations[row.step] for row in rows)
