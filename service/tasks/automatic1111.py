"""The fields of AUTOMATIC1111's API → jobs of ours, and what an answer says about its pictures.

Clients of that API are written for models that read text and make pictures of 512 × 512. So a prompt means
the class that it names, wherever in it the name stands, and a size means the nearest that the model's own
pictures can be enlarged to. Fields that have no meaning here are ignored, as unknown ones are there.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.class_names import meant_by
from model.schedule import Spacing
from service.errors import InvalidRequestError
from service.tasks.edit import EditRequest, prepare_edit
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.images import encode, picture_size
from service.tasks.prompts import named_in
from service.tasks.sampling import (
    MAX_ENLARGED_PIXELS,
    MAX_SCALE,
    MAX_SEED,
    ModelCapabilities,
    PreparedRequest,
    Sampler,
)
from service.tasks.uploads import Upload, opened, unpack

LARGEST_SIDE = 1 << 14
LONGEST_PROMPT = 10_000
LEAST_STRENGTH = 1e-6
"""A denoising strength of 0 is a single step too."""


@dataclass(frozen=True)
class NamedSampler:
    """A sampler under a name that clients know. eta: of DDIM by default. takes_eta: a request may set it."""

    name: str
    sampler: Sampler
    aliases: tuple[str, ...] = ()
    eta: float = 0.0
    takes_eta: bool = False


SAMPLERS = (
    NamedSampler("DPM++ 2M", "dpmpp_2m", ("k_dpmpp_2m",)),
    NamedSampler("DPM++ 2M SDE", "sde_dpmpp_2m", ("k_dpmpp_2m_sde",)),
    # In x / √ᾱ and σ, DDIM's update is Euler's, and with η = 1 that of its ancestral form.
    NamedSampler("Euler a", "ddim", ("k_euler_a", "k_euler_ancestral"), eta=1.0, takes_eta=True),
    NamedSampler("Euler", "ddim", ("k_euler",)),
    NamedSampler("DDIM", "ddim", takes_eta=True),
    NamedSampler("DDPM", "ddpm"),
)
SCHEDULERS: dict[str, tuple[str, Spacing | None]] = {
    "automatic": ("Automatic", None),
    "uniform": ("Uniform", "linspace"),
    "sgm_uniform": ("SGM Uniform", "trailing"),
    "exponential": ("Exponential", "logsnr"),
    "ddim": ("DDIM", "leading"),
}
"""Name → label, and which of our timestep spacings it is: exponential σ are even in log(ᾱ / (1 − ᾱ))."""


class TextToImage(BaseModel):
    """The fields of `txt2img` that mean something here. A null is as good as none."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, frozen=True)

    prompt: str = Field("", max_length=LONGEST_PROMPT, description="names a class; empty: unconditional")
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT, description="only repeated in the answer")
    seed: int = Field(-1, ge=-1, le=MAX_SEED, description="of the first image; −1: random")
    steps: int | None = Field(None, ge=1, description="denoising steps; absent: the sampler's default")
    cfg_scale: float | None = Field(
        None, ge=0, le=100, description="classifier-free guidance, where it applies"
    )
    batch_size: int = Field(1, ge=1, description="images, times n_iter")
    n_iter: int = Field(1, ge=1, description="images, times batch_size")
    width: int = Field(512, ge=1, le=LARGEST_SIDE, description="of the pictures, as near as can be")
    height: int = Field(512, ge=1, le=LARGEST_SIDE, description="of the pictures, as near as can be")
    sampler_name: str | None = Field(None, description="absent: the model's own")
    sampler_index: str | None = Field(None, description="an older name of sampler_name")
    scheduler: str | None = Field(None, description="which timesteps; unknown: the model's own")
    eta: float | None = Field(None, ge=0, le=1, description="η of DDIM and Euler a")
    send_images: bool = Field(True, description="whether the answer has the images")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        return (
            {key: each for key, each in data.items() if each is not None} if isinstance(data, dict) else data
        )

    @property
    def images(self) -> int:
        """How many are wanted."""
        return self.batch_size * self.n_iter


class ImageToImage(TextToImage):
    """The fields of `img2img`."""

    init_images: list[Upload] = Field([], description="the picture, a single one")
    denoising_strength: float = Field(0.75, ge=0, le=1, description="fraction of the steps that is run")
    mask: Upload | None = Field(None, description="white is regenerated")
    inpainting_mask_invert: bool = Field(False, description="black is regenerated instead")
    include_init_images: bool = Field(False, description="whether the answer repeats the pictures")


def sampler_of(body: TextToImage) -> NamedSampler | None:
    """The sampler that a request names, or the model's own where it names none.

    A name may end with that of a scheduler ("DPM++ 2M Karras"). Raises LookupError for an unknown one.
    """
    wanted = (body.sampler_name or body.sampler_index or "").casefold()
    labels = "|".join(["karras", *(label.casefold() for label, _ in SCHEDULERS.values())])
    known = {name.casefold(): each for each in SAMPLERS for name in (each.name, *each.aliases)}
    for name in (wanted, re.sub(f" ({labels})$", "", wanted)):
        if name in known:
            return known[name]
    if wanted:
        raise LookupError(wanted)
    return None


def class_of_prompt(prompt: str, capabilities: ModelCapabilities) -> int | None:
    """The class that a prompt means, or the first that it names; None if there is none.

    Prompts written for other models are full of words that mean nothing here, and no reason to refuse one.
    """
    names = capabilities.class_names
    exact = meant_by(prompt, names)
    found = exact if len(exact) == 1 else named_in(prompt, names)
    return found[0] if found else None


def scale_for(width: int, height: int, images: int, capabilities: ModelCapabilities) -> int:
    """By how much to enlarge pictures: to the nearest area that an answer may have. Proportions stay."""
    area = math.prod(picture_size(capabilities.shape))
    scales = range(1, MAX_SCALE + 1)
    fitting = [scale for scale in scales if images * area * scale**2 <= MAX_ENLARGED_PIXELS] or [1]
    return min(fitting, key=lambda scale: abs(area * scale**2 - width * height))


def prepare_text_to_image(body: TextToImage, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job for images of the class that the prompt names. Raises as `prepare_generate` and `sampler_of`."""
    return prepare_generate(GenerateRequest(**_fields(body, capabilities)), capabilities)


def prepare_image_to_image(body: ImageToImage, capabilities: ModelCapabilities) -> PreparedRequest:
    """A job that changes the picture by the strength, inside the mask. Raises as `prepare_edit`.

    Call it away from an event loop.
    """
    if len(body.init_images) != 1:
        raise InvalidRequestError("init_images", "A single picture is needed.")
    strength = None if capabilities.condition else max(body.denoising_strength, LEAST_STRENGTH)
    mask = None if not body.mask else _mask(unpack(body.mask, "mask"), body.inpainting_mask_invert)
    fields = _fields(body, capabilities)
    image = unpack(body.init_images[0], "init_images")
    return prepare_edit(EditRequest(image=image, mask=mask, strength=strength, **fields), capabilities)


def _fields(body: TextToImage, capabilities: ModelCapabilities) -> dict[str, Any]:
    """The fields of our own requests for images."""
    seed = secrets.randbits(32) if body.seed < 0 else body.seed
    label = class_of_prompt(body.prompt, capabilities) if capabilities.class_names else None
    if label is None and capabilities.class_names and not capabilities.guided:
        label = seed % len(capabilities.class_names)  # one there must be: any, and the same for the seed
    guided = capabilities.guidable and label is not None
    named = sampler_of(body)
    eta = 0.0
    if named is not None:
        eta = body.eta if named.takes_eta and body.eta is not None else named.eta
    steps, sampler = body.steps, None if named is None else named.sampler
    spacing = SCHEDULERS.get((body.scheduler or "").casefold(), ("", None))[1]
    if capabilities.schedule.distilled:  # programs always send what other models want
        steps = None if steps is None else min(steps, capabilities.schedule.timesteps)
        sampler, eta, spacing = None, 0.0, None
    return {
        "seed": seed,
        "n": body.images,
        "class_label": label,
        "guidance_scale": body.cfg_scale if guided else None,
        "num_inference_steps": steps,
        "sampler": sampler,
        "eta": eta,
        "timestep_spacing": spacing,
        "scale": scale_for(body.width, body.height, body.images, capabilities),
        "output_format": "png",
    }


def _mask(data: bytes, inverted: bool) -> bytes:
    """A mask as a file without transparency.

    Where it is transparent in places its alpha is the mask, unlike in ours: strokes of any colour are drawn.
    """
    drawn = opened(data, "mask")
    level = drawn.getchannel("A") if drawn.mode == "RGBA" else drawn.convert("L")
    pixels = np.asarray(ImageOps.invert(level) if inverted else level)
    return encode(pixels[..., None], "png", passing=True)


# ── What an answer says ────────────────────────────────────────────────────────────────────────


def information(
    body: TextToImage, prepared: PreparedRequest, seeds: Sequence[int], capabilities: ModelCapabilities
) -> dict[str, Any]:
    """What the `info` of an answer has, for the pictures of these seeds."""
    used, found = prepared.parameters, _described(body, prepared, capabilities)
    extra = _extra(body, prepared, found)
    texts = [infotext(body, prepared, seed, capabilities) for seed in seeds]
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(seeds),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(seeds),
        "seed": used["seed"],
        "all_seeds": list(seeds),
        "subseed": used["seed"],
        "all_subseeds": list(seeds),
        "subseed_strength": 0,
        "width": found["width"],
        "height": found["height"],
        "sampler_name": found["sampler"],
        "cfg_scale": used["guidance_scale"],
        "steps": used["num_inference_steps"],
        "batch_size": body.batch_size,
        "sd_model_name": capabilities.name,
        "sd_model_hash": None,
        "denoising_strength": used.get("strength"),
        "extra_generation_params": extra,
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "is_using_inpainting_conditioning": False,
    }


def infotext(body: TextToImage, prepared: PreparedRequest, seed: int, capabilities: ModelCapabilities) -> str:
    """What makes one picture, as clients read it: the prompts, and a line of parameters."""
    used, found = prepared.parameters, _described(body, prepared, capabilities)
    values: dict[str, Any] = {
        "Steps": used["num_inference_steps"],
        "Sampler": found["sampler"],
        "Schedule type": found["scheduler"],
        "CFG scale": used["guidance_scale"],
        "Seed": seed,
        "Size": f"{found['width']}x{found['height']}",
        "Model": capabilities.name,
        "Denoising strength": used.get("strength"),
        **_extra(body, prepared, found),
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value is not None)
    negative = f"Negative prompt: {body.negative_prompt}" if body.negative_prompt else ""
    return "\n".join(part for part in (body.prompt, negative, line) if part)


def _described(
    body: TextToImage, prepared: PreparedRequest, capabilities: ModelCapabilities
) -> dict[str, Any]:
    """Names and sizes of what was done."""
    used = prepared.parameters
    named = sampler_of(body) or next(
        each for each in SAMPLERS if each.sampler == used["sampler"] and "Euler" not in each.name
    )
    height, width = (side * prepared.scale for side in picture_size(capabilities.shape))
    scheduler = SCHEDULERS.get((body.scheduler or "").casefold(), SCHEDULERS["automatic"])[0]
    return {"sampler": named.name, "scheduler": scheduler, "width": width, "height": height}


def _extra(body: TextToImage, prepared: PreparedRequest, found: dict[str, Any]) -> dict[str, Any]:
    used = prepared.parameters
    extra: dict[str, Any] = {}
    if used["class_label"] is not None:
        extra["Class"] = used["class_label"]
    if used["sampler"] == "ddim":
        extra["Eta"] = used["eta"]
    if prepared.scale > 1:
        extra["Enlarged"] = f"{prepared.scale}x"
    if (body.width, body.height) != (found["width"], found["height"]):
        extra["Requested size"] = f"{body.width}x{body.height}"
    return extra


def _quoted(value: object) -> str:
    """A value as it stands in a line of parameters: quoted where it could be taken for several."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text
