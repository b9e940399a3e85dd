"""A model that is distilled into a few steps: what follows from its folder, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from PIL import Image

from model.checkpoint import Checkpoint
from model.samplers import build_inversion, build_measurement
from model.schedule import ScheduleError
from model.training import student
from service.engine.warmup import model_info
from service.errors import InvalidRequestError
from service.http.info import describe
from service.http.state import capabilities_of
from service.tasks.automatic1111 import TextToImage, prepare_text_to_image
from service.tasks.edit import EditRequest, prepare_edit
from service.tasks.generate import GenerateRequest, prepare_generate
from service.tasks.interpolate import InterpolateRequest, prepare_interpolation
from service.tasks.sampling import ModelCapabilities, PreparedRequest
from service.tasks.score import ScoreRequest, prepare_score
from tests.service.fakes import fake_info, tiny_model
from tests.service.live import settings
from tests.service.tasks.test_uploads import file, noise

LEVELS = (99, 60, 35, 12)


def distilled(guidance_scale: float = 2.0) -> Checkpoint:
    return student.begin(tiny_model(), LEVELS, guidance_scale)


def capabilities(model: Checkpoint | None = None) -> ModelCapabilities:
    return capabilities_of(model_info(model or distilled()), settings())


def prepare(**request: Any) -> PreparedRequest:
    return prepare_generate(GenerateRequest(**request), capabilities())


def picture() -> bytes:
    return file(Image.fromarray(noise(8, 8)))


def test_the_defaults_are_the_students() -> None:
    made = prepare(class_label="dog", seed=3)
    assert made.parameters["sampler"] == "ddim"
    assert made.parameters["num_inference_steps"] == 4
    assert made.parameters["guidance_scale"] == 1.0
    (chain,) = made.spec.stages[0].chains
    assert chain.plan.timesteps == (3, 2, 1, 0)
    assert chain.plan.evaluations == (1, 1, 1, 1)


@pytest.mark.parametrize(("steps", "visited"), [(1, (3,)), (2, (3, 1)), (4, (3, 2, 1, 0))])
def test_fewer_steps_begin_at_the_same_noise(steps: int, visited: tuple[int, ...]) -> None:
    (chain,) = prepare(num_inference_steps=steps).spec.stages[0].chains
    assert chain.plan.timesteps == visited
    assert chain.plan.start == 0


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_inference_steps", 5, "into 4 steps of ddim, and cannot take more"),
        ("sampler", "dpmpp_2m", "into 4 steps of ddim, and knows no other sampler"),
        ("eta", 0.5, "η must be 0"),
        ("timestep_spacing", "leading", "spaced trailing"),
        ("guidance_scale", 3.0, "guidance 2 is part of it, and it takes no other"),
        ("guidance_scale", 0.0, "guidance 2 is part of it"),
        ("classifier_scale", 1.0, "no classifier"),
    ],
)
def test_what_a_student_has_not_learned_is_refused_by_name(field: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        prepare(class_label="dog", **{field: value})
    assert refused.value.field == field


def test_what_changes_nothing_is_taken() -> None:
    made = prepare(class_label="dog", sampler="ddim", guidance_scale=1.0, timestep_spacing="trailing")
    assert made.parameters["guidance_scale"] == 1.0


def test_its_unconditional_branch_remains() -> None:
    assert prepare(class_label=None).spec.stages[0].chains[0].label is None


@pytest.mark.parametrize(
    ("strength", "visited"), [(0.25, (0,)), (0.5, (1, 0)), (0.6, (1, 0)), (1.0, (3, 2, 1, 0))]
)
def test_a_picture_is_edited_on_the_students_timesteps(strength: float, visited: tuple[int, ...]) -> None:
    model = distilled()
    made = prepare_edit(EditRequest(image=picture(), strength=strength), capabilities(model))
    (chain,) = made.spec.stages[0].chains
    assert chain.plan.timesteps == visited
    if strength < 1:
        assert chain.plan.start == pytest.approx(math.sqrt(model.schedule.alphas_cumprod[visited[0]]))


def test_a_hole_is_filled_by_ddim_with_jumps_of_one_step() -> None:
    made = prepare_edit(EditRequest(image=picture(), mask=file(Image.new("L", (8, 8), 255))), capabilities())
    assert made.parameters["sampler"] == "ddim"
    assert (made.parameters["jump_length"], made.parameters["jump_n_sample"]) == (1, 5)
    (chain,) = made.spec.stages[0].chains
    assert len(chain.plan) == 4 + 3 * 4  # each of three jumps, four times again
    assert chain.known is not None


def test_an_inversion_is_refused_and_the_other_paths_are_not() -> None:
    known = capabilities()
    images = picture(), picture()
    with pytest.raises(InvalidRequestError, match=r"distilled .* no way up") as refused:
        prepare_interpolation(InterpolateRequest(images=images, method="inversion"), known)
    assert refused.value.field == "method"
    mixed = prepare_interpolation(InterpolateRequest(images=images), known)
    assert mixed.parameters["method"] == "stochastic"
    assert mixed.spec.stages[0].chains[0].plan.timesteps == (1, 0)
    between = prepare_interpolation(InterpolateRequest(seeds=(1, 2)), known)
    assert between.parameters["num_inference_steps"] == 4


def test_a_score_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"bound no likelihood\. Ask the model it was made from"):
        prepare_score(ScoreRequest(images=[picture()]), capabilities())


def test_the_plans_of_both_are_refused_below_the_service_too() -> None:
    schedule = distilled().schedule
    with pytest.raises(ScheduleError, match="nothing inverts"):
        build_inversion(schedule, 4)
    with pytest.raises(ScheduleError, match="likelihood"):
        build_measurement(schedule, [1, 0])


def test_programs_for_other_models_get_what_it_can_do() -> None:
    body = TextToImage(
        prompt="a dog", steps=20, cfg_scale=7.0, sampler_name="Euler a", scheduler="Karras", eta=0.3
    )
    made = prepare_text_to_image(body, capabilities())
    assert made.parameters["sampler"] == "ddim"
    assert made.parameters["num_inference_steps"] == 4
    assert (made.parameters["guidance_scale"], made.parameters["eta"]) == (1.0, 0.0)
    assert made.parameters["class_label"] == "dog"
    fewer = prepare_text_to_image(TextToImage(prompt="a dog", steps=2), capabilities())
    assert fewer.parameters["num_inference_steps"] == 2


@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_info_says_what_it_is(scale: float) -> None:
    info = describe(capabilities(distilled(scale)), settings(), fake_info(8))
    assert info["model"]["distilled_guidance"] == scale
    assert info["model"]["guidance"] is False
    assert info["model"]["timesteps"] == 4
    assert info["samplers"] == ["ddim"]
    assert info["defaults"]["sampler"] == "ddim"
    assert info["defaults"]["num_inference_steps"] == 4
    assert info["defaults"]["steps_by_sampler"] == {"ddim": 4}
    assert info["defaults"]["guidance_scale"] == 1.0
    assert info["defaults"]["timestep_spacing"] == "trailing"
    assert info["scoring"]["max_images"] == 0
    assert info["editing"]["inpainting"]["samplers"] == ["ddim"]
    assert info["editing"]["inpainting"]["jump_length"] == 1
    assert info["editing"]["interpolation"]["methods"] == ["stochastic"]


def test_other_models_are_as_before() -> None:
    info = describe(capabilities(tiny_model()), settings(), fake_info(8))
    assert info["model"]["distilled_guidance"] is None
    assert info["model"]["guidance"] is True
    assert info["samplers"] == ["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]
    assert info["editing"]["inpainting"]["samplers"] == ["ddpm", "ddim"]
    assert info["editing"]["interpolation"]["methods"] == ["stochastic", "inversion"]
    assert info["scoring"]["max_images"] > 0
