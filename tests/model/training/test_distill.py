from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from PIL import Image

from model import checkpoint, diffusion, inspect
from model.chain import Chain, InitialLatent
from model.denoiser import generate
from model.evaluation.sampling import denoiser_of
from model.noise import START, normals
from model.samplers import Guidance, build_plan
from model.schedule import NoiseSchedule, ScheduleError
from model.training import student
from model.training.distill import DistillConfig, Distiller, Pool, in_range, main, parse, prepare
from model.training.segments import Teacher, segment_plans
from model.unet import ConfigError
from tests.model.conftest import SCHEDULER, tiny_checkpoint
from tests.model.training.states import states
from tests.model.training.test_train import dataset

LEVELS = (999, 649, 353, 124)
CONFIG = DistillConfig(
    LEVELS,
    steps=8,
    batch_size=4,
    warmup_steps=2,
    learning_rate=1e-3,
    label_dropout=0.4,
    substeps=2,
    pool=24,
    fresh=3,
)


def distiller(config: DistillConfig = CONFIG, **unet: Any) -> Distiller:
    model = tiny_checkpoint(**unet)
    guide = Teacher(
        model,
        config.timesteps,
        sampler=config.sampler,
        substeps=config.substeps,
        guidance=config.guidance,
        runtime="torch",
    )
    return Distiller(student.begin(model, config.timesteps, config.guidance_scale), guide, dataset(), config)


# ----------------------------------------------------------------------------------------------------
# The student's schedule and network


def test_a_student_has_the_teachers_noise_levels() -> None:
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    own = NoiseSchedule.from_diffusers(student.scheduler_config(schedule, LEVELS, 2.0))
    assert own.timesteps == 4
    np.testing.assert_allclose(own.alphas_cumprod, schedule.alphas_cumprod[[124, 353, 649, 999]], rtol=1e-12)
    assert own.distilled
    assert own.distilled_guidance == 2.0
    assert not schedule.distilled
    for steps, visited in ((4, [3, 2, 1, 0]), (2, [3, 1]), (1, [3])):
        assert own.spaced_timesteps(steps).tolist() == visited


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_diffusers_visits_the_same_levels(steps: int) -> None:
    config = student.scheduler_config(NoiseSchedule.from_diffusers(SCHEDULER), LEVELS, 2.0)
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(steps)
    ours = NoiseSchedule.from_diffusers(config)
    assert theirs.timesteps.tolist() == ours.spaced_timesteps(steps).tolist()
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), ours.alphas_cumprod, rtol=1e-5)


def test_default_levels_fall_to_the_image() -> None:
    assert student.default_timesteps(1000, 4) == (999, 649, 353, 124)
    assert student.default_timesteps(1000, 1) == (999,)
    assert student.default_timesteps(4, 4) == (3, 2, 1, 0)
    assert student.default_timesteps(4, 2) == (3, 0)
    for wrong in (0, 5):
        with pytest.raises(ConfigError, match="4 timesteps"):
            student.default_timesteps(4, wrong)


@pytest.mark.parametrize("levels", [(), (5, 5), (3, 4), (1000, 3), (4, -1)])
def test_levels_that_do_not_fall_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        student.scheduler_config(NoiseSchedule.from_diffusers(SCHEDULER), levels, 1.0)


@pytest.mark.parametrize("wrong", [-1, math.inf, math.nan])
def test_a_folded_guidance_is_a_scale(wrong: float) -> None:
    with pytest.raises(ScheduleError, match="distilled_guidance"):
        NoiseSchedule.from_diffusers(SCHEDULER | {"distilled_guidance": wrong})


def test_a_new_student_computes_what_its_teacher_does() -> None:
    teacher = tiny_checkpoint()
    begun = student.begin(teacher, LEVELS, 2.0)
    x = torch.randn(4, *teacher.shape, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3])
    ours = begun.unet(x, torch.arange(4), y)
    theirs = teacher.unet(x, torch.tensor(LEVELS[::-1]), y)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    untold = teacher.unet(x, torch.arange(4), y)
    assert (ours - untold).abs().max() > 0.01


def test_a_predicted_variance_is_left_out() -> None:
    teacher = tiny_checkpoint(out_channels=2)
    begun = student.begin(teacher, LEVELS, 1.0)
    assert begun.unet.config.out_channels == 1
    assert begun.shape == teacher.shape
    x, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    theirs = teacher.unet(x, torch.tensor([124, 999]), y)[:, :1]
    torch.testing.assert_close(begun.unet(x, torch.tensor([0, 3]), y), theirs, rtol=1e-4, atol=1e-4)


def test_teachers_without_a_student_are_refused() -> None:
    with pytest.raises(ConfigError, match="image beside x"):
        student.begin(replace(tiny_checkpoint(), condition=("image",)), LEVELS, 1.0)
    with pytest.raises(ConfigError, match="Fourier"):
        student.begin(tiny_checkpoint(time_embedding_type="fourier"), (999,), 1.0)
    with pytest.raises(ConfigError, match="tell apart"):
        student.begin(tiny_checkpoint(), tuple(range(99, 0, -1)), 1.0)


# ----------------------------------------------------------------------------------------------------
# The target


def test_the_target_by_hand() -> None:
    """Levels with √ᾱ = 0.8 and 0.6: at the upper one x = 0.5, and the teacher gets to 0.7."""
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 2,
        "trained_betas": [1 - 0.64, 1 - 0.36 / 0.64],
    }
    schedule = NoiseSchedule.from_diffusers(config)
    x, end = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.7)
    # ε = (x − 0.6 x₀) / 0.8 and 0.8 x₀ + 0.6 ε = 0.7, so 0.8 x₀ + 0.375 − 0.45 x₀ = 0.7: x₀ = 0.325 / 0.35.
    x0 = 0.325 / 0.35
    v = student.v_target(schedule, x, torch.tensor([1]), end)
    assert float(v) == pytest.approx((0.6 * 0.5 - x0) / 0.8, abs=1e-6)
    # From the lowest level a step ends in the image: x₀ = 0.7.
    v = student.v_target(schedule, x, torch.tensor([0]), end)
    assert float(v) == pytest.approx((0.8 * 0.5 - 0.7) / 0.6, abs=1e-6)


def test_a_step_of_ddim_with_the_target_lands_where_the_teacher_does() -> None:
    config = student.scheduler_config(NoiseSchedule.from_diffusers(SCHEDULER), LEVELS, 2.0)
    schedule = NoiseSchedule.from_diffusers(config)
    rng = torch.Generator().manual_seed(0)
    x, end = torch.randn(2, 4, 1, 3, 3, generator=rng, dtype=torch.float64)
    level = torch.tensor([0, 1, 2, 3])
    v = student.v_target(schedule, x, level, end)
    x0 = diffusion.predict_x0(schedule, x, level, v)
    theirs = DDIMScheduler.from_config(config)
    theirs.set_timesteps(4)
    for i in range(4):
        stepped = theirs.step(v[i], int(level[i]), x[i])
        torch.testing.assert_close(stepped.prev_sample, end[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stepped.pred_original_sample, x0[i], rtol=1e-3, atol=1e-3)


def test_an_error_of_v_is_worth_where_the_step_lands() -> None:
    schedule = NoiseSchedule.from_diffusers(
        student.scheduler_config(NoiseSchedule.from_diffusers(SCHEDULER), LEVELS, 2.0)
    )
    theirs = DDIMScheduler.from_config(student.scheduler_config(schedule, (3, 2, 1, 0), 2.0))
    theirs.set_timesteps(4)
    x, v, error = torch.tensor([0.3]), torch.tensor([0.2]), 0.01
    off = [
        float(theirs.step(v + error, t, x).prev_sample - theirs.step(v, t, x).prev_sample) for t in range(4)
    ]
    squares = np.square(off)
    np.testing.assert_allclose(student.landing_weights(schedule), squares / squares.mean(), rtol=1e-3)


def test_the_objective_weights_the_levels() -> None:
    both = {name: distiller(replace(CONFIG, objective=name)) for name in ("landing", "v")}
    losses = {name: it.step() for name, it in both.items()}
    assert losses["landing"] != losses["v"]
    assert both["v"].weights.tolist() == [1, 1, 1, 1]
    assert np.array_equal(both["v"].losses, both["landing"].losses)  # before the step the same network


# ----------------------------------------------------------------------------------------------------
# The teacher


def test_segments_lead_from_level_to_level() -> None:
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    plans = segment_plans(schedule, LEVELS, "dpmpp_2m", 3, Guidance(2.0, (0.3, 5.0)))
    assert [plan.timesteps for plan in plans] == [
        (999, 882, 766),
        (649, 550, 452),
        (353, 277, 200),
        (124, 82, 41),
    ]
    for plan, start, end in zip(plans, LEVELS, [649, 353, 124, None], strict=True):
        assert plan.start == pytest.approx(schedule.alphas_cumprod[start] ** 0.5)
        after = 1.0 if end is None else schedule.alphas_cumprod[end] ** 0.5
        assert plan.table["k_0"][-1] == pytest.approx(after)
    assert plans[0].table["c_p"].tolist()[0] == 0  # it looks back at nothing before it
    assert plans[0].table["c_p"].tolist()[-1] != 0
    assert [plan.evaluations for plan in plans] == [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1)]
    few = segment_plans(schedule, (2, 1), "ddim", 4, Guidance())
    assert [plan.timesteps for plan in few] == [(2,), (1, 0)]


def test_a_segment_is_a_part_of_the_whole_chain() -> None:
    """DDIM in all its steps at once gets to where its segments get one after the other."""
    model = tiny_checkpoint()
    guide = Teacher(model, LEVELS, sampler="ddim", substeps=2, guidance=Guidance(2.0), runtime="torch")
    image = np.zeros((1, 1, 8, 8), np.float32)
    x = guide.segment(0, image, [1], seed=5).x[0]
    timesteps = [t for plan in guide.guided for t in plan.timesteps]
    whole = build_plan(model.schedule, "ddim", 0, timesteps=timesteps, guidance=Guidance(2.0))
    start = guide.denoiser.start(Chain(whole, 5, 1))
    alpha = model.schedule.alphas_cumprod[999] ** 0.5
    np.testing.assert_allclose(x, math.sqrt(1 - alpha**2) * start, atol=1e-6)  # the image is black
    ends = [guide.segment(place, image, [1], seed=5).end for place in range(4)]
    assert all(bool(end.isfinite().all()) for end in ends)


def test_only_what_has_a_class_is_guided() -> None:
    guide = Teacher(
        tiny_checkpoint(), LEVELS, sampler="ddim", substeps=1, guidance=Guidance(4.0), runtime="torch"
    )
    images = np.zeros((2, 1, 8, 8), np.float32)
    both = guide.segment(2, images, [1, None], seed=0)
    plain = Teacher(
        tiny_checkpoint(), LEVELS, sampler="ddim", substeps=1, guidance=Guidance(), runtime="torch"
    )
    unguided = plain.segment(2, images, [1, None], seed=0)
    torch.testing.assert_close(both.x, unguided.x)
    torch.testing.assert_close(both.end[1], unguided.end[1])
    assert (both.end[0] - unguided.end[0]).abs().max() > 0.01


# ----------------------------------------------------------------------------------------------------
# Training


def test_the_pool_is_a_ring() -> None:
    pool = Pool(4, (1, 2, 2))
    assert len(pool) == 0
    for level in range(3):
        x = torch.full((3, 1, 2, 2), float(level))
        pool.add(x, -x, level, torch.full((3,), 10 + level))
    assert len(pool) == 4
    assert pool.level.tolist() == [2, 1, 1, 1] or sorted(pool.level.tolist()) == [1, 2, 2, 2]
    assert pool.x[:, 0, 0, 0].tolist() == [float(level) for level in pool.level.tolist()]
    assert pool.label.tolist() == [10 + level for level in pool.level.tolist()]
    assert torch.equal(pool.target, -pool.x)


def test_pairs_are_what_the_teacher_does() -> None:
    it = distiller()
    it.step()
    assert len(it.pool) == 24
    assert sorted(set(it.pool.level.tolist())) == [0, 1, 2, 3]
    assert set(it.pool.label.tolist()) <= {0, 1, 2, 3}
    assert 3 in it.pool.label.tolist()  # the null class


@pytest.mark.parametrize(("dropout", "bf16"), [(0.0, False), (0.2, True)])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    tmp_path: Path, dropout: float, bf16: bool
) -> None:
    config = replace(CONFIG, bf16=bf16)
    straight = distiller(config, dropout=dropout)
    losses = [straight.step() for _ in range(6)]

    first = distiller(config, dropout=dropout)
    before = [first.step() for _ in range(3)]
    first.save(tmp_path)
    second = distiller(config, dropout=dropout)
    assert second.resume(tmp_path)
    after = [second.step() for _ in range(3)]

    assert before + after == losses
    expected, found = states(straight), states(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_learning_lowers_the_loss() -> None:
    config = replace(CONFIG, steps=150, learning_rate=3e-3, fresh=1, batch_size=16)
    it = distiller(config)
    losses = [it.step() for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:10])


def test_pixels_are_taken_to_the_models_range() -> None:
    images = np.array([-1.0, 0.0, 1.0], np.float32)
    assert in_range(images, (-1.0, 1.0)).tolist() == [-1, 0, 1]
    assert in_range(images, (0.0, 1.0)).tolist() == [0, 0.5, 1]


# ----------------------------------------------------------------------------------------------------
# The folder


def test_diffusers_makes_the_same_pictures_from_a_students_folder(tmp_path: Path) -> None:
    it = distiller()
    it.step()
    it.save(tmp_path / "student")
    model = checkpoint.load(tmp_path / "student")
    denoiser = denoiser_of(model, "torch")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    unet = UNet2DModel.from_pretrained(tmp_path / "student", subfolder="unet").eval()
    for steps in (4, 2, 1):
        plan = build_plan(model.schedule, "ddim", steps)
        ours = generate(denoiser, [Chain(plan, seed, 1) for seed in (3, 4)])
        x = torch.from_numpy(normals([3, 4], [START] * 2, model.shape))
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            with torch.no_grad():
                out = unet(x, t, torch.tensor([1, 1])).sample
            x = scheduler.step(out, t, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_an_unconditional_student_is_a_ddim_pipeline(tmp_path: Path) -> None:
    it = distiller(replace(CONFIG, guidance_scale=1.0), num_class_embeds=None)
    it.step()
    it.save(tmp_path / "student")
    model = checkpoint.load(tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipeline, DDIMPipeline)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=4,
        output_type="np",
    ).images
    x = torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(0))
    plan = build_plan(model.schedule, "ddim", 4)
    denoiser = denoiser_of(model, "torch")
    chains = [Chain(plan, 0, start=InitialLatent(((1.0, image.numpy()),))) for image in x]
    ours = generate(denoiser, chains).clamp(-1, 1) / 2 + 0.5
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-3)


def pictures(folder: Path) -> Path:
    data = dataset(12)
    for name in data.class_names:
        (folder / "train" / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(data.images[np.arange(12)], data.labels, strict=True)):
        Image.fromarray(image[0]).save(folder / "train" / data.class_names[label] / f"{i}.png")
    return folder


def test_the_command_distils_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path / "teacher", tiny_checkpoint())
    command = [
        "--teacher", str(tmp_path / "teacher"), "--data", str(pictures(tmp_path / "data")),
        "--out", str(tmp_path / "four"), "--steps", "4", "--runtime", "torch", "--batch-size", "4",
        "--pool", "16", "--fresh", "4", "--substeps", "2",
    ]  # fmt: skip
    assert main([*command, "--optimizer-steps", "50"]) == 0
    record = json.loads((tmp_path / "four" / "training" / "distill.jsonl").read_text())
    assert record["step"] == 50
    assert len(record["v_by_level"]) == 4
    assert record["taught"] == 16 + 50 * 4
    capsys.readouterr()
    assert main([*command, "--optimizer-steps", "52"]) == 0
    assert "resumed at step 50" in capsys.readouterr().out
    found = checkpoint.load(tmp_path / "four")
    report, schedule = inspect.inspect(str(tmp_path / "four"))
    assert "ddim by default and no other: distilled into 4 steps, with guidance 2" in inspect.describe(
        report, schedule
    )
    assert found.schedule.distilled_guidance == 2.0
    assert found.class_names == ("cat", "dog", "fox")
    assert found.null_class == 3

    # A student is a teacher too: of two steps, whose guidance is the one that is in it.
    halved = [*command[:1], str(tmp_path / "four"), *command[2:5], str(tmp_path / "two")]
    it = prepare(parse([*halved, "--steps", "2", "--timesteps", "3,1", *command[8:]]))
    assert it.config.sampler == "ddim"
    assert it.config.guidance == Guidance(1.0, (0.3, 5.0))
    assert it.teacher.rows() == [2, 2]
    np.testing.assert_allclose(
        it.model.schedule.alphas_cumprod, found.schedule.alphas_cumprod[[1, 3]], rtol=1e-9
    )
    assert it.model.schedule.distilled_guidance == 2.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--steps", "2", "--timesteps", "3,2,1"], "--timesteps are 3, where --steps is 2"),
        (["--steps", "1001"], "a teacher of 1000 timesteps has no student of 1001"),
        (["--steps", "2", "--timesteps", "5,5"], "fall strictly"),
        (["--data", "nowhere"], "no such folder"),
        (["--fresh", "9", "--pool", "8"], "--fresh must be from 1 to --pool, which is 8"),
    ],
)
def test_the_command_says_what_it_cannot_do(
    tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save(tmp_path / "teacher", tiny_checkpoint())
    command = ["--teacher", str(tmp_path / "teacher"), "--data", str(pictures(tmp_path / "data"))]
    assert main([*command, "--out", str(tmp_path / "out"), "--runtime", "torch", *options]) == 3
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
