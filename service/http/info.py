"""What `/info` says: the model, what can be asked of it, and what was measured at start-up."""

from __future__ import annotations

from typing import Any, get_args

from model.likelihood import DEFAULT_TERMS
from model.samplers import SAMPLERS, SINGLE_STEP
from service import __version__
from service.engine.messages import EngineInfo
from service.settings import Settings
from service.tasks import edit, interpolate, score
from service.tasks.images import MODES, formats_of, picture_size
from service.tasks.sampling import (
    DEFAULT_GUIDANCE,
    DEFAULT_SIGMAS,
    DEFAULT_STEPS,
    ModelCapabilities,
)
from service.tasks.uploads import FORMATS, MAX_PIXELS


def describe(capabilities: ModelCapabilities, settings: Settings, engine: EngineInfo) -> dict[str, Any]:
    """The answer of `/info`."""
    channels, height, width = capabilities.shape
    picture = dict(zip(("height", "width"), picture_size(capabilities.shape), strict=True))
    return {
        "version": __version__,
        "model": {
            "name": capabilities.name,
            "classes": list(capabilities.class_names),
            "guidance": capabilities.guided,
            "classifier": capabilities.classified,
            "condition": list(capabilities.condition),
            "channels": channels,
            "height": height,
            "width": width,
            "picture": picture,
            "formats": list(formats_of(channels)),
            "parameters": capabilities.parameters,
            "sha256": capabilities.checksum,
            "timesteps": capabilities.schedule.timesteps,
            "prediction_type": capabilities.schedule.prediction_type,
        },
        "samplers": list(SAMPLERS),
        "defaults": _defaults(capabilities),
        "editing": _editing(capabilities),
        "scoring": {
            "max_images": min(score.MAX_SCORED, capabilities.max_images),
            "terms": min(DEFAULT_TERMS, capabilities.schedule.timesteps),
            "typicality": capabilities.typicality is not None,
        },
        "limits": {
            "max_images": capabilities.max_images,
            "max_batch": engine.max_batch_size,
            "max_queue": settings.max_queue,
            "deadline_s": settings.deadline_s,
        },
        "runtime": {
            "name": engine.runtime,
            "device": engine.device,
            "dtype": engine.dtype,
            "step_seconds": {str(size): round(seconds, 5) for size, seconds in engine.step_times},
        },
        "batch_invariance": {
            "invariant": engine.invariance.holds,
            "max_abs_difference": engine.invariance.max_abs_difference,
            "batch_sizes": list(engine.invariance.batch_sizes),
        },
    }


def _defaults(capabilities: ModelCapabilities) -> dict[str, Any]:
    steps: dict[str, int] = {
        sampler: min(most, capabilities.schedule.timesteps) for sampler, most in DEFAULT_STEPS.items()
    }
    return {
        "sampler": capabilities.sampler,
        "num_inference_steps": steps[capabilities.sampler],
        "steps_by_sampler": steps,
        "eta": 0.0,
        "guidance_scale": DEFAULT_GUIDANCE if capabilities.guided else 1.0,
        "guidance_sigma_min": DEFAULT_SIGMAS[0],
        "guidance_sigma_max": DEFAULT_SIGMAS[1],
        "classifier_scale": 0.0,
        "timestep_spacing": capabilities.schedule.timestep_spacing,
        "output_format": formats_of(capabilities.shape[0])[0],
    }


def _editing(capabilities: ModelCapabilities) -> dict[str, Any]:
    pictures = FORMATS if capabilities.shape[0] in MODES else ()
    return {
        "pictures": {"formats": [*(name.lower() for name in pictures), "npy"], "max_pixels": MAX_PIXELS},
        "edit": {"strength": edit.DEFAULT_STRENGTH},
        "inpainting": {
            "samplers": list(SINGLE_STEP),
            "jump_length": edit.DEFAULT_JUMP_LENGTH,
            "jump_n_sample": edit.DEFAULT_JUMP_N_SAMPLE,
            "max_rows": edit.MAX_STEPS,
        },
        "interpolation": {
            "methods": list(get_args(interpolate.Method)),
            "points": min(interpolate.DEFAULT_POINTS, capabilities.max_images),
            "strength": interpolate.DEFAULT_STRENGTH,
            "inversion_steps": min(interpolate.DEFAULT_INVERSION_STEPS, capabilities.schedule.timesteps),
        },
    }
