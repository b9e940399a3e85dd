"""Figures that explain: the noise schedule, what noise does to an image, and samplers as tables.

`python -m model.evaluation.explain --model FOLDER --out PLACE` draws schedule.png, forward.png and
samplers.png for docs/how-it-works.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import generate, to_pixels
from model.diffusion import bounded_x0, network_timesteps, predict_x0, q_sample
from model.evaluation.plots import contact_sheet, drawn
from model.evaluation.sampling import denoiser_of
from model.noise import normal
from model.runtimes import RuntimeName
from model.samplers import SAMPLERS, Guidance, build_plan
from model.schedule import SPACINGS, NoiseSchedule

STEPS = 20
GUIDED = 0.3, 5.0
"""The noise levels σ at which the service guides unless a request says otherwise."""


def schedule_curves(schedule: NoiseSchedule, steps: int = STEPS) -> Image.Image:
    """Signal and noise over t; the signal-to-noise ratio; and the σ of the steps of each spacing."""
    ac, t = schedule.alphas_cumprod, np.arange(schedule.timesteps)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    signal, ratio, levels = figure.subplots(1, 3)
    signal.plot(t, ac**0.5, label="√ᾱ: signal")
    signal.plot(t, (1 - ac) ** 0.5, label="√(1 − ᾱ): noise")
    signal.plot(t, ac, ls=":", label="ᾱ")
    ratio.plot(t, schedule.snr, label="SNR = ᾱ / (1 − ᾱ)")
    guided = [sigma**-2 for sigma in GUIDED]
    ratio.axhspan(min(guided), max(guided), alpha=0.15, label="guided: σ {:g} to {:g}".format(*GUIDED))
    ratio.set_yscale("log")
    for spacing in SPACINGS:
        chosen = schedule.spaced_timesteps(steps, spacing)
        levels.plot(range(1, steps + 1), schedule.snr[chosen] ** -0.5, marker=".", lw=0.8, label=spacing)
    levels.set_yscale("log")
    _dress(signal, "timestep t", "")
    _dress(ratio, "timestep t", "")
    _dress(levels, f"step of {steps}", "σ = √((1 − ᾱ) / ᾱ)")
    return drawn(figure)


def sampler_tables(schedule: NoiseSchedule, steps: int = STEPS) -> Image.Image:
    """The coefficients of every sampler, step by step: x ← c_x·x + c_0·x0 + c_p·x0_prev + c_n·z.

    Where x₀ is not clipped, so that ε is that of the x₀ prediction.
    """
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    columns = ("c_x", "c_0", "c_p", "c_n")
    axes: list[Axes] = list(figure.subplots(1, len(columns)))
    for index, sampler in enumerate(SAMPLERS):
        table = build_plan(schedule, sampler, steps).unclipped().table
        for panel, column in zip(axes, columns, strict=True):
            # A dashed line above a wide one: some samplers share a coefficient.
            style: dict[str, Any] = {"ls": "--", "lw": 1.2, "zorder": 3} if index % 2 else {"lw": 2.5}
            panel.plot(range(1, steps + 1), table[column], label=sampler, **style)
    for panel, column in zip(axes, columns, strict=True):
        panel.set(title=column)
        panel.set_xlabel(f"step of {steps}")
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SAMPLERS))
    return drawn(figure)


def forward_sheet(
    model: Checkpoint,
    label: int | None,
    seed: int = 7,
    columns: int = 10,
    runtime: RuntimeName = "torch",
    scale: int | None = None,
) -> Image.Image:
    """An image that the model made under more and more noise, and the x₀ prediction from each by one call.

    The noise is the same at every timestep, so that the columns differ in its strength alone.
    """
    scale_of = 2.0 if label is not None and model.null_class is not None else 1.0
    plan = build_plan(model.schedule, "dpmpp_2m", STEPS, guidance=Guidance(scale_of))
    made = generate(denoiser_of(model, runtime), [Chain(plan, seed, label)])
    t = torch.linspace(0, model.schedule.timesteps - 1, columns).round().long()
    x0 = made.expand(columns, -1, -1, -1)
    eps = torch.from_numpy(normal(seed, 0, model.shape)).expand(columns, -1, -1, -1)
    x = q_sample(model.schedule, x0, t, eps)
    given = model.null_class if label is None else label
    labels = None if given is None else torch.full((columns,), given)
    with torch.no_grad():
        out = model.unet(x, network_timesteps(model.schedule, t), labels)
    predicted = bounded_x0(model.schedule, predict_x0(model.schedule, x, t, out[:, : x.shape[1]]))
    rows = to_pixels(torch.stack([x, predicted]), model.schedule.data_range)
    return contact_sheet(rows, ("x_t", "x0_pred"), [f"t={each}" for each in t.tolist()], scale)


def _dress(axes: Axes, across: str, up: str) -> None:
    axes.set(xlabel=across, ylabel=up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw schedule.png, forward.png and samplers.png."""
    parser = argparse.ArgumentParser(
        "python -m model.evaluation.explain", description="Draw the figures of docs/how-it-works.md."
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--label", type=int, help="class of the image under noise (default: the last one)")
    parser.add_argument("--seed", type=int, default=7, help="its seed")
    args = parser.parse_args(argv)
    model = checkpoint.load(args.model)
    last = len(model.class_names) - 1 if model.class_names else None
    args.out.mkdir(parents=True, exist_ok=True)
    schedule_curves(model.schedule).save(args.out / "schedule.png")
    sampler_tables(model.schedule).save(args.out / "samplers.png")
    forward_sheet(model, last if args.label is None else args.label, args.seed).save(args.out / "forward.png")


if __name__ == "__main__":
    main()
