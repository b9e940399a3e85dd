"""Which project a checkpoint comes from, by the names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from model.convert import (
    classifier,
    ddpm,
    denoising_diffusion,
    monai,
    monai_classifier,
    openai,
    unet2d,
)
from model.convert.conversion import Choices, ClassifierConversion, Conversion, ConversionError, State
from model.convert.source import prefixes


@dataclass(frozen=True)
class Family:
    """Networks of one project.

    anchors: names of weights that all of them have, and no family below it. read: of a whole state dict.
    """

    name: str
    anchors: tuple[str, ...]
    read: Callable[[State, Choices], Conversion | ClassifierConversion]

    def convert(self, state: State, choices: Choices) -> Conversion | ClassifierConversion:
        """A state dict as one of ours. Raises ConversionError for what is refused, incomplete or damaged."""
        try:
            return self.read(state, choices)
        except ConversionError:
            raise
        except KeyError as error:
            raise ConversionError(f"{self.name}: {error.args[0]} is missing") from error
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Of shapes that no such network has.
            reason = " ".join(str(error).split())
            raise ConversionError(f"{self.name}: its weights do not fit together ({reason})") from error


@dataclass(frozen=True)
class Refused:
    """Networks that are recognised, and why they are not converted."""

    name: str
    anchors: tuple[str, ...]
    reason: str


FAMILIES = (
    Family("guided-diffusion or improved-diffusion", openai.ANCHORS, openai.convert),
    Family(ddpm.FAMILY, ddpm.ANCHORS, ddpm.convert),
    Family(monai_classifier.FAMILY, monai_classifier.ANCHORS, monai_classifier.convert),
    Family(monai.FAMILY, monai.ANCHORS, monai.convert),
    Family(unet2d.FAMILY, unet2d.ANCHORS, unet2d.convert),
    Family(denoising_diffusion.FAMILY, denoising_diffusion.ANCHORS, denoising_diffusion.convert),
    Family(
        f"{denoising_diffusion.FAMILY}, alone",
        denoising_diffusion.NETWORK,
        denoising_diffusion.convert_network,
    ),
    Family(
        classifier.FAMILY, classifier.ANCHORS, classifier.convert
    ),  # the first half of a U-Net of OpenAI's
)
REFUSED = (
    Refused(
        "latent diffusion (CompVis)",
        ("first_stage_model.encoder.conv_in.weight",),
        "it works on the latents of an autoencoder, not on pixels",
    ),
    Refused(
        "score_sde (Song et al. 2021)",
        ("all_modules.1.weight", "all_modules.1.bias"),
        "its modules are numbered, so what they are is not in the file; diffusers has a script for NCSN++",
    ),
    Refused(
        "diffusers' UNet2DConditionModel",
        ("conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        "it is conditional on a text's embedding, which this service does not have",
    ),
    Refused(
        "a diffusion transformer (DiT)",
        ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"),
        "it is not a U-Net",
    ),
)


def recognise(table: Mapping[str, Tensor]) -> tuple[Family, list[str]]:
    """The family of a checkpoint, and the prefixes below which its weights lie.

    Raises ConversionError for a family that is refused, with the reason, and for an unknown one.
    """
    for refused in REFUSED:
        if prefixes(table, refused.anchors):
            raise ConversionError(f"{refused.name}: {refused.reason}")
    for family in FAMILIES:
        if found := prefixes(table, family.anchors):
            return family, found
    first = ", ".join(list(table)[:3]) or "nothing"
    names = "; ".join(family.name for family in FAMILIES)
    raise ConversionError(f"no known network: its weights begin with {first} (known: {names})")
