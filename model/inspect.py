"""`python -m model.inspect MODEL`: what a model is, which of its files are taken, and what may go wrong.

MODEL is what DDPM_MODEL takes: a folder, one network or file in it, or hf:owner/name@revision. Exit codes: 0,
and 3 for a model that cannot be served, with the reason in one line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from model import checkpoint, hub, layout
from model.checkpoint import Checkpoint, CheckpointError
from model.class_names import distinct
from model.layout import Layout
from model.schedule import Array, NoiseSchedule
from model.scheduler_config import nearest_sampler
from model.unet_config import parse_size

UNUSABLE = 3
PLOT_ROWS, PLOT_COLUMNS = 10, 64
SHOWN = 12
LEAST_SNR = 1e-8
ORIGINS = {
    True: "moving averages (EMA)",
    False: "not moving averages (EMA)",
    None: "not known to be averages",
}


@dataclass(frozen=True)
class Forward:
    """One evaluation of the network, on noise at timestep t: how long it took, and what came out of it."""

    t: int
    seconds: float
    finite: bool
    mean: float
    std: float


@dataclass(frozen=True)
class Report:
    """What is known of a model. taken, ignored: files, relative to its folder."""

    name: str
    folder: str
    pipeline: str | None
    network: str
    taken: list[str]
    ignored: list[str]
    is_ema: bool | None
    parameters: int
    shape: tuple[int, int, int]
    condition: tuple[str, ...]
    classes: tuple[str, ...]
    null_class: int | None
    scheduler: str | None
    sampler: str
    timesteps: int
    prediction_type: str
    variance_type: str
    timestep_spacing: str
    clip: float | None
    log_snr: tuple[float, float]
    forward: Forward
    warnings: list[str]


class _Warnings(logging.Handler):
    """Keeps what is logged while a model is loaded."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def inspect(model: str, sample_size: tuple[int, int] | None = None) -> tuple[Report, NoiseSchedule]:
    """Load a model, run it once, and say what it is. Raises CheckpointError for one that cannot be served."""
    kept, logger = _Warnings(), logging.getLogger("model")
    logger.addHandler(kept)
    try:
        found = layout.find(hub.locate(model))
        loaded = checkpoint.read(found, sample_size)
    finally:
        logger.removeHandler(kept)
    forward = run_once(loaded)
    taken = _taken(found)
    schedule = loaded.schedule
    snr = log_snr(schedule)
    report = Report(
        name=loaded.name,
        folder=str(found.root),
        pipeline=found.index.get("_class_name"),
        network=type(loaded.unet).__name__,
        taken=[_relative(path, found.root) for path in taken],
        ignored=[_relative(path, found.root) for path in _files(found.root) if path not in taken],
        is_ema=found.is_ema,
        parameters=sum(parameter.numel() for parameter in loaded.unet.parameters()),
        shape=loaded.shape,
        condition=loaded.condition,
        classes=distinct(loaded.class_names),
        null_class=loaded.null_class,
        scheduler=loaded.scheduler_config.get("_class_name"),
        sampler=nearest_sampler(loaded.scheduler_config),
        timesteps=schedule.timesteps,
        prediction_type=schedule.prediction_type,
        variance_type=schedule.variance_type,
        timestep_spacing=schedule.timestep_spacing,
        clip=schedule.clip if math.isfinite(schedule.clip) else None,
        log_snr=(float(snr[0]), float(snr[-1])),
        forward=forward,
        warnings=[*kept.messages, *_doubts(found, loaded, forward)],
    )
    return report, schedule


def run_once(model: Checkpoint) -> Forward:
    """Evaluate the network on noise at the last timestep, which is what sampling begins with."""
    t = model.schedule.timesteps - 1
    given = torch.tensor([t]) * model.schedule.timestep_scale
    x = torch.randn(1, *model.unet.config.shape, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(1, dtype=torch.int64) if model.unet.config.conditional else None
    with torch.inference_mode():
        model.unet(x, given, label)  # the first call takes longer
        begun = perf_counter()
        out = model.unet(x, given, label)
    seconds = perf_counter() - begun
    out = out[:, : model.shape[0]]  # without the variance, where that is learned
    return Forward(t, seconds, bool(out.isfinite().all()), float(out.mean()), float(out.std()))


def log_snr(schedule: NoiseSchedule) -> Array:
    """ln(ᾱ / (1 − ᾱ)): [T], where there is no signal at all as of very little."""
    return np.log(np.maximum(schedule.snr, LEAST_SNR))


def plot(values: Array, rows: int = PLOT_ROWS, columns: int = PLOT_COLUMNS) -> list[str]:
    """A curve [T] as text, one line per row, with its extremes on the left and its timesteps below."""
    at = np.linspace(0, len(values) - 1, columns)
    heights = np.interp(at, np.arange(len(values)), values)
    low, high = float(heights.min()), float(heights.max())
    places = np.round((heights - low) / ((high - low) or 1.0) * (rows - 1)).astype(int)
    lines = []
    for row in range(rows - 1, -1, -1):
        label = f"{low + (high - low) * row / (rows - 1):8.2f}" if row in (0, rows - 1) else " " * 8
        lines.append(f"{label} │{''.join('•' if place == row else ' ' for place in places)}".rstrip())
    last = str(len(values) - 1)
    return [*lines, f"{' ' * 8} └{'─' * columns}", f"{' ' * 10}0{last:>{columns - 1}}"]


def describe(report: Report, schedule: NoiseSchedule) -> str:
    """The report as text."""
    channels, height, width = report.shape
    null = "" if report.null_class is None else f", and the null class {report.null_class}"
    clip = "not clipped" if report.clip is None else f"clipped to ±{report.clip:g}"
    if schedule.dynamic_thresholding_ratio:
        clip = f"thresholded at the {schedule.dynamic_thresholding_ratio:g}-quantile"
    forward = report.forward
    lines = [
        f"{report.name}: {report.pipeline or 'no pipeline'}, in {report.folder}",
        f"network     {report.network}, {report.parameters:,} parameters; {ORIGINS[report.is_ema]}",
        f"pictures    {height} × {width}, {channels} channels" + ("" if channels != 1 else " (grey)"),
        *([f"condition   {', '.join(report.condition)}: served by /edit"] if report.condition else []),
        f"classes     {len(report.classes)} ({_some(report.classes)}){null}"
        if report.classes
        else "classes     none",
        f"taken       {_some(report.taken)}",
        f"ignored     {_some(report.ignored) or 'nothing'}",
        f"schedule    {report.scheduler or 'no class'}, T = {report.timesteps};"
        f" predicts {report.prediction_type}; x₀ {clip}; {report.variance_type}; {report.timestep_spacing}",
        f"sampler     {report.sampler} by default" + _distilled(schedule),
        f"forward     at t = {forward.t}: {forward.seconds * 1000:.0f} ms, mean {forward.mean:.3f},"
        f" standard deviation {forward.std:.3f}",
        "",
        "log-SNR, ln(ᾱ / (1 − ᾱ)), by timestep",
        *plot(log_snr(schedule)),
    ]
    if report.warnings:
        lines += ["", *(f"warning: {warning}" for warning in report.warnings)]
    return "\n".join(lines)


def _distilled(schedule: NoiseSchedule) -> str:
    """What a student is, after its sampler."""
    folded = schedule.distilled_guidance
    if folded is None:
        return ""
    return f" and no other: distilled into {schedule.timesteps} steps, with guidance {folded:g} in them"


def _some(names: Sequence[str]) -> str:
    """The first of many names, and how many there are."""
    more = f" … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _doubts(found: Layout, model: Checkpoint, forward: Forward) -> list[str]:
    """What is likely to go wrong with pictures of this model."""
    doubts = []
    if found.is_ema is None:
        doubts.append("nothing says that the weights are moving averages (EMA), which give better pictures")
    if not model.schedule.bounded and model.schedule.prediction_type == "epsilon":
        doubts.append(
            "clip_sample is off although the network predicts ε: blurry or black pictures may follow;"
            f" set it to true in {found.scheduler_config.name}, unless pixels were not in [-1, 1] in training"
        )
    elif "clip_sample" not in model.scheduler_config:
        doubts.append("clip_sample is missing from the scheduler's config: x₀ is clipped, as diffusers does")
    if distinct(model.class_names) != model.class_names:
        doubts.append(
            "some class names are there twice, or are the index of another: all of these have theirs"
        )
    if not forward.finite:
        doubts.append("the network's output has a NaN or an infinity")
    elif model.schedule.prediction_type == "epsilon" and not 0.5 < forward.std < 2.0:
        doubts.append(
            f"the output on noise has standard deviation {forward.std:.2f}; that of a trained network that"
            " predicts ε is about 1"
        )
    return doubts


def _taken(found: Layout) -> list[Path]:
    beside = [layout.INDEX, checkpoint.MANIFEST, "typicality.json"]
    classifier = found.root / checkpoint.CLASSIFIER
    paths = [
        found.config,
        *found.weights.files,
        found.scheduler_config,
        *(found.root / name for name in beside),
        classifier / layout.CONFIG,
        classifier / checkpoint.CLASSIFIER_WEIGHTS,
    ]
    return [path for path in paths if path.is_file()]


def _files(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of a model. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.inspect", description="Say what a model is.")
    parser.add_argument("model", help="folder or file, or hf:owner/name@revision")
    parser.add_argument("--sample-size", type=parse_size, help="HEIGHTxWIDTH, for a model that does not say")
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(arguments)
    try:
        report, schedule = inspect(args.model, args.sample_size)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return UNUSABLE
    content: dict[str, Any] = asdict(report)
    print(json.dumps(content, ensure_ascii=False, indent=2) if args.json else describe(report, schedule))
    return 0


if __name__ == "__main__":
    sys.exit(main())
