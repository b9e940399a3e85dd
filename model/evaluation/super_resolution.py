"""What super-resolution adds: `python -m model.evaluation.super_resolution --data PATH --model FOLDER`.

For held-out images, of the enlarged input and of samples: the peak signal-to-noise ratio against the real
image, and how well the result, made small again, agrees with the input ("consistency", Saharia et al. 2021).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model import checkpoint
from model.chain import Chain
from model.denoiser import generate, to_pixels
from model.evaluation import plots
from model.evaluation.sampling import denoiser_of
from model.samplers import build_plan
from model.training import data
from model.training.data import Pixels

BATCH = 32


def psnr(images: Pixels, real: Pixels) -> float:
    """Mean peak signal-to-noise ratio of images against the real ones, in dB. Both [N, C, H, W] uint8."""
    error = (images.astype(np.float64) - real).reshape(len(images), -1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum((error**2).mean(1), 1e-3))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures and write a sheet. Returns the exit code: 0, or 3 for an unusable model or data."""
    parser = argparse.ArgumentParser(
        "python -m model.evaluation.super_resolution", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="as for training")
    parser.add_argument("--model", type=Path, required=True, help="a folder of a super-resolution network")
    parser.add_argument("--low-resolution", type=int, default=16, help="as in training")
    parser.add_argument("--split", default="t10k", help="which images")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="a PNG of eight of them, to look at")
    args = parser.parse_args(arguments)
    try:
        model = checkpoint.load(args.model)
        channels, *size = model.shape
        held_out = data.load(args.data, (size[0], size[1]), channels, args.split)
    except (checkpoint.CheckpointError, data.DataError) as error:
        print(error, file=sys.stderr)
        return 3
    if model.condition != ("image",):
        print(f"{args.model}: not a super-resolution network", file=sys.stderr)
        return 3
    real = held_out.images[data.choose_images(held_out, args.images, balanced=False)]
    low = data.low_resolution(real, args.low_resolution)
    plan, denoiser = build_plan(model.schedule, args.sampler, args.steps), denoiser_of(model)
    chains = [Chain(plan, seed, condition=each) for seed, each in enumerate(data.scaled(low))]
    made = np.concatenate(
        [
            to_pixels(generate(denoiser, chains[start : start + BATCH]))
            for start in range(0, len(chains), BATCH)
        ]
    )
    print("||PSNR, dB|consistency, dB|\n|---|--:|--:|")
    for name, images in (("enlarged", low), (f"{args.sampler}, {args.steps} steps", made)):
        again = data.low_resolution(images, args.low_resolution)
        print(f"|{name}|{psnr(images, real):.1f}|{psnr(again, low):.1f}|")
    if args.sheet is not None:
        sheet = plots.super_resolution_sheet(model, low[:8], real[:8], args.steps, args.sampler)
        sheet.save(args.sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
