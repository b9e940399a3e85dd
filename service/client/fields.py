"""The fields of requests, by the names of docs/api.md, as keyword arguments of the client's methods."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic", "logsnr"]
Format = Literal["png", "jpeg", "webp", "npy"]
Shown = Literal["x0", "xt", "both", "none"]
Upload: TypeAlias = "str | PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""A picture: the path of a file, the bytes of one, a PIL image, or an array of the model's shape."""


class JobFields(TypedDict, total=False):
    """Of every request."""

    model: str | None
    deadline_s: float | None
    output_format: Format | None
    preview: Shown
    preview_every: int | None


class SamplingFields(JobFields, total=False):
    """Of every request for images."""

    num_inference_steps: int | None
    eta: float
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_sigma_min: float
    guidance_sigma_max: float | None
    classifier_scale: float
    timestep_spacing: Spacing | None
    sampler: Sampler | None
    scale: int


class GenerateFields(SamplingFields, total=False):
    """Of `generate`, `stream` and `submit`. A list of classes or seeds has one for each image."""

    n: int
    seed: int | Sequence[int] | None
    class_label: int | str | Sequence[int | str | None] | None


class EditFields(SamplingFields, total=False):
    """Of `edit`."""

    n: int
    seed: int | None
    class_label: int | str | None
    mask: Upload | None
    strength: float | None
    jump_length: int | None
    jump_n_sample: int | None


class InterpolateFields(SamplingFields, total=False):
    """Of `interpolate`."""

    seed: int | None
    class_label: int | str | None
    images: Sequence[Upload] | None
    seeds: Sequence[int] | None
    points: int | None
    method: Literal["stochastic", "inversion"] | None
    strength: float | None


class ScoreFields(JobFields, total=False):
    """Of `score`."""

    seed: int | None
    class_label: int | str | None
    terms: int | None


PICTURES = frozenset({"image", "mask", "images"})
"""The fields that hold pictures."""
