"""What `model.evaluate` would say of images made in some other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model import checkpoint, classifier, evaluate
from model.denoiser import Denoiser
from model.runtimes import Runtime
from model.samplers import Plan, build_plan


class Judge:
    """The judge and the test images of an evaluation with these samples, at guidance 1.

    Raises DataError as `model.evaluate` does.
    """

    def __init__(self, folder: Path, data: Path, samples: int) -> None:
        self.model, self.samples = checkpoint.load(folder), samples
        chosen = ["--model", str(folder), "--data", str(data), "--samples", str(samples)]
        self._judge, self._reference, _ = evaluate.prepare(evaluate.parse(chosen), self.model)

    def of(self, runtime: Runtime, sampler: str, steps: int) -> dict[str, Any]:
        """Measures of the images that the runtime makes of the model."""
        plan = build_plan(self.model.schedule, sampler, steps)
        return self.of_plan(Denoiser.of(self.model, runtime), plan)

    def of_plan(self, denoiser: Denoiser, plan: Plan) -> dict[str, Any]:
        """Measures of the images that a denoiser makes, which may be another model's of the same classes."""
        wanted = self._reference.labels
        labels = [None] * self.samples if wanted is None else [int(label) for label in wanted]
        images = evaluate.sample(denoiser, plan, labels, seed=0, batch=32, tick=lambda _rows: None)
        return evaluate.measure(classifier.judge(self._judge, images), self._reference)
