"""Training choices at equal small budgets (Ho et al. 2020, table 2): `python -m bench.ablation --data PATH`.

The same small network is trained for the same number of steps on the same images in the same order, to
predict ε, the posterior mean μ̃, x₀ or v, by L_simple, weighted by min-SNR (Hang et al. 2023) or by the
variational bound itself, and with a variance that it learns (by the bound, or by L_hybrid, Nichol & Dhariwal
2021). Each is sampled by DDPM with every variance that it allows, and judged as `model.evaluation.evaluate`
does, by the judge of a shipped model. Beside that stands the bound on held-out images.

What is trained is thrown away, and nothing that is served depends on it, so this is no part of model/.
Whatever is finished is kept in --work: the same command resumes from there. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from bench.quality import Judge
from model import checkpoint, diffusion
from model.checkpoint import Checkpoint
from model.evaluation.sampling import denoiser_of
from model.likelihood import prior_bits
from model.runtimes import keep_torch_off
from model.samplers import build_plan
from model.schedule import VarianceType
from model.training import train
from model.training.data import DataError, Dataset, load_splits

NAMES = {
    "epsilon": "ε",
    "posterior_mean": "μ̃",
    "sample": "x₀",
    "v_prediction": "v",
    "simple": "L_simple",
    "min_snr": "min-SNR",
    "debiased": "debiased",
    "vlb": "L_vlb",
}


@dataclass(frozen=True)
class Choice:
    """What a network is trained for: options of model.training.train."""

    prediction: str
    objective: str
    learned: bool = False

    @property
    def folder(self) -> str:
        """Where it is kept."""
        return "-".join((self.prediction, self.objective, *(["learned"] * self.learned)))

    @property
    def options(self) -> list[str]:
        """The command line's part."""
        options = ["--prediction-type", self.prediction, "--objective", self.objective]
        return options + ["--learned-variance"] * self.learned

    @property
    def variances(self) -> tuple[VarianceType, ...]:
        """Those that it can be sampled with."""
        return ("learned_range",) if self.learned else ("fixed_small", "fixed_large")

    @property
    def title(self) -> tuple[str, str]:
        """What it predicts and by which objective, as in the table."""
        hybrid = self.learned and self.objective == "simple"
        return NAMES[self.prediction], "L_hybrid" if hybrid else NAMES[self.objective]


# First the rows of the paper's table: what it calls ‖μ̃ − μ̃_θ‖² is L_simple for a network that predicts μ̃.
CHOICES = (
    Choice("posterior_mean", "vlb", learned=True),
    Choice("posterior_mean", "vlb"),
    Choice("posterior_mean", "simple"),
    Choice("epsilon", "vlb", learned=True),
    Choice("epsilon", "vlb"),
    Choice("epsilon", "simple"),
    Choice("epsilon", "min_snr"),
    Choice("epsilon", "debiased"),
    Choice("sample", "simple"),
    Choice("sample", "vlb"),
    Choice("v_prediction", "simple"),
    Choice("v_prediction", "min_snr"),
    Choice("epsilon", "simple", learned=True),
)


def steps_done(folder: Path) -> int:
    """How far a training has come."""
    path = folder / "training" / train.Trainer.state_file
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


@torch.no_grad()
def bits_per_dimension(
    model: Checkpoint, dataset: Dataset, variance: VarianceType, count: int, draws: int = 8
) -> tuple[float, float]:
    """The bound L_T + Σ L_t + L_0 of the first `count` images, and its standard error over them.

    L_T and L_0 are those of every image; the terms between are estimated from `draws` stratified timesteps an
    image. x₀ predictions are clipped, as in sampling. Bits per dimension, given the class.
    """
    schedule, unet = model.schedule, model.unet
    count = min(count, len(dataset))
    rng = torch.Generator().manual_seed(0)
    between = diffusion.stratified_timesteps(count * draws, schedule.timesteps - 1, rng)
    between = 1 + between.view(draws, count)
    bits = np.zeros(count)
    for start in range(0, count, 100):
        index = np.arange(start, min(start + 100, count))
        x0 = torch.from_numpy(dataset.batch(index))
        y = torch.from_numpy(dataset.labels[index]) if unet.config.conditional else None
        bits[index] += [prior_bits(schedule, image) for image in x0.numpy()]
        for draw in range(-1, draws):
            t = (
                torch.zeros(len(index), dtype=torch.int64)
                if draw < 0
                else between[draw, start : index[-1] + 1]
            )
            x = diffusion.q_sample(schedule, x0, t, torch.randn(x0.shape, generator=rng))
            mean, *rest = unet(x, t, y).split(x0.shape[1], dim=1)
            x0_pred = diffusion.predict_x0(schedule, x, t, mean).clamp(-schedule.clip, schedule.clip)
            learned = variance == "learned_range"
            log_variance = diffusion.learned_log_variance(schedule, t, rest[0]) if learned else None
            terms = diffusion.vlb_terms(schedule, x0, x0_pred, t, variance, log_variance).numpy()
            bits[index] += terms if draw < 0 else terms * (schedule.timesteps - 1) / draws
    return float(bits.mean()), float(bits.std(ddof=1) / count**0.5)


def sampled(model: Checkpoint, variance: VarianceType, steps: int, judge: Judge) -> dict[str, Any]:
    """The measures of a trained network's samples."""
    threads = torch.get_num_threads()
    denoiser = denoiser_of(model)
    try:
        keep_torch_off(denoiser.runtime)
        return judge.of_plan(denoiser, build_plan(model.schedule, "ddpm", steps, variance=variance))
    finally:
        torch.set_num_threads(threads)  # the next training wants them


def _choice(row: dict[str, Any]) -> Choice:
    return Choice(row["prediction"], row["objective"], row["learned"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| predicts | objective | variance | agreement | Fréchet ↓ | precision ↑ | recall ↑ | bits/dim ↓ |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        title = _choice(row).title
        agreement = "–" if row["agreement"] is None else f"{row['agreement']:.3f}"
        variance = row["variance"].replace("_range", "").replace("_", " ")
        lines.append(
            f"| {title[0]} | {title[1]} | {variance} | {agreement} | {row['frechet']:.1f} "
            f"| {row['precision']:.3f} | {row['recall']:.3f} | {row['bits']:.2f} ± {row['bits_error']:.2f} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Train, sample and judge what is not there yet. Returns 0, or 130 when a training was stopped."""
    budget = {
        name: getattr(args, name) for name in ("steps", "train", "samples", "sampling_steps", "bound_images")
    }
    path = args.work / "ablation.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"budget": budget, "rows": []}
    if kept["budget"] != budget:
        raise DataError(f"{path} is of another budget, {kept['budget']}: name another --work")
    rows = kept["rows"]
    config = checkpoint.load(args.judge).unet.config
    _, test_set = load_splits(args.data, config.shape[1:], config.in_channels, None)
    judge = Judge(args.judge, args.data, args.samples)
    for choice in (choice for choice in CHOICES if choice.folder in args.choices):
        folder = args.work / choice.folder
        if steps_done(folder) < args.steps:
            print(f"\n{folder}", flush=True)
            shape = [
                "--size",
                "x".join(map(str, config.shape[1:])),
                "--image-channels",
                str(config.in_channels),
            ]
            common = ["--data", str(args.data), "--out", str(folder), *shape, "--steps", str(args.steps)]
            code = train.main([*common, *shlex.split(args.train), *choice.options])
            if code or steps_done(folder) < args.steps:
                return code or 130
        model = checkpoint.load(folder)
        for variance in choice.variances:
            row: dict[str, Any] = {**asdict(choice), "variance": variance}
            if any(row.items() <= found.items() for found in rows):
                continue
            bits, error = bits_per_dimension(model, test_set, variance, args.bound_images)
            row |= {"bits": bits, "bits_error": error}
            rows.append(row | sampled(model, variance, args.sampling_steps, judge))
            path.write_text(json.dumps(kept, indent=2) + "\n")
            print(table(rows[-1:]), flush=True)
    order = [(choice, variance) for choice in CHOICES for variance in choice.variances]
    rows.sort(key=lambda row: order.index((_choice(row), row["variance"])))
    print(f"\n{table(rows)}")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m bench.ablation", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="as for model.evaluation.evaluate")
    add("--work", type=Path, default=Path("build/ablation"), help="where networks and measures are kept")
    add("--judge", type=Path, default=Path("weights/fashion-mnist"), help="model folder whose judge it is")
    add("--steps", type=int, default=800, help="of every training")
    names = [choice.folder for choice in CHOICES]
    add("--choices", nargs="+", choices=names, default=names, metavar="CHOICE", help=f"of {', '.join(names)}")
    add(
        "--train",
        default="--channels 16,32,64 --attention 8 --learning-rate 2e-3 --warmup-steps 100 --ema-decay 0.99",
        help="other options of model.training.train, for all alike",
    )
    add("--samples", type=int, default=500, help="images of every row")
    add("--sampling-steps", type=int, default=50, help="of DDPM")
    add("--bound-images", type=int, default=500, help="held-out images for the bound")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare. Returns the exit code: 0; 3 when something cannot be used; 130 when stopped."""
    try:
        return run(parse(arguments))
    except (DataError, checkpoint.CheckpointError) as error:
        print(error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
