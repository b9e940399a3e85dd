"""What `/info` says: the model, what can be asked of it, and what was measured at start-up."""

from __future__ import annotations

import math
from typing import Any, get_args

from model.likelihood import DEFAULT_TERMS
from model.samplers import SINGLE_STEP
from service import __version__
from service.engine.messages import EngineInfo
from service.http.openapi import lists, objects, typed
from service.settings import Settings
from service.tasks import edit, interpolate, score
from service.tasks.images import MODES, formats_of, picture_size
from service.tasks.sampling import (
    DEFAULT_SIGMAS,
    DEFAULT_STEPS,
    ModelCapabilities,
    default_guidance,
)
from service.tasks.uploads import FORMATS, MAX_PIXELS

NAMES = {"type": "string"}
INFO = objects(
    "What is served.",
    version=typed("of the service"),
    model=objects(
        "The model.",
        name=typed("its name"),
        classes=lists("names of its classes, by index", NAMES),
        guidance=typed("whether classifier-free guidance is possible", "boolean"),
        classifier=typed("whether classifier guidance is possible", "boolean"),
        condition=lists("what it takes beside noise: pictures or masks", NAMES),
        channels=typed("of a sample", "integer"),
        height=typed("of a sample", "integer"),
        width=typed("of a sample", "integer"),
        picture=objects(
            "A sample as a picture.",
            height=typed("in pixels", "integer"),
            width=typed("in pixels", "integer"),
        ),
        formats=lists("of answers, the default first", NAMES),
        parameters=typed("how many the network has", "integer"),
        sha256=typed("of its files"),
        timesteps=typed("T", "integer"),
        prediction_type=typed("what the network predicts"),
        distilled_guidance={
            "type": ["number", "null"],
            "description": "the guidance in a network that is distilled into its timesteps; null: none is",
        },
    ),
    samplers=lists("their names", NAMES),
    defaults=objects(
        "What is assumed of a request that does not say.",
        sampler=typed("the model's own"),
        num_inference_steps=typed("with that sampler", "integer"),
        steps_by_sampler=typed("with each of them", "object", additionalProperties={"type": "integer"}),
        eta=typed("η of DDIM", "number"),
        guidance_scale=typed("of classifier-free guidance", "number"),
        guidance_rescale=typed("how far its outputs are rescaled", "number"),
        guidance_sigma_min=typed("lowest noise level with guidance", "number"),
        guidance_sigma_max={"type": ["number", "null"], "description": "highest noise level with guidance"},
        classifier_scale=typed("of classifier guidance", "number"),
        timestep_spacing=typed("which timesteps are taken"),
        output_format=typed("of pictures"),
    ),
    editing=objects(
        "Defaults and limits of requests with pictures.",
        pictures=objects(
            "What may be uploaded.",
            formats=lists("of files", NAMES),
            max_pixels=typed("of a file", "integer"),
        ),
        edit=objects("/edit.", strength=typed("the default", "number")),
        inpainting=objects(
            "/edit with a mask.",
            samplers=lists("that can do it", NAMES),
            jump_length=typed("the default", "integer"),
            jump_n_sample=typed("the default", "integer"),
            max_rows=typed("most steps with all jumps", "integer"),
        ),
        interpolation=objects(
            "/interpolate.",
            methods=lists("their names", NAMES),
            points=typed("the default", "integer"),
            strength=typed("the default", "number"),
            inversion_steps=typed("the default", "integer"),
        ),
    ),
    scoring=objects(
        "/score.",
        max_images=typed("per request", "integer"),
        terms=typed("the default", "integer"),
        typicality=typed("whether the model has the statistics", "boolean"),
    ),
    limits=objects(
        "Of this instance.",
        max_images=typed("per request", "integer"),
        max_batch=typed("rows per network call", "integer"),
        max_queue=typed("images in flight", "integer"),
        deadline_s=typed("longest a request may take, in seconds", "number"),
    ),
    runtime=objects(
        "What runs the network.",
        name=typed("the runtime"),
        device=typed("where"),
        dtype=typed("in which precision"),
        step_seconds=typed(
            "seconds of a network call, by its rows", "object", additionalProperties={"type": "number"}
        ),
    ),
    batch_invariance=objects(
        "How far batch neighbours change a result, measured at start-up.",
        invariant=typed("whether they change nothing", "boolean"),
        max_abs_difference=typed("the largest difference", "number"),
        batch_sizes=lists("that were compared", {"type": "integer"}),
    ),
    self_test=objects(
        "One network evaluation compared with a known result, where the model's folder has one.",
        optional=("difference", "tolerance"),
        result=typed("what came out", enum=["not tested", "passed", "failed"]),
        difference={"type": ["number", "null"], "description": "the largest difference; null: not finite"},
        tolerance={"type": ["number", "null"], "description": "what it may be"},
    ),
)
"""The schema of the answer of `/info`."""


def describe(capabilities: ModelCapabilities, settings: Settings, engine: EngineInfo) -> dict[str, Any]:
    """The answer of `/info`."""
    channels, height, width = capabilities.shape
    distilled = capabilities.schedule.distilled
    picture = dict(zip(("height", "width"), picture_size(capabilities.shape), strict=True))
    return {
        "version": __version__,
        "model": {
            "name": capabilities.name,
            "classes": list(capabilities.class_names),
            "guidance": capabilities.guidable,
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
            "distilled_guidance": capabilities.schedule.distilled_guidance,
        },
        "samplers": list(capabilities.samplers),
        "defaults": _defaults(capabilities),
        "editing": _editing(capabilities),
        "scoring": {
            "max_images": 0 if distilled else min(score.MAX_SCORED, capabilities.max_images),
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
        "self_test": _self_test(engine),
    }


def _self_test(engine: EngineInfo) -> dict[str, Any]:
    result = engine.self_test
    if result is None:
        return {"result": "not tested"}
    found = result.difference if math.isfinite(result.difference) else None
    return {
        "result": "passed" if result.passed else "failed",
        "difference": found,
        "tolerance": result.tolerance if math.isfinite(result.tolerance) else None,
    }


def _defaults(capabilities: ModelCapabilities) -> dict[str, Any]:
    steps: dict[str, int] = {
        sampler: min(most, capabilities.schedule.timesteps)
        for sampler, most in DEFAULT_STEPS.items()
        if sampler in capabilities.samplers
    }
    scale, rescale = default_guidance(capabilities)
    return {
        "sampler": capabilities.sampler,
        "num_inference_steps": steps[capabilities.sampler],
        "steps_by_sampler": steps,
        "eta": 0.0,
        "guidance_scale": scale,
        "guidance_rescale": rescale,
        "guidance_sigma_min": DEFAULT_SIGMAS[0],
        "guidance_sigma_max": DEFAULT_SIGMAS[1],
        "classifier_scale": 0.0,
        "timestep_spacing": capabilities.schedule.timestep_spacing,
        "output_format": formats_of(capabilities.shape[0])[0],
    }


def _editing(capabilities: ModelCapabilities) -> dict[str, Any]:
    pictures = FORMATS if capabilities.shape[0] in MODES else ()
    distilled = capabilities.schedule.distilled
    return {
        "pictures": {"formats": [*(name.lower() for name in pictures), "npy"], "max_pixels": MAX_PIXELS},
        "edit": {"strength": edit.DEFAULT_STRENGTH},
        "inpainting": {
            "samplers": [sampler for sampler in SINGLE_STEP if sampler in capabilities.samplers],
            "jump_length": edit.default_jump_length(capabilities),
            "jump_n_sample": edit.DEFAULT_JUMP_N_SAMPLE,
            "max_rows": edit.MAX_STEPS,
        },
        "interpolation": {
            "methods": list(get_args(interpolate.Method)[:1] if distilled else get_args(interpolate.Method)),
            "points": min(interpolate.DEFAULT_POINTS, capabilities.max_images),
            "strength": interpolate.DEFAULT_STRENGTH,
            "inversion_steps": min(interpolate.DEFAULT_INVERSION_STEPS, capabilities.schedule.timesteps),
        },
    }
