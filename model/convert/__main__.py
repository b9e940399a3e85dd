"""`python -m model.convert SOURCE OUT`: another project's checkpoint as a model folder that can be served.

Prints what it is, which weights were taken, what the file does not say and was assumed, and how to serve it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from model.condition import PARTS, Part
from model.convert import source, unet2d
from model.convert.conversion import Choices, ClassifierConversion, Conversion, ConversionError
from model.convert.families import recognise
from model.convert.write import write, write_classifier
from model.unet_config import parse_size


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. An option that is not given is None."""
    parser = argparse.ArgumentParser(
        "python -m model.convert",
        description="Convert another project's checkpoint into a model folder in diffusers' layout.",
        epilog="What the checkpoint does not say is assumed as its project has it by default, and printed.",
    )
    add = parser.add_argument
    add("source", type=Path, help="a .pt, .ckpt, .bin or .safetensors file, or a diffusers folder")
    add("out", type=Path, help="the model folder to write; of a classifier, the one to put it into")
    add("--weights", help="the prefix of the weights to take, where there are several sets in the file")
    network = parser.add_argument_group("the network").add_argument
    network("--config", type=Path, help="config.json of a UNet2DModel whose state dict SOURCE is")
    network("--sample-size", type=parse_size, help="image size: 64, or HEIGHTxWIDTH")
    network("--num-head-channels", type=_positive, help="channels per attention head")
    network(
        "--num-heads",
        type=_positive,
        help="attention heads (improved-diffusion, denoising-diffusion-pytorch)",
    )
    network(
        "--use-new-attention-order",
        action=argparse.BooleanOptionalAction,
        help="the flag of that name of guided-diffusion",
    )
    network(
        "--sinusoidal-pos-emb-theta",
        type=float,
        help="the option of that name of denoising-diffusion-pytorch's Unet",
    )
    network("--layers-per-block", type=_positive, help="residual blocks per level (noisy classifiers)")
    network(
        "--condition",
        type=_parts,
        help=f"what it takes beside x, in order, as mask,masked_image; of {', '.join(PARTS)}",
    )
    network(
        "--class-vectors",
        type=Path,
        help="a file of one tensor, [classes, width]: the vectors that a network of class_embed_type identity"
        " was trained with",
    )
    network("--norm-num-groups", type=_positive, help="groups of the group norms (MONAI)")
    schedule = parser.add_argument_group("the noise schedule").add_argument
    schedule("--scheduler-config", type=Path, help="scheduler_config.json, instead of the options below")
    schedule("--num-train-timesteps", type=_positive, help="T, the number of timesteps")
    schedule("--beta-schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
    schedule("--beta-start", type=float)
    schedule("--beta-end", type=float)
    schedule("--prediction-type", choices=("epsilon", "v_prediction", "sample"))
    schedule("--variance-type", choices=("fixed_small", "fixed_large", "learned_range"))
    schedule(
        "--rescale-timesteps",
        action=argparse.BooleanOptionalAction,
        help="the flag of that name of improved-diffusion: the network sees t · 1000/T",
    )
    schedule("--data-range", type=_range, help="what black and white are to the network, as 0,1 (MONAI)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 3 for a checkpoint that cannot be converted."""
    args = parse(argv)
    options = {name: value for name, value in vars(args).items() if name not in ("source", "out", "weights")}
    choices = Choices(options)
    try:
        conversion, taken = convert(args.source, choices, args.weights)
        if isinstance(conversion, ClassifierConversion):
            write_classifier(args.out, conversion)
        else:
            write(args.out, conversion)
    except ConversionError as error:
        print(error, file=sys.stderr)
        return 3
    count = sum(tensor.numel() for tensor in conversion.weights.values())
    print(f"{conversion.family}, {count:,} parameters; taken: {taken}")
    for assumption in choices.assumed.values():
        print(f"  not in the file, assumed: {assumption}")
    print(f"written to {args.out}; serve it with: python -m service --model {args.out}")
    return 0


def convert(
    path: Path, choices: Choices, prefix: str | None = None
) -> tuple[Conversion | ClassifierConversion, str]:
    """A file or folder as a conversion, and in words what was taken of it.

    prefix: of the weights to take, where the file has several sets. Raises ConversionError.
    """
    if path.is_dir():
        folder, taken = unet2d.convert_folder(path, choices)
        folder = _conditioned(folder, choices)
        choices.check_all_used(folder.family)
        return folder, taken
    table = source.read(path)
    try:
        family, found = recognise(table)
        place = source.choose_prefix(found, prefix)
        averaged = source.lightning_ema(table, place) if prefix is None else None
        conversion = family.convert(averaged or source.weights_at(table, place), choices)
        if isinstance(conversion, Conversion):
            conversion = _conditioned(conversion, choices)
        choices.check_all_used(conversion.family)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error
    if averaged or source.is_ema(place):
        return conversion, f"the averaged (EMA) weights, {'model_ema.' if averaged else place}"
    if path.name.startswith("ema"):
        return conversion, "all of it, averaged (EMA) weights by the file's name"
    beside = sorted(other.name for other in path.parent.glob("ema*") if other.suffix == path.suffix)
    note = (
        f"; averaged (EMA) weights, which give better samples, lie beside it: {beside[-1]}" if beside else ""
    )
    return conversion, f"{place or 'all of it'}; no averaged (EMA) weights are in the file{note}"


def _conditioned(conversion: Conversion, choices: Choices) -> Conversion:
    """The same with what the command line says that the network takes beside x."""
    return replace(conversion, condition=choices.given("condition") or conversion.condition)


def _parts(text: str) -> tuple[Part, ...]:
    names = text.split(",")
    if any(name not in PARTS for name in names):
        raise argparse.ArgumentTypeError(f"{text}: some of {', '.join(PARTS)} are expected, as a,b")
    return tuple(part for name in names for part in PARTS if part == name)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is expected")
    return int(text)


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: two numbers are expected, as 0,1") from error
    if not low < high:
        raise argparse.ArgumentTypeError(f"{text}: the first must be the lower one")
    return low, high


if __name__ == "__main__":
    sys.exit(main())
