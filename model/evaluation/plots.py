"""Pictures of sampling, training and evaluation, each returned as a PIL image.

`python -m model.evaluation.plots --model FOLDER --out PLACE` draws a model's sample sheets, with and without
guidance, and the trajectories of a few samples.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image, ImageDraw, ImageFont

from model import checkpoint, sheets
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import generate, to_pixels, trajectory
from model.evaluation.sampling import denoiser_of
from model.runtimes import RuntimeName
from model.samplers import Guidance, build_plan
from model.sheets import GAP
from model.training.data import Dataset, Pixels, held_out_split, load, scaled

FONT_SIZE = 13
LARGE = 64
ROWS, COLUMNS = "abcdef", 10
"""Of a sheet of real images and samples."""
INTERVAL = 0.3, 5.0
"""Noise levels that are guided there, as by the service's defaults."""


def class_sheet(
    model: Checkpoint,
    per_class: int,
    steps: int,
    sampler: str = "ddim",
    guidance_scale: float = 1.0,
    seed: int = 0,
    scale: int | None = None,
    runtime: RuntimeName = "auto",
) -> Image.Image:
    """A row of `per_class` samples for each class, its name at the left; a square for unconditional models.

    The first image has `seed`, and they count up row by row. scale: as for `contact_sheet`.
    """
    denoiser = denoiser_of(model, runtime)
    plan = build_plan(model.schedule, sampler, steps, guidance=Guidance(guidance_scale))
    labels: Sequence[int | None] = range(len(model.class_names)) if model.class_names else [None] * per_class
    rows = []
    for row, label in enumerate(labels):
        first = seed + row * per_class
        chains = [Chain(plan, first + i, label) for i in range(per_class)]
        rows.append(to_pixels(generate(denoiser, chains), denoiser.data_range))
    return contact_sheet(np.stack(rows), model.class_names, scale=scale)


def real_or_sample(
    model: Checkpoint, real: Dataset, guidance: Guidance, seed: int = 0, runtime: RuntimeName = "auto"
) -> tuple[Image.Image, list[str]]:
    """Real images and samples in any order, for people to tell apart; and the places of the samples (`a3`).

    As many of each, of classes drawn alike, COLUMNS in a row: samples by DPM-Solver++(2M) in 20 steps, or in
    the steps that a model is distilled into.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(real), len(ROWS) * COLUMNS, replace=False)
    is_sample = rng.permutation(np.arange(len(chosen)) % 2).astype(bool)
    images = real.images[chosen].copy()
    schedule = model.schedule
    if schedule.distilled:
        plan = build_plan(schedule, "ddim", schedule.timesteps)
    else:
        plan = build_plan(schedule, "dpmpp_2m", min(20, schedule.timesteps), guidance=guidance)
    wanted = np.flatnonzero(is_sample)
    denoiser = denoiser_of(model, runtime)
    labels = [int(label) if model.class_names else None for label in real.labels[chosen[wanted]]]
    chains = [Chain(plan, seed + place, label) for place, label in enumerate(labels)]
    images[wanted] = to_pixels(generate(denoiser, chains), denoiser.data_range)
    grid = images.reshape(len(ROWS), COLUMNS, *images.shape[1:])
    places = [f"{ROWS[i // COLUMNS]}{i % COLUMNS + 1}" for i in wanted]
    return contact_sheet(grid, ROWS, [str(1 + column) for column in range(COLUMNS)]), places


def super_resolution_sheet(
    model: Checkpoint,
    low: Pixels,
    images: Pixels,
    steps: int,
    sampler: str = "ddim",
    seed: int = 0,
    scale: int | None = None,
    runtime: RuntimeName = "auto",
) -> Image.Image:
    """A row for each picture: what the network is given, two samples, and the picture itself.

    low, images: [N, C, H, W] uint8. The first sample of picture i has `seed` + i.
    """
    plan = build_plan(model.schedule, sampler, steps)
    conditions = scaled(low)
    rounds = [
        [Chain(plan, first + i, condition=condition) for i, condition in enumerate(conditions)]
        for first in (seed, seed + len(low))
    ]
    denoiser = denoiser_of(model, runtime)
    made = [to_pixels(generate(denoiser, chains)) for chains in rounds]
    return contact_sheet(
        np.stack([low, *made, images], 1), heads=("given", "made", "made", "real"), scale=scale
    )


def trajectory_strip(
    model: Checkpoint,
    labels: Sequence[int | None],
    steps: int = 50,
    columns: int = 10,
    sampler: str = "ddim",
    guidance_scale: float = 1.0,
    seed: int = 0,
    scale: int | None = None,
    runtime: RuntimeName = "auto",
) -> Image.Image:
    """The trajectories of samples: for each label a row of x_t, and below it the x₀ predictions.

    The columns are `columns` evenly spaced steps of the chain, with the first and the last; sample i has seed
    `seed` + i. The last x₀ prediction is the finished sample.
    """
    denoiser = denoiser_of(model, runtime)
    plan = build_plan(model.schedule, sampler, steps, guidance=Guidance(guidance_scale))
    chains = [Chain(plan, seed + i, label) for i, label in enumerate(labels)]
    shown = np.unique(np.linspace(0, steps - 1, columns).round().astype(int))
    x = torch.from_numpy(np.stack([denoiser.start(chain) for chain in chains]))
    moments = []
    for row, latents in enumerate(trajectory(denoiser, chains)):
        if row in shown:
            moments.append(torch.stack((x, torch.stack([latent.x0 for latent in latents])), dim=1))
        x = torch.stack([latent.x for latent in latents])
    grid = torch.stack(moments, dim=2).flatten(0, 1)  # [2·labels, columns, C, H, W]
    names = []
    for label in labels:
        names += ["" if label is None else model.class_names[label], "x0_pred"]
    return contact_sheet(
        to_pixels(grid, denoiser.data_range), names, [f"t={plan.timesteps[row]}" for row in shown], scale
    )


def contact_sheet(
    images: Pixels, names: Sequence[str] = (), heads: Sequence[str] = (), scale: int | None = None
) -> Image.Image:
    """Images on a white sheet, a name left of each row and a heading above each column.

    images: [rows, columns, C, H, W] uint8, C 1 or 3; enlarged `scale` times without smoothing; by default
    small ones as far as LARGE pixels allow.
    """
    rows, columns, _, height, width = images.shape
    scale = scale or max(1, LARGE // max(height, width))
    font = ImageFont.load_default(FONT_SIZE)
    left = int(max((font.getlength(name) for name in names), default=-2 * GAP)) + 3 * GAP
    top = FONT_SIZE + 3 * GAP if heads else GAP
    step_x, step_y = width * scale + GAP, height * scale + GAP
    sheet = Image.new("RGB", (left + columns * step_x, top + rows * step_y), "white")
    pictures = images.reshape(rows * columns, *images.shape[2:]).transpose(0, 2, 3, 1)
    grid = sheets.contact_sheet([sheets.enlarge(each, scale) for each in pictures], columns=columns)
    sheet.paste(Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid), (left, top))
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((left - 2 * GAP, top + (row + 0.5) * step_y), name, "black", font, anchor="rm")
    for column, head in enumerate(heads):
        draw.text((left + (column + 0.5) * step_x, top / 2), head, "black", font, anchor="mm")
    return sheet


def loss_curve(records: Sequence[Mapping[str, float]]) -> Image.Image:
    """L_simple against images seen, in training and held out, from the records of model.training.train."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="images seen", ylabel="L_simple", yscale="log")
    axes.plot([r["images"] for r in records], [r["loss"] for r in records], lw=0.8, label="training")
    held_out = [r for r in records if "held_out_loss" in r]
    if held_out:
        axes.plot(
            [r["images"] for r in held_out],
            [r["held_out_loss"] for r in held_out],
            marker=".",
            label="held out (averaged weights)",
        )
    _plain_numbers(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return drawn(figure)


def guidance_name(row: Mapping[str, Any]) -> str:
    """How a row of an evaluation is guided: `2`, `2 at σ 0.5–5`, `2, rescaled 0.7`, `1, classifier 4`."""
    scale, classifier, low, high = _guidance(row)
    name = f"{scale:g}" + (f", classifier {classifier:g}" if classifier else "")
    rescale = row.get("guidance_rescale", 0.0)
    return name + _interval_name(low, high) + (f", rescaled {rescale:g}" if rescale else "")


def _interval_name(low: float, high: float) -> str:
    if math.isinf(high):
        return f" at σ from {low:g}" if low else ""
    return f" at σ {low:g}–{high:g}"


def _guidance(row: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """(scale, the classifier's scale, lowest σ, highest σ); older rows have the first of them alone."""
    high = row.get("guidance_sigma_max")
    interval = row.get("guidance_sigma_min", 0.0), math.inf if high is None else high
    return row["guidance_scale"], row.get("classifier_scale", 0.0), *interval


Axis = Literal["evaluations", "guidance"]


def quality_plot(evaluation: Mapping[str, Any], over: Axis = "evaluations") -> Image.Image:
    """The table of model.evaluation.evaluate: each measure against evaluations per image or guidance scale.

    evaluation: the content of evaluation.json. Over evaluations, a line per sampler; guidance differs in line
    style, dtypes in the marker. Over guidance, a line for each kind of it, classifier-free and by a
    classifier, and for each interval of noise levels. The dashed grey line is the real-data baseline.
    """
    rows, baseline = evaluation["rows"], evaluation["real_baseline"]
    panels = [
        ("frechet", "Fréchet distance (lower is better)", baseline["frechet"]),
        ("precision", "precision", baseline["precision"]),
        ("recall", "recall", baseline["recall"]),
    ]
    if any(row["agreement"] is not None for row in rows):
        real = evaluation["classifier"]["accuracy"]
        panels.insert(1, ("agreement", "agreement with the requested class", real))
    figure = Figure(figsize=(10, 7), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(2, 2).flat)
    for axes, (measure, title, real) in zip(all_axes, panels, strict=False):
        axes.set(title=title)
        axes.axhline(real, color="grey", ls="--", label="real images")
        if over == "guidance":
            axes.set(xlabel="guidance scale")
            for name, points in guidance_lines(rows).items():
                scales, values = [scale for scale, _ in points], [row[measure] for _, row in points]
                axes.plot(scales, values, marker=".", label=name)
        else:
            axes.set(xscale="log", xlabel="network evaluations per image")
            _quality_lines(axes, rows, measure)
            counts = sorted({row["evaluations"] for row in rows})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xticks([], minor=True)
        if measure == "frechet":
            axes.set_yscale("log")
            _plain_numbers(axes)
        axes.grid(alpha=0.3, which="both")
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn(figure)


def guidance_lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """The lines of a plot over guidance: name → (scale, row) in order of the scale.

    Every line starts from or passes a row without guidance: at classifier-free scale 1, and at 0 of a
    classifier's.
    """
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    groups = sorted({(row["sampler"], row["steps"], row["dtype"]) for row in rows})
    for group in groups:
        members = [row for row in rows if (row["sampler"], row["steps"], row["dtype"]) == group]
        prefix = "{} {} {}: ".format(*group) if len(groups) > 1 else ""
        plain = [(w, row) for row in members for w, s, *_ in [_guidance(row)] if not s]
        for w, s, low, high in sorted({_guidance(row) for row in members}):
            where = _interval_name(low, high)
            if s:
                name = f"{prefix}classifier" + (f" beside guidance {w:g}" if w != 1 else "") + where
                begins = [(0.0, row) for scale, row in plain if scale == w and _shares(row, w, low, high)]
            elif w != 1:
                name, begins = f"{prefix}classifier-free{where}", [each for each in plain if each[0] == 1]
            else:
                continue
            of = [row for row in members if _guidance(row) == (w, s, low, high)]
            points = lines.setdefault(name, begins)
            points += [(s or w, row) for row in of]
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _shares(row: Mapping[str, Any], w: float, low: float, high: float) -> bool:
    """Whether a line in an interval starts at this row: without guidance, an interval means nothing."""
    return w == 1 or _guidance(row)[2:] == (low, high)


def _quality_lines(axes: Axes, rows: Sequence[Mapping[str, Any]], measure: str) -> None:
    samplers, dtypes = (sorted({row[key] for row in rows}) for key in ("sampler", "dtype"))
    guidances = [guidance_name(row) for row in sorted(rows, key=_guidance)]
    guidances = list(dict.fromkeys(guidances))
    for sampler, guidance, dtype in product(samplers, guidances, dtypes):
        of = sampler, guidance, dtype
        line = [r for r in rows if (r["sampler"], guidance_name(r), r["dtype"]) == of]
        line.sort(key=lambda row: row["evaluations"])
        if not line:
            continue
        several = ((guidances, f", guidance {guidance}"), (dtypes, f", {dtype}"))
        x, y = ([row[key] for row in line] for key in ("evaluations", measure))
        axes.plot(
            x, y,
            color=f"C{samplers.index(sampler)}",
            ls=("-", ":", "-.", "--")[guidances.index(guidance) % 4],
            marker=".x+"[dtypes.index(dtype) % 3],
            label=sampler + "".join(text for kinds, text in several if len(kinds) > 1),
        )  # fmt: skip


def rate_distortion(curve: Mapping[str, Sequence[float]], timesteps: int) -> Image.Image:
    """Rate and distortion: Fig. 5 of Ho et al. 2020, three panels.

    curve: `timestep`, `rate` (bits per dimension) and `rmse` (levels of 255), point by point. timesteps: T.
    """
    steps = [timesteps - t for t in curve["timestep"]]
    rate, distortion = "rate (bits/dim)", "distortion (RMSE of 255)"
    panels = (
        ("reverse process steps (T − t)", distortion, steps, curve["rmse"]),
        ("reverse process steps (T − t)", rate, steps, curve["rate"]),
        (rate, distortion, curve["rate"], curve["rmse"]),
    )
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    for axes, (across, up, x, y) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set(xlabel=across, ylabel=up)
        axes.plot(x, y, marker=".", ms=4, lw=1)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    return drawn(figure)


def _plain_numbers(axes: Axes) -> None:
    """On a logarithmic axis: 0.04 and 200, not 4 × 10⁻² and 2 × 10²."""
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def drawn(figure: Figure) -> Image.Image:
    """Draw with Agg, which needs no display and leaves matplotlib's global state alone."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib leaves these two without annotations
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels).convert("RGB")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw samples.png, samples-guided.png and trajectory.png; of a distilled model nothing is guided."""
    parser = argparse.ArgumentParser(
        "python -m model.evaluation.plots", description="Draw a model's samples."
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps, at most the model's T")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of the guided pictures")
    parser.add_argument("--per-class", type=int, default=10, help="samples in a row")
    parser.add_argument("--data", type=Path, help="test images: draws real-or-sample.png with some of them")
    args = parser.parse_args(argv)
    model = checkpoint.load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        channels, *size = model.shape
        real = load(args.data, (size[0], size[1]), channels, held_out_split(args.data))
        scale = model.schedule.guidance_scale if model.null_class is not None else 1.0
        guidance = Guidance(args.guidance if scale is None else scale, INTERVAL)
        sheet, samples = real_or_sample(model, real, guidance)
        sheet.save(args.out / "real-or-sample.png")
        print(f"samples: {' '.join(samples)}")
        return
    steps = min(args.steps, model.schedule.timesteps)
    class_sheet(model, args.per_class, steps).save(args.out / "samples.png")
    labels: list[int | None] = [*range(len(model.class_names))][-3:] or [None] * 3
    guidable = model.null_class is not None and not model.schedule.distilled
    scale = args.guidance if guidable else 1.0
    if scale != 1.0:
        guided = class_sheet(model, args.per_class, steps, guidance_scale=scale)
        guided.save(args.out / "samples-guided.png")
    strip = trajectory_strip(model, labels, steps, guidance_scale=scale)
    strip.save(args.out / "trajectory.png")


if __name__ == "__main__":
    main()
