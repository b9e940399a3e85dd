"""How good are the samples? `python -m model.evaluate --model FOLDER --data PATH`.

A classifier trained on the real training images (model/classifier.py) judges samples of every asked-for
sampler, step count and guidance scale: how often they show the requested class, how far they are as
a set from the test images (Fréchet distance), how real (precision) and how complete (recall) they look.
Beside them stands the floor: the same measures for real training images, in sets of the same size.

The measures see different faults. Gaussian noise of 25 grey levels on 1000 real Fashion-MNIST images takes
the distance from 4 to 117 and recall from 0.88 to 0.35, yet leaves precision at 0.89.

Every row of the table uses the same seeds and the same test images. FOLDER/evaluation.json is written after
each row, and rows it already has for the same weights and settings are not computed again;
evaluation.md and evaluation.png show the same to people.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model import checkpoint, classifier, data, fidelity, plots
from model.checkpoint import Checkpoint, CheckpointError
from model.classifier import Classifier, ClassifierConfig, Judgement
from model.data import DataError, Dataset, Labels, Pixels
from model.denoiser import Chain, Denoiser, to_pixels, trajectory
from model.runtimes import (
    TORCH_DTYPES,
    DtypeName,
    RuntimeName,
    RuntimeUnavailableError,
    keep_torch_off,
)
from model.samplers import SAMPLERS, Guidance, Plan, build_plan
from model.schedule import ScheduleError

FLOOR_DRAWS = 5
"""Sets of training images that the floor is averaged over, where there are that many."""


@dataclass(frozen=True)
class Setting:
    """What a row of the table is about."""

    sampler: str
    steps: int
    guidance_scale: float
    dtype: DtypeName = "float32"

    @property
    def evaluations(self) -> int:
        """Rows of network calls that one image costs."""
        return self.steps * (1 if self.guidance_scale == 1 else 2)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    real: features [n, D] of test images. labels: classes to ask for [n], or None for unconditional models.
    """

    real: fidelity.Features
    labels: Labels | None
    class_names: tuple[str, ...]


def load_splits(path: Path, size: int, channels: int, held_out: str | None) -> tuple[Dataset, Dataset]:
    """The training and the test images at `path`. Raises DataError when either is missing."""
    idx = any(path.glob("*-images-idx3-ubyte*"))
    test = held_out or ("t10k" if idx else "test")
    for split in ("train", test):
        if not idx and not (path / split).is_dir():
            raise DataError(f"{path}: pictures are compared by split, but there is no folder {split}/")
    train_set, test_set = (data.load(path, size, channels, split) for split in ("train", test))
    if len(train_set.class_names) < 2:
        raise DataError(f"{path}: the classifier needs at least two classes (sub-folders of train/)")
    if train_set.class_names != test_set.class_names:
        raise DataError(f"{path}: the classes of train and {test} differ")
    return train_set, test_set


def draw(dataset: Dataset, count: int, balanced: bool, seed: int = 0) -> NDArray[np.int64]:
    """Which images stand for the real ones: `count` different indices, in an order fixed by `seed`.

    Balanced, the i-th has class i mod K, as the requested classes do; otherwise classes come as they are.
    """
    if count > capacity(dataset, balanced):
        raise DataError(f"the data allows at most {capacity(dataset, balanced)} samples, not {count}")
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(dataset))
    if not balanced:
        return order[:count]
    classes = len(dataset.class_names)
    members = [order[dataset.labels[order] == label] for label in range(classes)]
    return np.array([members[i % classes][i // classes] for i in range(count)], np.int64)


def capacity(dataset: Dataset, balanced: bool) -> int:
    """How many images `draw` can give."""
    if not balanced:
        return len(dataset)
    classes = len(dataset.class_names)
    return classes * int(np.bincount(dataset.labels, minlength=classes).min())


def sample(
    denoiser: Denoiser,
    plan: Plan,
    labels: Sequence[int | None],
    *,
    seed: int,
    batch: int,
    tick: Callable[[int], object],
) -> Pixels:
    """Generate an image for each label, the i-th with seed + i, `batch` side by side.

    tick: told the network rows of each step. Returns uint8 [N, C, H, W]. Raises FloatingPointError at an
    image that is not finite.
    """
    chains = [Chain(plan, seed + i, label) for i, label in enumerate(labels)]
    images = []
    for start in range(0, len(chains), batch):
        part = chains[start : start + batch]
        x = torch.empty(0)
        for row, latents in enumerate(trajectory(denoiser, part)):
            x = torch.stack([latent.x for latent in latents])
            tick(len(part) * plan.rows[row])
        if not x.isfinite().all():
            raise FloatingPointError(f"samples {start} to {start + len(part) - 1} are not finite")
        images.append(to_pixels(x))
    return np.concatenate(images)


def agreement(predicted: Labels, requested: Labels, class_names: Sequence[str]) -> dict[str, Any]:
    """How often the predicted class [N] is the requested one: the share, its 95 % interval, and by class."""
    hits = predicted == requested
    by_class = {
        name: float(hits[requested == label].mean())
        for label, name in enumerate(class_names)
        if (requested == label).any()
    }
    return {
        "agreement": float(hits.mean()),
        "agreement_interval": list(fidelity.wilson_interval(int(hits.sum()), len(hits))),
        "agreement_by_class": by_class,
    }


def measure(found: Judgement, reference: Reference) -> dict[str, Any]:
    """The measures of one set of samples, in the order of the reference's labels."""
    precision, recall = fidelity.precision_recall(reference.real, found.features)
    measures: dict[str, Any] = {"agreement": None}
    if reference.labels is not None:
        measures = agreement(found.labels, reference.labels, reference.class_names)
    frechet = fidelity.frechet_distance(reference.real, found.features)
    return {**measures, "frechet": frechet, "precision": precision, "recall": recall}


def floor(net: Classifier, train_set: Dataset, real: fidelity.Features, balanced: bool) -> dict[str, float]:
    """What real images reach: training images against the reference, mean and spread over disjoint draws."""
    n = len(real)
    draws = max(1, min(FLOOR_DRAWS, capacity(train_set, balanced) // n))
    index = draw(train_set, draws * n, balanced)
    features = classifier.judge(net, train_set.images, index).features.reshape(draws, n, -1)
    frechet = [fidelity.frechet_distance(real, part) for part in features]
    precision, recall = np.mean([fidelity.precision_recall(real, part) for part in features], axis=0)
    return {
        "draws": draws,
        "frechet": float(np.mean(frechet)),
        "frechet_sd": float(np.std(frechet, ddof=1)) if draws > 1 else 0.0,
        "precision": float(precision),
        "recall": float(recall),
    }


def state_sha256(net: Classifier) -> str:
    """A checksum of a classifier's parameters."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def resumed(path: Path, fresh: dict[str, Any], identity: Sequence[str]) -> dict[str, Any]:
    """`fresh` with the rows and commands of the file at `path`, where that is about the same `identity`.

    A file about something else is kept as evaluation.json.old.
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


def write(folder: Path, evaluation: dict[str, Any]) -> None:
    """evaluation.json, .md and .png, the first of them complete or not at all."""
    order = list(SAMPLERS)
    evaluation["rows"].sort(
        key=lambda r: (order.index(r["sampler"]), r["guidance_scale"], r["steps"], r["dtype"])
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(evaluation, indent=2) + "\n")
    part.replace(path)
    (folder / "evaluation.md").write_text(markdown(evaluation))
    plots.quality_plot(evaluation).save(folder / "evaluation.png")


def markdown(evaluation: dict[str, Any]) -> str:
    """The evaluation as a page: how it was made, the table, and the classes of its best row."""
    judge, real, rows, n = (evaluation[key] for key in ("classifier", "floor", "rows", "samples"))
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
            f"| {row['sampler']} | {row['steps']} | {row['guidance_scale']:g} | {row['dtype']} "
            f"| {row['evaluations']} "
            f"| {share} | {row['frechet']:.4g} | {row['precision']:.3f} | {row['recall']:.3f} |"
        )
    lines.append("\n".join(table))
    if conditional and rows:
        best = min(rows, key=lambda row: row["frechet"])
        title = (
            f"{best['sampler']}, {best['steps']} steps, guidance {best['guidance_scale']:g}, {best['dtype']}"
        )
        by_class = [f"| class | real images | {title} |", "|---|--:|--:|"]
        for name, share in best["agreement_by_class"].items():
            by_class.append(f"| {name} | {judge['by_class'][name]:.3f} | {share:.3f} |")
        lines += ["Agreement by class, at the lowest Fréchet distance:", "\n".join(by_class)]
    return "\n\n".join(lines) + "\n"


def _share(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f}–{interval[1]:.3f})"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(item) for item in text.split(",")]

    parser = argparse.ArgumentParser("python -m model.evaluate", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder")
    add("--data", type=Path, required=True, help="IDX files, or pictures in train/ and test/ by class")
    add("--held-out", help="the split to compare with (default: t10k of IDX files, test/ of pictures)")
    add("--out", type=Path, help="where evaluation.* go (default: the model folder)")
    add("--samplers", type=listed(str), default=list(SAMPLERS), help=f"of {','.join(SAMPLERS)}")
    add("--steps", type=listed(int), default=[10, 20, 50], help="step counts, like 10,20,50")
    add("--guidance", type=listed(float), default=[1.0], help="guidance scales, like 1,2; 1 is none")
    add("--dtype", type=listed(str), default=["float32"], help="of the network, like float32,bfloat16")
    add("--samples", type=int, default=1000, help="images per row of the table")
    add("--seed", type=int, default=0, help="of the first image")
    add("--batch", type=int, default=32, help="images generated side by side")
    add("--runtime", default="auto", choices=get_args(RuntimeName))
    add("--device", default="auto", help="cpu, cuda, mps")
    add("--classifier", type=Path, help="file (default: judge/classifier.safetensors in the model folder)")
    add("--classifier-epochs", type=int, default=ClassifierConfig().epochs)
    args = parser.parse_args(argv)
    for sampler in args.samplers:
        if sampler not in SAMPLERS:
            parser.error(f"--samplers: {sampler!r} is not one of {', '.join(SAMPLERS)}")
    for dtype in args.dtype:
        if dtype not in TORCH_DTYPES:
            parser.error(f"--dtype: {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    if args.samples < 10:
        parser.error("--samples: at least 10")
    return args


def prepare(args: argparse.Namespace, model: Checkpoint) -> tuple[Classifier, Reference, dict[str, Any]]:
    """The judge, what it compares with, and an evaluation that has no rows yet."""
    config = model.unet.config
    train_set, test_set = load_splits(args.data, config.sample_size, config.in_channels, args.held_out)
    conditional = config.num_class_embeds is not None
    if conditional and len(model.class_names) != len(train_set.class_names):
        count = len(train_set.class_names)
        raise DataError(f"{args.data}: {count} classes, but the model has {len(model.class_names)}")
    index = draw(test_set, args.samples, conditional)
    path = args.classifier or args.model / "judge" / "classifier.safetensors"
    net = classifier.load_or_train(path, train_set, ClassifierConfig(epochs=args.classifier_epochs))
    on_test = classifier.judge(net, test_set.images)
    truth = agreement(on_test.labels, test_set.labels, test_set.class_names)
    print(f"classifier: {truth['agreement']:.4f} of {len(test_set)} test images right")
    labels = test_set.labels[index] if conditional else None
    reference = Reference(on_test.features[index], labels, test_set.class_names)
    evaluation = {
        "model": model.name,
        "weights_sha256": checkpoint.weights_sha256(args.model),
        "conditional": conditional,
        "samples": args.samples,
        "seed": args.seed,
        "train_images": len(train_set),
        "test_images": len(test_set),
        "classifier": {
            "sha256": state_sha256(net),
            "features": net.head.in_features,
            "accuracy": truth["agreement"],
            "interval": truth["agreement_interval"],
            "by_class": truth["agreement_by_class"],
        },
        "floor": floor(net, train_set, reference.real, conditional),
        "commands": [],
        "rows": [],
    }
    return net, reference, evaluation


def run(args: argparse.Namespace, model: Checkpoint, command: str) -> dict[str, Any]:
    """Fill in the rows that the table does not have yet, writing it after each. Returns the evaluation."""
    out = args.out or args.model
    settings = [Setting(*chosen) for chosen in product(args.samplers, args.steps, args.guidance, args.dtype)]
    if model.null_class is None and any(s.guidance_scale != 1 for s in settings):
        raise ScheduleError("guidance needs a model trained with a null class: --guidance 1 is all it can do")
    plans = {
        setting: build_plan(
            model.schedule, setting.sampler, setting.steps, guidance=Guidance(setting.guidance_scale)
        )
        for setting in settings
    }
    net, reference, evaluation = prepare(args, model)
    evaluation["commands"] = [command]
    identity = ("weights_sha256", "samples", "seed", "train_images", "test_images", "classifier")
    evaluation = resumed(out / "evaluation.json", evaluation, identity)
    done = {Setting(*(row[f.name] for f in fields(Setting))) for row in evaluation["rows"]}
    to_do = [setting for setting in settings if setting not in done]
    denoisers = {s.dtype: plots.denoiser_of(model, args.runtime, args.device, s.dtype) for s in to_do}
    for denoiser in denoisers.values():
        keep_torch_off(denoiser.runtime)
    labels = [None] * args.samples if reference.labels is None else [int(y) for y in reference.labels]

    total = sum(setting.evaluations for setting in to_do) * args.samples
    with tqdm(total=total, unit="eval", unit_scale=True, smoothing=0.05, mininterval=1) as bar:
        for setting in to_do:
            bar.set_description(
                f"{setting.sampler} {setting.steps} ×{setting.guidance_scale:g} {setting.dtype}"
            )
            denoiser = denoisers[setting.dtype]
            started = time.monotonic()
            images = sample(
                denoiser,
                plans[setting],
                labels,
                seed=args.seed,
                batch=args.batch,
                tick=bar.update,
            )
            seconds = round(time.monotonic() - started, 1)
            row = {**asdict(setting), "evaluations": setting.evaluations, "seconds": seconds}
            row |= {"runtime": denoiser.runtime.name, **measure(classifier.judge(net, images), reference)}
            evaluation["rows"].append(row)
            write(out, evaluation)
    write(out, evaluation)
    return evaluation


def main(argv: list[str] | None = None) -> int:
    """Evaluate as the command line says. Returns the exit code: 0, or 3 when what is given cannot be used."""
    args = parse(argv)
    command = shlex.join(["python", "-m", "model.evaluate", *(sys.argv[1:] if argv is None else argv)])
    try:
        evaluation = run(args, checkpoint.load(args.model), command)
    except (DataError, CheckpointError, ScheduleError, RuntimeUnavailableError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nstopped; the finished rows are kept, and the same command goes on from there")
        return 130
    print(markdown(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
