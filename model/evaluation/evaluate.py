"""How good are the samples? `python -m model.evaluation.evaluate --model FOLDER --data PATH`.

The judge, a classifier trained on the real training images (model/evaluation/judge.py), judges samples of
every given sampler, step count and guidance scale: how often they show the requested class, how far they are
as a set from the test images (Fréchet distance), how realistic (precision) and how complete (recall) they
are. The real-data baseline stands beside them: the same measures for real training images, in sets of the
same size.

The measures see different faults. Gaussian noise of 25 grey levels on 1000 real Fashion-MNIST images takes
the distance from 4 to 117 and recall from 0.88 to 0.35, yet leaves precision at 0.89.

Every row of the table uses the same seeds and the same test images. FOLDER/evaluation.json is written after
each row, and rows it already has for the same weights and settings are not computed again
(model/evaluation/report.py).
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from model.evaluation import fidelity, judge
from model.evaluation.judge import Classifier, ClassifierConfig, Judgement
from model.evaluation.plots import Axis, guidance_name
from model.evaluation.report import Setting, markdown, resumed, write
from model.evaluation.sampling import denoiser_of, sample
from model.runtimes import (
    TORCH_DTYPES,
    RuntimeName,
    RuntimeUnavailableError,
    keep_torch_off,
)
from model.samplers import SAMPLERS, build_plan
from model.schedule import ScheduleError
from model.training.data import DataError, Dataset, Labels, capacity, choose_images, load_splits

BASELINE_SETS = 5
"""Sets of training images that the real-data baseline is averaged over, where there are that many."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    real: features [n, D] of test images. labels: requested classes [n], or None for unconditional models.
    """

    real: fidelity.Features
    labels: Labels | None
    class_names: tuple[str, ...]


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


def real_baseline(
    net: Classifier, train_set: Dataset, real: fidelity.Features, balanced: bool
) -> dict[str, float]:
    """The measures of real training images against the reference, averaged over disjoint sets."""
    n = len(real)
    draws = max(1, min(BASELINE_SETS, capacity(train_set, balanced) // n))
    index = choose_images(train_set, draws * n, balanced)
    features = judge.judge(net, train_set.images, index).features.reshape(draws, n, -1)
    frechet = [fidelity.frechet_distance(real, part) for part in features]
    precision, recall = np.mean([fidelity.precision_recall(real, part) for part in features], axis=0)
    return {
        "draws": draws,
        "frechet": float(np.mean(frechet)),
        "frechet_sd": float(np.std(frechet, ddof=1)) if draws > 1 else 0.0,
        "precision": float(precision),
        "recall": float(recall),
    }


def state_sha256(net: torch.nn.Module) -> str:
    """A checksum of a classifier's parameters."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _interval(text: str) -> tuple[float, float | None]:
    low, _, high = text.partition(":")
    return float(low or 0), float(high) if high else None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(
        "python -m model.evaluation.evaluate", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder")
    add("--data", type=Path, required=True, help="IDX files, or pictures in train/ and test/ by class")
    add("--held-out", help="the split to compare with (default: t10k of IDX files, test/ of pictures)")
    add("--out", type=Path, help="where evaluation.* go (default: the model folder)")
    add("--name", default="evaluation", help="what those files are called")
    add("--over", default="evaluations", choices=get_args(Axis), help="the plot's axis")
    add("--samplers", type=listed(str), default=list(SAMPLERS), help=f"of {','.join(SAMPLERS)}")
    add("--steps", type=listed(int), default=[10, 20, 50], help="step counts, like 10,20,50")
    add("--guidance", type=listed(float), default=[1.0], help="guidance scales, like 1,2; 1 is none")
    add(
        "--classifier-scale",
        type=listed(float),
        default=[0.0],
        help="of guidance by the model's noise-aware classifier, like 0,1; 0 is none",
    )
    add(
        "--interval",
        type=listed(_interval),
        default=[(0.0, None)],
        help="noise levels σ to guide at, like 0.5:5 (default: all, which is 0:)",
    )
    add("--rescale", type=listed(float), default=[0.0], help="rescaling of guided outputs, like 0,0.7")
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
    train_set, test_set = load_splits(args.data, config.shape[1:], config.in_channels, args.held_out)
    conditional = config.conditional
    if conditional and len(model.class_names) != len(train_set.class_names):
        count = len(train_set.class_names)
        raise DataError(f"{args.data}: {count} classes, but the model has {len(model.class_names)}")
    index = choose_images(test_set, args.samples, conditional)
    path = args.classifier or args.model / "judge" / "classifier.safetensors"
    net = judge.load_or_train(path, train_set, ClassifierConfig(epochs=args.classifier_epochs))
    on_test = judge.judge(net, test_set.images)
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
        "real_baseline": real_baseline(net, train_set, reference.real, conditional),
        "commands": [],
        "rows": [],
    }
    return net, reference, evaluation


def requested(args: argparse.Namespace) -> list[Setting]:
    """The rows of a command line, each once: without guidance, every interval is the same row."""
    every = product(
        args.samplers,
        args.steps,
        args.guidance,
        args.dtype,
        args.classifier_scale,
        args.interval,
        args.rescale,
    )
    settings = []
    for sampler, steps, scale, dtype, classifier_scale, interval, rescale in every:
        low, high = interval if scale != 1 or classifier_scale else (0.0, None)
        settings.append(
            Setting(sampler, steps, scale, dtype, classifier_scale, low, high, rescale if scale != 1 else 0.0)
        )
    return list(dict.fromkeys(settings))


def run(args: argparse.Namespace, model: Checkpoint, command: str) -> dict[str, Any]:
    """Fill in the rows that the table does not have yet, writing it after each. Returns the evaluation."""
    path = (args.out or args.model) / f"{args.name}.json"
    settings = requested(args)
    if model.null_class is None and any(s.guidance_scale != 1 for s in settings):
        raise ScheduleError("guidance needs a model with a null class: use --guidance 1")
    if model.classifier is None and any(s.classifier_scale for s in settings):
        raise ScheduleError(
            "--classifier-scale needs a model with a classifier: see model.training.noise_classifier"
        )
    plans = {s: build_plan(model.schedule, s.sampler, s.steps, guidance=s.guidance) for s in settings}
    net, reference, evaluation = prepare(args, model)
    evaluation["commands"] = [command]
    identity = ("weights_sha256", "samples", "seed", "train_images", "test_images", "classifier")
    evaluation = resumed(path, evaluation, identity)
    guide = None if model.classifier is None else state_sha256(model.classifier)
    rows = [row for row in evaluation["rows"] if row.get("guide_sha256") in (None, guide)]
    evaluation["rows"] = rows  # without rows that another classifier guided
    done = {Setting.of(row) for row in rows}
    to_do = [setting for setting in settings if setting not in done]
    denoisers = {s.dtype: denoiser_of(model, args.runtime, args.device, s.dtype) for s in to_do}
    for denoiser in denoisers.values():
        keep_torch_off(denoiser.runtime)
    labels = [None] * args.samples if reference.labels is None else [int(y) for y in reference.labels]

    total = sum(plans[setting].remaining[0] for setting in to_do) * args.samples
    with tqdm(total=total, unit="eval", unit_scale=True, smoothing=0.05, mininterval=1) as bar:
        for setting in to_do:
            guided = guidance_name(asdict(setting))
            bar.set_description(f"{setting.sampler} {setting.steps} ×{guided} {setting.dtype}")
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
            row = {**asdict(setting), "evaluations": plans[setting].remaining[0], "seconds": seconds}
            row |= {"runtime": denoiser.runtime.name, **measure(judge.judge(net, images), reference)}
            if setting.classifier_scale:
                row["guide_sha256"] = guide
            rows.append(row)
            write(path, evaluation, args.over)
    write(path, evaluation, args.over)
    return evaluation


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 3 for unusable input, or 130 when interrupted."""
    args = parse(argv)
    command = shlex.join(
        ["python", "-m", "model.evaluation.evaluate", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        evaluation = run(args, checkpoint.load(args.model), command)
    except (DataError, CheckpointError, ScheduleError, RuntimeUnavailableError, FloatingPointError) as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nstopped; the finished rows are kept, and the same command resumes after them")
        return 130
    print(markdown(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
