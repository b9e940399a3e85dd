"""The report of an evaluation: a JSON file that can be resumed, a page and a plot.

An evaluation (model/evaluation/evaluate.py) is a mapping: what all its rows share, the commands that made it,
and `rows`, each a setting with its measures. NAME.json holds it; NAME.md and NAME.png show it to people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.evaluation import fidelity, plots
from model.evaluation.plots import Axis, guidance_name
from model.files import replace_text
from model.runtimes import DtypeName
from model.samplers import SAMPLERS, Guidance


@dataclass(frozen=True)
class Setting:
    """The setting of a row of the table. guidance_sigma_max: None is no bound."""

    sampler: str
    steps: int
    guidance_scale: float
    dtype: DtypeName = "float32"
    classifier_scale: float = 0.0
    guidance_sigma_min: float = 0.0
    guidance_sigma_max: float | None = None
    guidance_rescale: float = 0.0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Setting:
        """The setting of a row, which may be older than the later columns."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    @property
    def guidance(self) -> Guidance:
        """Its guidance, for a plan."""
        high = math.inf if self.guidance_sigma_max is None else self.guidance_sigma_max
        sigmas = self.guidance_sigma_min, high
        return Guidance(self.guidance_scale, sigmas, self.classifier_scale, self.guidance_rescale)


def resumed(path: Path, fresh: dict[str, Any], identity: Sequence[str]) -> dict[str, Any]:
    """`fresh` with the rows and commands of the file at `path`, if that has the same `identity`.

    Any other file is kept with .old at its end.
    """
    if not path.exists():
        return fresh
    found = json.loads(path.read_text())
    if all(found.get(key) == fresh[key] for key in identity):
        commands = [*found["commands"], *(c for c in fresh["commands"] if c not in found["commands"])]
        return {**fresh, "rows": found["rows"], "commands": commands}
    path.replace(path.with_name(path.name + ".old"))
    print(f"{path} was about other weights or settings: it is now {path.name}.old")
    return fresh


def write(path: Path, evaluation: dict[str, Any], over: Axis = "evaluations") -> None:
    """The .json at `path`, complete or not at all, and the .md and .png beside it."""
    evaluation["rows"].sort(key=_place)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(evaluation, indent=2) + "\n")
    replace_text(path.with_suffix(".md"), markdown(evaluation))
    plots.quality_plot(evaluation, over).save(path.with_suffix(".png"))


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the table."""
    at = Setting.of(row)
    guidance = at.guidance_scale, at.classifier_scale, at.guidance.sigmas, at.guidance_rescale
    return list(SAMPLERS).index(at.sampler), *guidance, at.steps, at.dtype


def markdown(evaluation: dict[str, Any]) -> str:
    """The evaluation as a page: how it was made, the table, and the classes of its best row."""
    judge, real, rows, n = (evaluation[key] for key in ("classifier", "real_baseline", "rows", "samples"))
    commands = "\n".join(evaluation["commands"])
    conditional = evaluation["conditional"]
    lines = [
        f"# Evaluation of {evaluation['model']}",
        f"```sh\n{commands}\n```",
        f"Weights: sha256 `{evaluation['weights_sha256']}`.",
        f"Every row: {n} samples with seeds {evaluation['seed']} to {evaluation['seed'] + n - 1}"
        + (", classes balanced" if conditional else "")
        + f", compared with {n} test images. The judge is a small classifier trained on the "
        f"{evaluation['train_images']} training images; it is right on {judge['accuracy']:.4f} of the "
        f"{evaluation['test_images']} test images. Fréchet distance, precision and recall (k = "
        f"{fidelity.NEIGHBOURS}) are taken in its {judge['features']} penultimate features, so they "
        f"compare with one another and with no other paper's; the Fréchet distance also falls with the "
        f"number of images, here {n} on each side. The first row is real training images against the same "
        f"test images (mean of {real['draws']} disjoint sets of {n}; standard deviation of the Fréchet "
        f"distance {real['frechet_sd']:.2g}): no sampler can be expected to beat their distance and recall. "
        "A precision above theirs says that samples are more typical than real images, not more real, and "
        "precision hardly notices speckle, which distance and recall do.",
    ]
    lines.append("Rows: of network calls for one image.")
    if any(Setting.of(row).classifier_scale for row in rows):
        lines.append(
            "Guidance by a noise-aware classifier costs its gradient beside them, which is not counted."
        )
    if conditional:
        lines.append(
            "Agreement is how often the judge sees the class that was asked for, with its 95 % interval; for "
            "real images it is the judge's accuracy. Above that, samples are more typical than real images."
        )
    table = [
        "| sampler | steps | guidance | dtype | rows | agreement | Fréchet ↓ | precision ↑ | recall ↑ |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
        f"| real images | | | | | {_share(judge['accuracy'], judge['interval']) if conditional else ''} "
        f"| {real['frechet']:.4g} | {real['precision']:.3f} | {real['recall']:.3f} |",
    ]
    for row in rows:
        share = _share(row["agreement"], row["agreement_interval"]) if conditional else ""
        table.append(
            f"| {row['sampler']} | {row['steps']} | {guidance_name(row)} | {row['dtype']} "
            f"| {row['evaluations']} "
            f"| {share} | {row['frechet']:.4g} | {row['precision']:.3f} | {row['recall']:.3f} |"
        )
    lines.append("\n".join(table))
    if conditional and rows:
        best = min(rows, key=lambda row: row["frechet"])
        title = f"{best['sampler']}, {best['steps']} steps, guidance {guidance_name(best)}, {best['dtype']}"
        by_class = [f"| class | real images | {title} |", "|---|--:|--:|"]
        for name, share in best["agreement_by_class"].items():
            by_class.append(f"| {name} | {judge['by_class'][name]:.3f} | {share:.3f} |")
        lines += ["Agreement by class, at the lowest Fréchet distance:", "\n".join(by_class)]
    return "\n\n".join(lines) + "\n"


def _share(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f}–{interval[1]:.3f})"
