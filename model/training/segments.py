"""What a student learns: where the guided teacher gets to from a noise level of the student's to the next.

A data image is put under the noise of a level (Salimans & Ho 2022, algorithm 2), and the teacher runs its
sampler, guided as in the service, in a few steps to the level below (Meng et al. 2023 fold guidance in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.chain import Chain, Image, noised
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, generate
from model.runtimes import RuntimeName, keep_torch_off, load_runtime
from model.samplers import Guidance, Plan, build_plan
from model.schedule import NoiseSchedule


def segment_plans(
    schedule: NoiseSchedule, timesteps: Sequence[int], sampler: str, substeps: int, guidance: Guidance
) -> list[Plan]:
    """The teacher's way down from each of the student's timesteps (falling), the last to the image: [N].

    substeps: steps of each, evenly spaced in t; fewer where there are not as many timesteps between.
    """
    plans = []
    for start, end in zip(timesteps, [*timesteps[1:], -1], strict=True):
        count = min(substeps, start - end)
        between = [start - round(step * (start - end) / count) for step in range(count)]
        last = [] if end < 0 else [end]  # the plan ends there, so its own step from there is left out
        whole = build_plan(schedule, sampler, 0, timesteps=[*between, *last], guidance=guidance)
        start_signal = float(schedule.alphas_cumprod[start] ** 0.5)
        plans.append(Plan(whole.table[:count], start_signal))
    return plans


@dataclass(frozen=True)
class Segment:
    """Images at a level, and where the teacher takes them: x, end [B, C, H, W] float32."""

    x: Tensor
    end: Tensor


class Teacher:
    """A network with a sampler, which takes images from one level to the next."""

    def __init__(
        self,
        model: Checkpoint,
        timesteps: Sequence[int],
        *,
        sampler: str,
        substeps: int,
        guidance: Guidance,
        runtime: RuntimeName = "auto",
        batch: int = 64,
    ) -> None:
        loaded = load_runtime(model, runtime, batch_invariant=False)
        keep_torch_off(loaded)
        self.denoiser = Denoiser.of(model, loaded)
        self.batch = batch
        plans = {
            guided: segment_plans(model.schedule, timesteps, sampler, substeps, of)
            for guided, of in ((True, guidance), (False, replace(guidance, scale=1.0)))
        }
        self.guided, self.unguided = plans[True], plans[False]

    def rows(self) -> list[int]:
        """Network rows that a labelled image takes from each level to the next."""
        return [plan.remaining[0] for plan in self.guided]

    def segment(
        self, place: int, images: NDArray[np.float32], labels: Sequence[int | None], seed: int
    ) -> Segment:
        """Images under noise at the student's timestep `place` (0 is the noisiest), and where they get to.

        images: [B, C, H, W] in the data range. labels: None for those that nothing guides. seed: of the
        first; they count up.
        """
        chains = []
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            plan = (self.unguided if label is None else self.guided)[place]
            start = noised(plan, image, seed + i)
            chains.append(Chain(plan, seed + i, label, start))
        begun: list[Image] = []
        ends = []
        for first in range(0, len(chains), self.batch):
            part = chains[first : first + self.batch]
            begun += [self.denoiser.start(chain) for chain in part]
            ends.append(generate(self.denoiser, part))
        return Segment(Tensor(np.stack(begun)), _joined(ends))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else Tensor(np.concatenate([part.numpy() for part in parts]))
