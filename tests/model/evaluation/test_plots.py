import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import generate, to_pixels
from model.evaluation import plots
from model.evaluation.sampling import denoiser_of
from model.samplers import Guidance, build_plan
from model.schedule import NoiseSchedule
from model.sheets import GAP
from model.training import student
from model.training.data import Dataset
from model.unet import UNet, UNetConfig
from tests.model.conftest import SCHEDULER, TINY, randomise


def tiny_model(names=("cat", "dog", "armadillo"), channels=1):
    shape = {"in_channels": channels, "out_channels": channels}
    unet = UNet(UNetConfig(**TINY | shape | {"num_class_embeds": len(names) + 1 if names else None})).eval()
    randomise(unet)
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    return Checkpoint("tiny", unet, schedule, SCHEDULER, names, len(names) or None)


def pixels(picture):
    return np.asarray(picture)


def test_a_contact_sheet_puts_every_image_in_its_place():
    images = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 40 + np.zeros((4, 5), np.uint8)
    sheet = pixels(plots.contact_sheet(images, scale=3))
    assert sheet.shape == (GAP + 2 * (12 + GAP), GAP + 3 * (15 + GAP), 3)
    for row in range(2):
        for column in range(3):
            top, left = GAP + row * (12 + GAP), GAP + column * (15 + GAP)
            assert (sheet[top : top + 12, left : left + 15] == images[row, column, 0, 0, 0]).all()
    assert (sheet[0] == 255).all()


def test_colours_are_kept():
    red = np.zeros((1, 1, 3, 2, 2), np.uint8)
    red[:, :, 0] = 255
    assert (pixels(plots.contact_sheet(red, scale=1))[2:4, 2:4] == (255, 0, 0)).all()


@pytest.mark.parametrize(("size", "shown"), [(16, 64), (28, 56), (32, 64), (64, 64), (100, 100)])
def test_small_pictures_are_enlarged_to_be_seen(size: int, shown: int):
    sheet = plots.contact_sheet(np.zeros((1, 1, 3, size, size), np.uint8))
    assert sheet.size == (shown + 2 * GAP,) * 2


def test_names_and_heads_get_room():
    images = np.zeros((2, 2, 1, 8, 8), np.uint8)
    bare = plots.contact_sheet(images)
    named = plots.contact_sheet(images, ["short", "a rather long name"], ["first", "last"])
    assert named.width > bare.width + 50
    assert named.height > bare.height
    margin = pixels(named)[:, : named.width - bare.width]
    assert (margin < 128).any()


def test_pixels_span_the_levels_and_are_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    assert to_pixels(x).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_class_sheet_has_a_row_of_samples_per_class(channels):
    model = tiny_model(channels=channels)
    sheet = plots.class_sheet(model, per_class=2, steps=3, seed=5, scale=1, runtime="torch")
    denoiser = denoiser_of(model, "torch")
    plan = build_plan(model.schedule, "ddim", 3)
    expected = to_pixels(generate(denoiser, [Chain(plan, 5 + 2 * 1 + i, label=1) for i in range(2)]))
    left = sheet.width - 2 * (8 + GAP)
    top = GAP + 1 * (8 + GAP)
    cell = pixels(sheet)[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert np.abs(cell[:channels].astype(int) - expected[0][:3]).max() <= 1
    assert sheet.height == GAP + 3 * (8 + GAP)


def test_a_sheet_of_an_unconditional_model_is_square():
    sheet = plots.class_sheet(tiny_model(names=()), per_class=3, steps=2, runtime="torch")
    assert sheet.width == sheet.height


def test_a_sheet_is_repeatable_and_follows_its_arguments():
    model = tiny_model()

    def sheet(**given):
        return pixels(plots.class_sheet(model, 2, 3, runtime="torch", **given))

    assert (sheet() == sheet()).all()
    for changed in ({"guidance_scale": 3.0}, {"sampler": "ddpm"}, {"seed": 1}):
        assert (sheet() != sheet(**changed)).any(), changed


@pytest.mark.parametrize("training", [True, False])
def test_a_sheet_leaves_a_model_in_training_as_it_was(training):
    model = tiny_model()
    model.unet.train(training).requires_grad_(False)
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    random_state = torch.get_rng_state()
    plots.class_sheet(model, per_class=1, steps=2, runtime="torch")
    assert model.unet.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.unet.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_trajectory_begins_with_noise_and_its_last_x0_prediction_is_the_sample():
    model = tiny_model()
    strip = plots.trajectory_strip(model, [0, 2], steps=5, columns=3, seed=4, scale=1, runtime="torch")
    step = 8 + GAP
    left, top = strip.width - 3 * step, strip.height - 4 * step
    denoiser = denoiser_of(model, "torch")
    chains = [Chain(build_plan(model.schedule, "ddim", 5), 4 + i, label) for i, label in enumerate([0, 2])]
    noise = to_pixels(torch.from_numpy(denoiser.start(chains[1])))[0]
    done = to_pixels(generate(denoiser, chains))[1, 0]
    drawn = pixels(strip)[..., 0].astype(int)
    assert (drawn[top + 2 * step : top + 2 * step + 8, left : left + 8] == noise).all()
    last = drawn[top + 3 * step : top + 3 * step + 8, left + 2 * step : left + 2 * step + 8]
    assert np.abs(last - done).max() <= 1


def test_a_loss_curve_with_and_without_held_out_losses(tmp_path):
    records = [{"step": i, "images": 64 * i, "loss": 1 / i} for i in range(1, 9)]
    plain = plots.loss_curve(records)
    held_out = plots.loss_curve([*records, {"images": 600, "loss": 0.1, "held_out_loss": 0.12}])
    plain.save(tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == plain.size
    assert (pixels(plain) != pixels(held_out)).any()
    plots.loss_curve(records[:1])


@pytest.mark.parametrize("agreement", [0.9, None])
def test_a_quality_plot_draws_every_row(agreement):
    def row(sampler, steps, scale, frechet, dtype="float32"):
        measures = {"agreement": agreement, "frechet": frechet, "precision": 0.7, "recall": 0.6}
        about = {"sampler": sampler, "guidance_scale": scale, "dtype": dtype, "evaluations": steps}
        return {**about, **measures}

    rows = [row("ddim", 10, 1.0, 3.0), row("ddim", 50, 1.0, 2.0), row("ddpm", 100, 2.0, 1.5)]
    evaluation = {
        "classifier": {"accuracy": 0.95},
        "real_baseline": {"frechet": 0.5, "precision": 0.9, "recall": 0.9},
        "rows": rows,
    }
    picture = pixels(plots.quality_plot(evaluation))
    assert (picture != pixels(plots.quality_plot({**evaluation, "rows": rows[:2]}))).any()
    other = row("ddim", 10, 1.0, 3.0, "bfloat16")
    assert (picture != pixels(plots.quality_plot({**evaluation, "rows": [*rows, other]}))).any()
    plots.quality_plot({**evaluation, "rows": []})


def guided(scale=1.0, classifier=0.0, low=0.0, high=None, **more):
    about = {"sampler": "ddim", "steps": 20, "dtype": "float32", "guidance_scale": scale}
    return {
        **about,
        "classifier_scale": classifier,
        "guidance_sigma_min": low,
        "guidance_sigma_max": high,
        **more,
    }


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"guidance_scale": 2.5}, "2.5"),  # as older rows are
        (guided(), "1"),
        (guided(2.0, high=5.0), "2 at σ 0–5"),
        (guided(2.0, low=0.3), "2 at σ from 0.3"),
        (guided(1.0, 4.0), "1, classifier 4"),
        (guided(2.0, 0.5, 0.3, 5.0), "2, classifier 0.5 at σ 0.3–5"),
    ],
)
def test_guidance_has_a_name(row, name):
    assert plots.guidance_name(row) == name


def test_the_lines_of_a_plot_over_guidance():
    plain, zero, two, four = guided(), guided(0.0), guided(2.0), guided(4.0)
    part, half, by_classifier, more = (
        guided(2.0, low=0.3, high=5.0),
        guided(1.0, 0.5),
        guided(1.0, 2.0),
        guided(2.0, 3.0),
    )
    guided_in_part = guided(1.0, 2.0, 0.3, 5.0)
    lines = plots.guidance_lines([more, guided_in_part, four, by_classifier, plain, half, two, part, zero])
    assert lines == {
        "classifier-free": [(0, zero), (1, plain), (2, two), (4, four)],
        "classifier-free at σ 0.3–5": [(1, plain), (2, part)],
        "classifier": [(0, plain), (0.5, half), (2, by_classifier)],
        "classifier at σ 0.3–5": [(0, plain), (2, guided_in_part)],
        "classifier beside guidance 2": [(0, two), (3, more)],
    }


def test_lines_of_several_samplers_are_apart():
    rows = [guided(scale, steps=steps) for scale in (1.0, 2.0) for steps in (10, 20)]
    lines = plots.guidance_lines(rows)
    assert lines == {
        "ddim 10 float32: classifier-free": [(1, rows[0]), (2, rows[2])],
        "ddim 20 float32: classifier-free": [(1, rows[1]), (2, rows[3])],
    }
    assert plots.guidance_lines([guided()]) == {}


def test_a_quality_plot_over_guidance_draws_every_row():
    def row(scale, classifier=0.0):
        measures = {"agreement": 0.9, "frechet": 3.0 + scale, "precision": 0.7, "recall": 0.6}
        return guided(scale, classifier, evaluations=20, **measures)

    evaluation = {
        "classifier": {"accuracy": 0.95},
        "real_baseline": {"frechet": 0.5, "precision": 0.9, "recall": 0.9},
        "rows": [row(1.0), row(2.0), row(1.0, 2.0)],
    }
    picture = pixels(plots.quality_plot(evaluation, "guidance"))
    assert (picture != pixels(plots.quality_plot(evaluation))).any()
    for missing in (1, 2):
        rows = [each for i, each in enumerate(evaluation["rows"]) if i != missing]
        assert (picture != pixels(plots.quality_plot({**evaluation, "rows": rows}, "guidance"))).any()


def test_the_program_draws_every_picture(tmp_path):
    checkpoint.save(tmp_path / "model", tiny_model())
    out = tmp_path / "pictures"
    plots.main(["--model", f"{tmp_path}/model", "--out", str(out), "--steps", "3", "--per-class", "2"])
    drawn = {path.name for path in out.iterdir()}
    assert drawn == {"samples.png", "samples-guided.png", "trajectory.png"}


def test_a_distilled_model_is_drawn_in_its_own_steps(tmp_path):
    checkpoint.save(tmp_path / "model", student.begin(tiny_model(), (99, 50), 2.0))
    out = tmp_path / "pictures"
    plots.main(["--model", f"{tmp_path}/model", "--out", str(out), "--per-class", "2"])
    assert {path.name for path in out.iterdir()} == {"samples.png", "trajectory.png"}


def test_a_rate_distortion_plot_draws_its_curve():
    curve = {"timestep": [900.0, 40.0, 0.0], "rate": [0.1, 1.0, 2.0], "rmse": [80.0, 20.0, 1.0]}
    picture = pixels(plots.rate_distortion(curve, 1000))
    for key in curve:
        changed = {**curve, key: [curve[key][0], curve[key][1] * 1.5, curve[key][2]]}
        assert (picture != pixels(plots.rate_distortion(changed, 1000))).any(), key


def test_samples_of_a_distilled_model_are_made_as_it_makes_them(monkeypatch):
    made = []
    model = student.begin(tiny_model(), (999, 649, 353, 124), 2.0)
    real = Dataset(np.zeros((80, 1, 8, 8), np.uint8), np.arange(80) % 3, model.class_names)

    def built(schedule, sampler, count, **how):
        made.append((sampler, count, how))
        return build_plan(schedule, sampler, count, **how)

    monkeypatch.setattr(plots, "build_plan", built)
    plots.real_or_sample(model, real, Guidance(2.0), runtime="torch")
    assert made == [("ddim", 4, {})]


def test_real_images_and_samples_are_shuffled_and_told_apart_by_the_key():
    model = tiny_model()
    real = Dataset(np.full((80, 1, 8, 8), 77, np.uint8), np.arange(80) % 3, model.class_names)
    sheet, samples = plots.real_or_sample(model, real, Guidance(), runtime="torch")
    assert len(set(samples)) == len(plots.ROWS) * plots.COLUMNS // 2
    again, _ = plots.real_or_sample(model, real, Guidance(), runtime="torch")
    assert sheet.tobytes() == again.tobytes()
    # A real image is one flat colour here; the sheet's last places are its images.
    step = 64 + GAP
    left, top = sheet.width - plots.COLUMNS * step, sheet.height - len(plots.ROWS) * step
    for row, name in enumerate(plots.ROWS):
        for column in range(plots.COLUMNS):
            x, y = left + column * step, top + row * step
            colours = sheet.crop((x, y, x + 64, y + 64)).getcolors()
            assert (colours != [(64 * 64, (77, 77, 77))]) == (f"{name}{column + 1}" in samples)
