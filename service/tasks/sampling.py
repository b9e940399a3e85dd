"""Sampling parameters: the fields that requests share, checked against a model and filled in."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.class_names import meant_by
from model.samplers import Guidance, Plan, build_plan
from model.schedule import NoiseSchedule, Spacing
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import ModelInfo
from service.errors import InvalidRequestError
from service.tasks.images import NO_ALPHA, ImageFormat, formats_of, picture_size

MAX_SEED = 2**53 - 1  # what every JSON reader can hold
DEFAULT_GUIDANCE = 2.0
DEFAULT_SIGMAS = 0.3, 5.0
"""The noise levels of guidance: better images at three quarters of the evaluations, see the model cards."""
MAX_NUMBER = 2**31 - 1
"""As a label, of a model that embeds numbers."""
MAX_SCALE = 64
MAX_ENLARGED_PIXELS = 2**24
"""Of all pictures of an answer together, where they are enlarged."""
Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]
DEFAULT_STEPS: dict[Sampler, int] = {"ddpm": 50, "ddim": 50, "dpmpp_2m": 20, "sde_dpmpp_2m": 20}
"""Beyond which each gains little on the shipped model (its evaluation.md)."""
ImageCount = Annotated[int, Field(ge=1, description="images; image i has seed + i")]


class JobRequest(BaseModel):
    """Fields of every request. Those left out get the defaults that `/info` reports."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="seed of the first image; random if absent")
    class_label: int | str | None = Field(None, description="class index or name; absent: unconditional")
    deadline_s: float | None = Field(None, gt=0, description="give up (504) after this many seconds")
    output_format: ImageFormat | None = Field(
        None,
        description="of pictures inside JSON and events; absent: png, or npy for a model whose samples are no"
        " pictures",
    )
    preview: PreviewKind = Field(
        "x0", description="what a stream shows: the x₀ prediction, x_t, both or none"
    )
    preview_every: int | None = Field(
        None,
        ge=1,
        description="steps between a stream's previews; absent: about two dozen, at most ten a second",
    )


class SamplingRequest(JobRequest):
    """Fields of every request for images."""

    num_inference_steps: int | None = Field(None, ge=1, description="denoising steps, at most the model's T")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM's η: 0 deterministic, 1 as random as DDPM")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="classifier-free guidance; 1 is none. Needs a class"
    )
    guidance_sigma_min: float = Field(
        DEFAULT_SIGMAS[0],
        ge=0,
        description="lowest noise level σ = √((1 − ᾱ) / ᾱ) that guidance is applied at",
    )
    guidance_sigma_max: float | None = Field(
        DEFAULT_SIGMAS[1], gt=0, description="highest such noise level; null: any"
    )
    classifier_scale: float = Field(
        0.0, ge=0, le=100, description="guidance by the gradient of a classifier, where the model has one"
    )
    timestep_spacing: Spacing | None = Field(None, description="which timesteps; absent: the model's own")
    scale: int = Field(1, ge=1, le=MAX_SCALE, description="enlarge pictures so many times, without smoothing")


class ModelCapabilities(ModelInfo, frozen=True, eq=False, kw_only=True):
    """What can be asked of the loaded model under the service's limits."""

    max_images: int
    deadline_s: float

    def label(self, wanted: int | str) -> int:
        """Index of a class given by index, or by name (any case). Raises InvalidRequestError for others.

        And for a text that could mean several classes: a number is always an index. A conditional model
        without classes takes a number as its label.
        """
        if self.conditional and not self.class_names:
            return self._number(wanted)
        names = self.class_names
        if not names:
            raise InvalidRequestError("class_label", "This model is unconditional and has no classes.")
        if isinstance(wanted, int):
            found = [wanted] if 0 <= wanted < len(names) else []
        else:
            found = meant_by(wanted, names)
        if len(found) == 1:
            return found[0]
        if found:
            meant = " or ".join(f"{index} ({names[index]})" for index in found)
            raise InvalidRequestError(
                "class_label",
                f"This could mean class {meant}: give the index as a number, or the whole name.",
            )
        raise InvalidRequestError(
            "class_label", f"Unknown class. The classes are {', '.join(names)} (0 to {len(names) - 1})."
        )

    def _number(self, wanted: int | str) -> int:
        text = str(wanted).strip()
        if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_NUMBER:
            raise InvalidRequestError("class_label", f"This model takes a number from 0 to {MAX_NUMBER}.")
        return int(text)

    def name_of(self, label: int | None) -> str | int | None:
        """What an answer calls a label: its class's name, or the number where there are no classes."""
        return label if label is None or not self.class_names else self.class_names[label]

    def label_or_none(self, wanted: int | str | None) -> int | None:
        """The same, or None for the unconditional branch. Raises InvalidRequestError where there is none."""
        if wanted is not None:
            return self.label(wanted)
        if self.conditional and not self.guided:
            raise InvalidRequestError(
                "class_label", "This model has no unconditional branch: a class is needed."
            )
        return None


@dataclass(frozen=True)
class PreparedRequest:
    """A job, and what its answer needs besides the results.

    parameters: the request with every default filled in. per_image: extra fields of each image. columns: of
    the contact sheet. scale: pixels of a picture per pixel of the model and side.
    """

    spec: JobSpec
    parameters: dict[str, Any]
    output_format: ImageFormat
    per_image: tuple[dict[str, Any], ...] = ()
    columns: int | None = None
    scale: int = 1

    def extra(self, index: int) -> dict[str, Any]:
        """The extra fields of one image."""
        return self.per_image[index] if self.per_image else {}


@dataclass(frozen=True)
class SamplingParams:
    """What all requests for images share, with every default filled in."""

    seed: int
    label: int | None
    sampler: Sampler
    steps: int
    eta: float
    spacing: Spacing | None
    guidance: Guidance
    reported: dict[str, Any] = field(hash=False)
    """The same by the names of the request's fields, for the answer."""

    def plan(self, schedule: NoiseSchedule, strength: float = 1.0) -> Plan:
        """The sampler's table. strength: the fraction of its steps that is run."""
        return _plan(schedule, self.sampler, self.steps, self.eta, self.spacing, self.guidance, strength)


@lru_cache(maxsize=64)
def _plan(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    eta: float,
    spacing: Spacing | None,
    guidance: Guidance,
    strength: float,
) -> Plan:
    return build_plan(
        schedule, sampler, steps, eta=eta, spacing=spacing, guidance=guidance, strength=strength
    )


def check_count(name: str, images: int, capabilities: ModelCapabilities) -> None:
    """Raises InvalidRequestError for more images than a request may ask for."""
    if images > capabilities.max_images:
        raise InvalidRequestError(name, f"At most {capabilities.max_images} images per request.")


def refuse_fields(reason: str, **fields: object) -> None:
    """Raises InvalidRequestError, for this reason, at the first of the fields that is given."""
    for name, value in fields.items():
        if value is not None:
            raise InvalidRequestError(name, reason)


def refuse_condition(capabilities: ModelCapabilities) -> None:
    """Raises InvalidRequestError for a model that makes its pictures from a picture."""
    if capabilities.condition:
        raise InvalidRequestError("", "This model makes pictures from a picture: POST it to /edit.")


def first_seed(request: JobRequest, seeds: int) -> int:
    """The request's seed, or a random one. Raises InvalidRequestError unless so many seeds from it on fit."""
    seed = secrets.randbits(32) if request.seed is None else request.seed
    if seed + seeds - 1 > MAX_SEED:
        raise InvalidRequestError("seed", f"Image i has seed + i, and the largest seed is {MAX_SEED}.")
    return seed


def resolve_format(request: JobRequest, capabilities: ModelCapabilities) -> ImageFormat:
    """The format of an answer's pictures. Raises InvalidRequestError for one that cannot hold them."""
    formats = formats_of(capabilities.shape[0])
    if request.output_format is None:
        return formats[0]
    if request.output_format not in formats:
        raise InvalidRequestError("output_format", NO_ALPHA)
    return request.output_format


def resolve(
    request: SamplingRequest, capabilities: ModelCapabilities, sampler: Sampler, seeds: int = 1
) -> SamplingParams:
    """Fill in the defaults. seeds: how many the request needs, counting from its own.

    Raises InvalidRequestError for what this model does not allow.
    """
    schedule = capabilities.schedule
    steps = request.num_inference_steps or min(DEFAULT_STEPS[sampler], schedule.timesteps)
    if steps > schedule.timesteps:
        raise InvalidRequestError("num_inference_steps", f"This model has {schedule.timesteps} timesteps.")
    if request.eta and sampler != "ddim":
        raise InvalidRequestError("eta", "Only ddim has an η; the other samplers fix their own noise.")
    label = capabilities.label_or_none(request.class_label)
    guidance = _guidance(request, capabilities, label)
    seed = first_seed(request, seeds)
    spacing = request.timestep_spacing
    reported = {
        "seed": seed,
        "sampler": sampler,
        "num_inference_steps": steps,
        "eta": request.eta,
        "guidance_scale": guidance.scale,
        "guidance_sigma_min": request.guidance_sigma_min,
        "guidance_sigma_max": request.guidance_sigma_max,
        "classifier_scale": request.classifier_scale,
        "timestep_spacing": spacing or schedule.timestep_spacing,
        "class_label": capabilities.name_of(label),
        "output_format": resolve_format(request, capabilities),
        "scale": request.scale,
    }
    return SamplingParams(seed, label, sampler, steps, request.eta, spacing, guidance, reported)


def _guidance(request: SamplingRequest, capabilities: ModelCapabilities, label: int | None) -> Guidance:
    low, high = request.guidance_sigma_min, request.guidance_sigma_max
    if high is not None and high <= low:
        raise InvalidRequestError("guidance_sigma_max", "It must be greater than guidance_sigma_min.")
    if request.classifier_scale and not capabilities.classified:
        raise InvalidRequestError("classifier_scale", "This model has no classifier.")
    if request.classifier_scale and label is None:
        raise InvalidRequestError("classifier_scale", "A classifier needs a class_label to guide towards.")
    scale = request.guidance_scale
    if scale is None:
        by_default = capabilities.guided and label is not None and not request.classifier_scale
        scale = DEFAULT_GUIDANCE if by_default else 1.0
    elif scale != 1.0 and not capabilities.guided:
        raise InvalidRequestError("guidance_scale", "This model was trained without a null class.")
    elif scale != 1.0 and label is None:
        raise InvalidRequestError("guidance_scale", "Guidance needs a class_label to guide towards.")
    return Guidance(scale, (low, math.inf if high is None else high), request.classifier_scale)


def sampling_request(
    request: SamplingRequest,
    params: SamplingParams,
    stages: Sequence[Stage],
    capabilities: ModelCapabilities,
    *,
    reported: Mapping[str, Any],
    per_image: Sequence[dict[str, Any]] = (),
    columns: int | None = None,
) -> PreparedRequest:
    """A prepared request for images. reported: the parameters that only some requests have."""
    _check_scale(request.scale, len(stages[-1].chains), capabilities)
    return PreparedRequest(
        job_spec(request, stages, capabilities, params.sampler),
        {**reported, **params.reported},
        resolve_format(request, capabilities),
        tuple(per_image),
        columns,
        request.scale,
    )


def job_spec(
    request: JobRequest, stages: Sequence[Stage], capabilities: ModelCapabilities, sampler: str
) -> JobSpec:
    """A job of these stages, under a new id. sampler: what its images are counted by.

    Raises InvalidRequestError for timesteps that the network has no value at.
    """
    lowest = capabilities.lowest_timestep
    if lowest and any(min(chain.plan.timesteps) < lowest for stage in stages for chain in stage.chains):
        half = capabilities.schedule.timesteps // 2
        raise InvalidRequestError(
            "timestep_spacing",
            f"The model's network has no value below timestep {lowest}, which this needs. Images of at most"
            f" {half} steps with timestep_spacing trailing do not.",
        )
    now = time.monotonic()
    allowed = min(request.deadline_s or capabilities.deadline_s, capabilities.deadline_s)
    return JobSpec(
        id=secrets.token_hex(8),
        sampler=sampler,
        stages=tuple(stages),
        deadline=now + allowed,
        created=now,
        preview=request.preview,
        preview_every=request.preview_every,
    )


def _check_scale(scale: int, images: int, capabilities: ModelCapabilities) -> None:
    height, width = picture_size(capabilities.shape)
    if scale > 1 and images * height * width * scale**2 > MAX_ENLARGED_PIXELS:
        raise InvalidRequestError(
            "scale", f"Enlarged pictures have at most {MAX_ENLARGED_PIXELS} pixels together."
        )
