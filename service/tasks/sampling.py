"""Sampling parameters: the fields that requests share, checked against a model and filled in."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from model.class_names import meant_by
from model.samplers import Guidance, Plan, build_plan
from model.schedule import NoiseSchedule, Spacing
from service.engine.jobs import JobSpec, PreviewKind, Stage
from service.engine.messages import ModelInfo
from service.errors import InvalidRequestError
from service.tasks.images import NO_ALPHA, ImageFormat, formats_of, picture_size
from service.tasks.per_image import MAX_SEED as MAX_SEED
from service.tasks.per_image import Labels, Seeds, consecutive, count_of, labels_of

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
ImageCount = Annotated[int, Field(ge=1)]
COUNT = "images; absent: 1, or as many as a list has entries"


class JobRequest(BaseModel):
    """Fields of every request. Those left out get the defaults that `/info` reports."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: str | None = Field(None, description="the model's name, of several behind one address")
    seed: Seeds = Field(None, description="of the first image, or of each as a list; random if absent")
    class_label: Labels = Field(
        None, description="class index or name, or one for each image as a list; null: unconditional"
    )
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
    guidance_rescale: float | None = Field(
        None, ge=0, le=1, description="how far guided outputs get the deviation of unguided ones"
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

    @property
    def guidable(self) -> bool:
        """Whether a request may choose a guidance scale: a distilled network has one in it."""
        return self.guided and not self.schedule.distilled

    @property
    def samplers(self) -> tuple[str, ...]:
        """Those that a request may choose from."""
        return (self.sampler,) if self.schedule.distilled else tuple(DEFAULT_STEPS)

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
    the contact sheet. scale: pixels of a picture per pixel of the model and side. request: as it was asked.
    """

    spec: JobSpec
    parameters: dict[str, Any]
    output_format: ImageFormat
    per_image: tuple[dict[str, Any], ...] = ()
    columns: int | None = None
    scale: int = 1
    request: JobRequest | None = None

    def extra(self, index: int) -> dict[str, Any]:
        """The extra fields of one image."""
        return self.per_image[index] if self.per_image else {}

    def since(self, arrived: float) -> Self:
        """The same, with the job's times counted from then: seconds on the machine's monotonic clock."""
        spec = self.spec
        deadline = None if spec.deadline is None else spec.deadline - spec.created + arrived
        return replace(self, spec=replace(spec, created=arrived, deadline=deadline))


@dataclass(frozen=True)
class SamplingParams:
    """What all requests for images share, with every default filled in."""

    seeds: tuple[int, ...]
    labels: tuple[int | None, ...]
    """Of each image."""
    sampler: Sampler
    steps: int
    eta: float
    spacing: Spacing | None
    guidance: Guidance
    """Of the images that have a class."""
    reported: dict[str, Any] = field(hash=False)
    """The same by the names of the request's fields, for the answer."""
    per_image: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    """Those of `reported` that are others for an image alone."""

    @property
    def seed(self) -> int:
        """Of the first image."""
        return self.seeds[0]

    @property
    def label(self) -> int | None:
        """Of the first image, and of all where the request has one class."""
        return self.labels[0]

    @property
    def images(self) -> Sequence[tuple[int, int | None]]:
        """(seed, label) of each image."""
        return list(zip(self.seeds, self.labels, strict=True))

    def guidance_of(self, label: int | None) -> Guidance:
        """Of an image: one without a class among others with one is not guided."""
        return unguided(self.guidance) if label is None else self.guidance

    def plan(self, schedule: NoiseSchedule, guidance: Guidance | None = None, strength: float = 1.0) -> Plan:
        """The sampler's table. guidance: None for the first image's. strength: the fraction of its steps."""
        guidance = guidance or self.guidance_of(self.label)
        return _plan(schedule, self.sampler, self.steps, self.eta, self.spacing, guidance, strength)


def unguided(guidance: Guidance) -> Guidance:
    """What becomes of guidance where there is no class to guide towards."""
    return replace(guidance, scale=1.0, classifier_scale=0.0, rescale=0.0)


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


def image_count(n: int | None, request: JobRequest, capabilities: ModelCapabilities) -> int:
    """How many images a request is for. Raises InvalidRequestError for more than it may ask for."""
    name, count = count_of(n=n, class_label=request.class_label, seed=request.seed)
    check_count(name, count, capabilities)
    return count


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


def resolve_format(request: JobRequest, capabilities: ModelCapabilities) -> ImageFormat:
    """The format of an answer's pictures. Raises InvalidRequestError for one that cannot hold them."""
    formats = formats_of(capabilities.shape[0])
    if request.output_format is None:
        return formats[0]
    if request.output_format not in formats:
        raise InvalidRequestError("output_format", NO_ALPHA)
    return request.output_format


def resolve(
    request: SamplingRequest, capabilities: ModelCapabilities, sampler: Sampler, count: int = 1
) -> SamplingParams:
    """Fill in the defaults. count: how many seeds the request needs, or has as a list.

    Raises InvalidRequestError for what this model does not allow.
    """
    schedule = capabilities.schedule
    if schedule.distilled:
        _check_distilled(request, sampler, capabilities)
    steps = request.num_inference_steps or min(DEFAULT_STEPS[sampler], schedule.timesteps)
    if steps > schedule.timesteps:
        raise InvalidRequestError("num_inference_steps", f"This model has {schedule.timesteps} timesteps.")
    if request.eta and sampler != "ddim":
        raise InvalidRequestError("eta", "Only ddim has an η; the other samplers fix their own noise.")
    labels = labels_of(request.class_label, count, capabilities.label_or_none)
    classes = [capabilities.name_of(label) for label in labels]
    guidance = _guidance(request, capabilities, any(label is not None for label in labels))
    several = isinstance(request.seed, list)
    seeds = tuple(request.seed) if isinstance(request.seed, list) else consecutive(request.seed, count)
    spacing = request.timestep_spacing
    reported = {
        "seed": list(seeds) if several else seeds[0],
        "sampler": sampler,
        "num_inference_steps": steps,
        "eta": request.eta,
        "guidance_scale": guidance.scale,
        "guidance_rescale": guidance.rescale,
        "guidance_sigma_min": request.guidance_sigma_min,
        "guidance_sigma_max": request.guidance_sigma_max,
        "classifier_scale": request.classifier_scale,
        "timestep_spacing": spacing or schedule.timestep_spacing,
        "class_label": classes if isinstance(request.class_label, list) else classes[0],
        "output_format": resolve_format(request, capabilities),
        "scale": request.scale,
    }
    per_image: list[dict[str, Any]] = []
    if isinstance(request.class_label, list):
        alone = unguided(guidance)
        differs = {
            "guidance_scale": alone.scale,
            "guidance_rescale": alone.rescale,
            "classifier_scale": alone.classifier_scale,
        }
        per_image = [{"class_label": name, **(differs if name is None else {})} for name in classes]
    return SamplingParams(
        seeds, labels, sampler, steps, request.eta, spacing, guidance, reported, tuple(per_image)
    )


def _check_distilled(request: SamplingRequest, sampler: Sampler, capabilities: ModelCapabilities) -> None:
    """Raises InvalidRequestError for what a network that is distilled into a few steps cannot do."""
    schedule = capabilities.schedule
    what = f"This model is distilled into {schedule.timesteps} steps of {capabilities.sampler}"
    if sampler != capabilities.sampler:
        raise InvalidRequestError("sampler", f"{what}, and knows no other sampler.")
    if request.num_inference_steps is not None and request.num_inference_steps > schedule.timesteps:
        raise InvalidRequestError("num_inference_steps", f"{what}, and cannot take more.")
    if request.eta:
        raise InvalidRequestError("eta", f"{what} without noise: η must be 0.")
    if request.timestep_spacing not in (None, schedule.timestep_spacing):
        raise InvalidRequestError("timestep_spacing", f"{what}, spaced {schedule.timestep_spacing}.")
    if request.guidance_scale not in (None, 1.0):
        folded = f"guidance {schedule.distilled_guidance:g} is part of it, and it takes no other"
        raise InvalidRequestError("guidance_scale", f"{what}: {folded}.")


def refuse_distilled(capabilities: ModelCapabilities, field: str, reason: str) -> None:
    """Raises InvalidRequestError for a distilled model, whose teacher can do what is asked for."""
    if capabilities.schedule.distilled:
        raise InvalidRequestError(
            field, f"This model is distilled into few steps, and {reason}. Ask the model it was made from."
        )


def default_guidance(capabilities: ModelCapabilities) -> tuple[float, float]:
    """Scale and rescaling of requests that name none: the model's own, where it has some."""
    known = capabilities.schedule
    if not capabilities.guidable:
        return 1.0, 0.0
    scale = DEFAULT_GUIDANCE if known.guidance_scale is None else known.guidance_scale
    return scale, known.guidance_rescale or 0.0


def _guidance(request: SamplingRequest, capabilities: ModelCapabilities, has_class: bool) -> Guidance:
    low, high = request.guidance_sigma_min, request.guidance_sigma_max
    if high is not None and high <= low:
        raise InvalidRequestError("guidance_sigma_max", "It must be greater than guidance_sigma_min.")
    if request.classifier_scale and not capabilities.classified:
        raise InvalidRequestError("classifier_scale", "This model has no classifier.")
    if request.classifier_scale and not has_class:
        raise InvalidRequestError("classifier_scale", "A classifier needs a class_label to guide towards.")
    scale = request.guidance_scale
    if scale is None:
        by_default = capabilities.guidable and has_class and not request.classifier_scale
        scale = default_guidance(capabilities)[0] if by_default else 1.0
    elif scale != 1.0 and not capabilities.guided:
        raise InvalidRequestError("guidance_scale", "This model was trained without a null class.")
    elif scale != 1.0 and not has_class:
        raise InvalidRequestError("guidance_scale", "Guidance needs a class_label to guide towards.")
    rescale = (
        default_guidance(capabilities)[1] if request.guidance_rescale is None else request.guidance_rescale
    )
    sigmas = low, math.inf if high is None else high
    return Guidance(scale, sigmas, request.classifier_scale, 0.0 if scale == 1 else rescale)


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
        tuple(per_image) or params.per_image,
        columns,
        request.scale,
        request,
    )


def job_spec(
    request: JobRequest, stages: Sequence[Stage], capabilities: ModelCapabilities, sampler: str
) -> JobSpec:
    """A job of these stages, under a new id. sampler: what its images are counted by.

    Raises InvalidRequestError for another model, and for timesteps that the network has no value at.
    """
    if request.model not in (None, capabilities.name):
        raise InvalidRequestError("model", f"The model here is {capabilities.name}.")
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
