import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import Checkpoint
from model.evaluation import evaluate, sampling
from model.evaluation.evaluate import Reference
from model.evaluation.judge import Judgement
from model.schedule import NoiseSchedule
from model.unet import UNet, UNetConfig
from tests.model.conftest import SCHEDULER, TINY, randomise, tiny_classifier


def tiny_model(classes=3):
    unet = UNet(UNetConfig(**TINY | {"num_class_embeds": classes + 1 if classes else None})).eval()
    randomise(unet)
    names = tuple(str(i) for i in range(classes))
    schedule = NoiseSchedule.from_diffusers(SCHEDULER)
    return Checkpoint("tiny", unet, schedule, SCHEDULER, names, classes or None)


def stripes(count, seed=0):
    """Images uint8 [count, 8, 8] of three classes, told apart by their bright stripe, and their labels."""
    labels = np.arange(count, dtype=np.uint8) % 3
    images = np.random.default_rng(seed).integers(0, 60, (count, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 2] += 180
    return images, labels


@pytest.fixture
def data(tmp_path):
    """A folder of IDX files: 120 training and 45 test images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count, seed in (("train", 120, 0), ("t10k", 45, 1)):
        images, labels = stripes(count, seed)
        for name, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{split}-{name}").write_bytes(header + values.tobytes())
    return folder


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "tiny"
    checkpoint.save(folder, tiny_model())
    return folder


def run(model, data, *more):
    few = ["--samples", "12", "--samplers", "ddim,dpmpp_2m", "--steps", "2,3", "--runtime", "torch"]
    given = ["--model", str(model), "--data", str(data), *few, "--classifier-epochs", "1", *more]
    return evaluate.main(given)


def test_agreement_falls_to_chance_when_the_labels_are_shuffled():
    requested = np.arange(3000) % 3
    predicted = requested.copy()
    predicted[:300] = (predicted[:300] + 1) % 3  # a tenth wrong
    names = ("a", "b", "c")
    right = evaluate.agreement(predicted, requested, names)
    assert right["agreement"] == pytest.approx(0.9)
    low, high = right["agreement_interval"]
    assert 0.88 < low < 0.9 < high < 0.92
    assert right["agreement_by_class"] == {name: pytest.approx(0.9) for name in names}
    shuffled = np.random.default_rng(0).permutation(requested)
    assert evaluate.agreement(predicted, shuffled, names)["agreement"] == pytest.approx(1 / 3, abs=0.04)


def test_real_features_measure_as_perfect_and_far_ones_do_not():
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((60, 4)), np.arange(60) % 3
    reference = Reference(features, labels, ("a", "b", "c"))
    same = evaluate.measure(Judgement(features, labels), reference)
    assert (same["agreement"], same["precision"], same["recall"]) == (1, 1, 1)
    assert same["frechet"] == pytest.approx(0, abs=1e-9)
    far = evaluate.measure(Judgement(features + 9, labels), reference)
    assert (far["precision"], far["recall"]) == (0, 0)
    assert far["frechet"] == pytest.approx(4 * 81)
    unconditional = evaluate.measure(Judgement(features, labels), replace(reference, labels=None))
    assert unconditional["agreement"] is None


def test_the_table_is_written_and_finished_rows_are_kept(model, data, monkeypatch, capsys):
    assert run(model, data) == 0
    first = json.loads((model / "evaluation.json").read_text())
    settings = [(row["sampler"], row["steps"], row["guidance_scale"]) for row in first["rows"]]
    assert settings == [("ddim", 2, 1), ("ddim", 3, 1), ("dpmpp_2m", 2, 1), ("dpmpp_2m", 3, 1)]
    for row in first["rows"]:
        assert row["evaluations"] == row["steps"]
        assert row["agreement_interval"][0] <= row["agreement"] <= row["agreement_interval"][1]
        assert row["frechet"] > 0
        assert 0 <= row["precision"] <= 1
        assert 0 <= row["recall"] <= 1
    assert first["real_baseline"]["draws"] == 5
    assert first["real_baseline"]["frechet"] < min(row["frechet"] for row in first["rows"])

    page = (model / "evaluation.md").read_text()
    assert "python -m model.evaluation.evaluate --model" in page
    assert first["weights_sha256"] in page
    assert "| real images |" in page
    assert "| dpmpp_2m | 3 | 1 | float32 | 3 |" in page
    with Image.open(model / "evaluation.png") as plot:
        assert plot.width > 500
    assert "classifier: " in capsys.readouterr().out

    # A wider table computes the new rows only, and both commands are on the page.
    computed = []
    sample = sampling.sample

    def counted(*given, **more):
        computed.append(given[1].table["w"][0])
        return sample(*given, **more)

    monkeypatch.setattr(evaluate, "sample", counted)
    assert run(model, data, "--guidance", "1,2") == 0
    second = json.loads((model / "evaluation.json").read_text())
    assert computed == [2] * 4
    assert [row for row in second["rows"] if row["guidance_scale"] == 1] == first["rows"]
    assert len(second["rows"]) == 8
    assert len(second["commands"]) == 2
    assert not (model / "evaluation.json.old").exists()


def test_dtypes_are_compared_in_one_table(model, data):
    assert run(model, data, "--samplers", "ddim", "--steps", "3", "--dtype", "float32,bfloat16") == 0
    rows = json.loads((model / "evaluation.json").read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert len(rows) == 2


@pytest.fixture
def classified(model):
    """The same folder with a classifier in it."""
    checkpoint.save_classifier(model, tiny_classifier())
    return model


def rows_of(folder, name="evaluation"):
    return json.loads((folder / f"{name}.json").read_text())["rows"]


def test_every_kind_of_guidance_is_a_row(classified, data, monkeypatch):
    kinds = ["--guidance", "1,2", "--classifier-scale", "0,3", "--interval", "0:,0.5:20"]
    few = ["--samplers", "ddim", "--steps", "4"]
    assert run(classified, data, *few, *kinds, "--name", "guidance", "--over", "guidance") == 0
    rows = rows_of(classified, "guidance")
    keys = ("guidance_scale", "classifier_scale", "guidance_sigma_min", "guidance_sigma_max")
    # An interval in which nothing is guided is not a row of its own.
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (1, 0, 0, None), (1, 3, 0, None), (1, 3, 0.5, 20),
        (2, 0, 0, None), (2, 0, 0.5, 20), (2, 3, 0, None), (2, 3, 0.5, 20),
    ]  # fmt: skip
    inside = sum(0.5 <= math.sqrt(1 / ac - 1) <= 20 for ac in tiny_model().schedule.alphas_cumprod[249::250])
    assert 0 < inside < 4
    assert [row["evaluations"] for row in rows] == [4, 4, 4, 8, 4 + inside, 8, 4 + inside]
    assert len({row["frechet"] for row in rows}) == 7
    assert not (classified / "evaluation.json").exists()
    assert "| ddim | 4 | 2, classifier 3 at σ 0.5–20 |" in (classified / "guidance.md").read_text()
    assert (classified / "guidance.png").exists()

    # Rows are kept as long as the classifier that guided them is there.
    computed = []
    sample = sampling.sample

    def counted(*given, **more):
        computed.append(given[1].table["a_g"][0])
        return sample(*given, **more)

    monkeypatch.setattr(evaluate, "sample", counted)
    assert run(classified, data, *few, *kinds, "--name", "guidance") == 0
    assert computed == []
    checkpoint.save_classifier(classified, tiny_classifier(seed=7))
    assert run(classified, data, *few, *kinds, "--name", "guidance") == 0
    assert len(computed) == 4
    assert len(rows_of(classified, "guidance")) == 7


def test_rows_from_before_there_were_these_columns_are_kept(model, data, monkeypatch):
    assert run(model, data, "--samplers", "ddim") == 0
    path = model / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for row in evaluation["rows"]:
        for name in ("classifier_scale", "guidance_sigma_min", "guidance_sigma_max"):
            del row[name]
    path.write_text(json.dumps(evaluation))
    monkeypatch.setattr(evaluate, "sample", None)  # nothing is computed again
    assert run(model, data, "--samplers", "ddim") == 0
    assert rows_of(model) == evaluation["rows"]


def test_guidance_by_a_classifier_needs_one(model, data, capsys):
    assert run(model, data, "--classifier-scale", "1") == 3
    assert "model.training.noise_classifier" in capsys.readouterr().err


def test_rows_of_other_weights_are_put_aside(model, data, tmp_path):
    assert run(model, data, "--samplers", "ddim", "--out", str(tmp_path / "out")) == 0
    other = tiny_model()
    with torch.no_grad():
        other.unet.conv_out.bias.add_(0.1)
    checkpoint.save(model, other)
    assert run(model, data, "--samplers", "dpmpp_2m", "--out", str(tmp_path / "out")) == 0
    now = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    old = json.loads((tmp_path / "out" / "evaluation.json.old").read_text())
    assert {row["sampler"] for row in now["rows"]} == {"dpmpp_2m"}
    assert {row["sampler"] for row in old["rows"]} == {"ddim"}


def test_rows_survive_an_interruption(model, data, monkeypatch, capsys):
    sample, calls = sampling.sample, []

    def interrupted(*given, **more):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*given, **more)

    monkeypatch.setattr(evaluate, "sample", interrupted)
    assert run(model, data) == 130
    assert len(json.loads((model / "evaluation.json").read_text())["rows"]) == 2
    assert "resumes" in capsys.readouterr().out
    assert run(model, data) == 0
    assert len(calls) == 3 + 2
    assert len(json.loads((model / "evaluation.json").read_text())["rows"]) == 4


def test_an_unconditional_model_has_no_agreement(tmp_path, data):
    checkpoint.save(tmp_path / "plain", tiny_model(classes=0))
    assert run(tmp_path / "plain", data, "--samplers", "ddim") == 0
    evaluation = json.loads((tmp_path / "plain" / "evaluation.json").read_text())
    assert all(row["agreement"] is None for row in evaluation["rows"])
    assert "Agreement" not in (tmp_path / "plain" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nowhere"), "no such folder"),
        (("--data", "nowhere"), "no folder train/"),
        (("--samples", "46"), "at most 45"),
        (("--steps", "1001"), "from 1 to 1000"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(model, data, capsys, change, message):
    assert run(model, data, *change) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_pictures_need_not_be_square(tmp_path, data):
    model = tiny_model()
    model = replace(model, unet=UNet(replace(model.unet.config, sample_size=(8, 16))).eval())
    checkpoint.save(tmp_path / "wide", model)
    assert run(tmp_path / "wide", data, "--samplers", "ddim", "--steps", "2") == 0
    rows = json.loads((tmp_path / "wide" / "evaluation.json").read_text())["rows"]
    assert [math.isfinite(row["frechet"]) for row in rows] == [True]


def test_guidance_needs_a_null_class(tmp_path, data, capsys):
    checkpoint.save(tmp_path / "plain", tiny_model(classes=0))
    assert run(tmp_path / "plain", data, "--guidance", "2") == 3
    assert "null class" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(tmp_path, data, capsys):
    checkpoint.save(tmp_path / "five", tiny_model(classes=5))
    assert run(tmp_path / "five", data) == 3
    assert "3 classes, but the model has 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [
        ("--samplers", "euler"),
        ("--dtype", "int4"),
        ("--samples", "3"),
        ("--steps", "ten"),
        ("--interval", "low:high"),
        ("--over", "time"),
    ],
)
def test_a_malformed_command_line_is_refused(model, data, bad, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(model, data, *bad)
    assert bad[0] in capsys.readouterr().err
