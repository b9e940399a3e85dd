from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint
from model.convert.__main__ import main
from model.convert.conversion import Choices, Conversion, ConversionError
from model.convert.denoising_diffusion import convert, convert_network
from model.schedule import NoiseSchedule
from tests.model import denoising_diffusion as package
from tests.model.convert.conftest import noisy

T = torch.tensor([0, 17, 39])


def converted(diffusion: Any, **given: Any) -> Conversion:
    choices = Choices({"sample_size": (8, 8)} | given)
    found = convert(dict(diffusion.state_dict()), choices)
    choices.check_all_used(found.family)
    return found


def run(path: Path, out: Path, *options: str) -> int:
    return main([str(path), str(out), "--sample-size", "8", *options])


def test_what_the_trainer_saves_becomes_a_folder_of_the_averaged_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged, latest = (package.diffusion(package.network(seed)) for seed in (1, 2))
    package.save_training(tmp_path / "model-1.pt", averaged, latest)
    assert run(tmp_path / "model-1.pt", tmp_path / "out") == 0
    model = checkpoint.load(tmp_path / "out")
    with torch.inference_mode():
        expected = averaged.model(noisy(3), T)
        torch.testing.assert_close(model.unet(noisy(3), T), expected, rtol=1e-5, atol=1e-5)
        assert (latest.model(noisy(3), T) - expected).abs().max() > 0.1
    assert (model.schedule.prediction_type, model.schedule.clip) == ("v_prediction", 1.0)
    assert model.schedule.timestep_spacing == "trailing"
    np.testing.assert_allclose(model.schedule.alphas_cumprod, averaged.alphas_cumprod, rtol=1e-4, atol=1e-9)
    said = capsys.readouterr().out
    assert "taken: the averaged (EMA) weights, ema.ema_model." in said
    assert "--prediction-type" not in said


def test_the_null_class_is_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = package.diffusion(package.network(num_classes=2))
    torch.save(theirs.state_dict(), tmp_path / "guided.pt")
    assert run(tmp_path / "guided.pt", tmp_path / "out") == 0
    model = checkpoint.load(tmp_path / "out")
    assert (model.class_names, model.null_class) == (("0", "1"), 2)
    x, labels = noisy(3), torch.tensor([1, 0, 1])
    with torch.inference_mode():
        for dropped, y in ((0.0, labels), (1.0, torch.tensor([2, 2, 2]))):
            expected = theirs.model(x, T, labels, cond_drop_prob=dropped)
            torch.testing.assert_close(model.unet(x, T, y), expected, rtol=1e-5, atol=1e-5)
    assert model.schedule.prediction_type == "epsilon"
    assert "--num-heads 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        {"dim_mults": (1, 2, 4)},
        {"init_dim": 6},
        {"channels": 1},
        {"full_attn": (True, False)},
        {"full_attn": (True, True), "attn_heads": (1, 2), "attn_dim_head": (6, 4)},
        {"attn_heads": 2, "attn_dim_head": 8},
    ],
    ids=str,
)
def test_the_network_is_known_from_its_shapes(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = package.diffusion(package.network(**options))
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    assert run(tmp_path / "model.pt", tmp_path / "out") == 0
    x = noisy(options.get("channels", 3))
    with torch.inference_mode():
        out = checkpoint.load(tmp_path / "out").unet(x, T)
        torch.testing.assert_close(out, theirs.model(x, T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "prediction_type"),
    [("pred_v", "v_prediction"), ("pred_noise", "epsilon"), ("pred_x0", "sample")],
)
@pytest.mark.parametrize("betas", ["sigmoid", "cosine", "linear"])
@pytest.mark.parametrize("gamma", [None, 5, 0.7])
def test_its_loss_tells_what_it_predicts(
    objective: str, prediction_type: str, betas: str, gamma: float | None
) -> None:
    theirs = package.diffusion(
        package.network(),
        objective=objective,
        beta_schedule=betas,
        timesteps=1000,
        min_snr_loss_weight=gamma is not None,
        min_snr_gamma=gamma,
    )
    assert converted(theirs).scheduler["prediction_type"] == prediction_type
    others = {"epsilon", "v_prediction", "sample"} - {prediction_type}
    with pytest.raises(ConversionError, match=f"trained for {prediction_type}"):
        converted(theirs, prediction_type=others.pop())


def test_a_loss_that_does_not_tell_is_asked_about() -> None:
    theirs = package.diffusion(package.network())
    theirs.loss_weight.mul_(2)
    with pytest.raises(ConversionError, match=r"its objective: give --prediction-type"):
        converted(theirs)
    assert converted(theirs, prediction_type="sample").scheduler["prediction_type"] == "sample"


def test_a_learned_variance_is_that_of_an_epsilon_prediction() -> None:
    unet = package.network(learned_variance=True)
    theirs = package.LearnedGaussianDiffusion(unet, image_size=8, timesteps=40)  # its objective is pred_v
    found = converted(theirs)
    assert found.scheduler["prediction_type"] == "epsilon"
    assert found.scheduler["variance_type"] == "learned_range"
    assert found.unet["learned_variance"]


@pytest.mark.parametrize(
    ("betas", "ours"), [("sigmoid", None), ("cosine", "squaredcos_cap_v2"), ("linear",) * 2]
)
@pytest.mark.parametrize("timesteps", [100, 1000])
def test_a_network_alone_gets_the_packages_schedule(betas: str, ours: str | None, timesteps: int) -> None:
    theirs = package.diffusion(package.network(), beta_schedule=betas, timesteps=timesteps)
    choices = Choices({"sample_size": (8, 8), "beta_schedule": ours, "num_train_timesteps": timesteps})
    found = convert_network(dict(theirs.model.state_dict()), choices)
    schedule = NoiseSchedule.from_diffusers(found.scheduler)
    np.testing.assert_allclose(schedule.betas, theirs.betas, rtol=1e-4, atol=1e-9)
    assert schedule.prediction_type == "v_prediction"
    assert choices.assumed["prediction_type"] == "--prediction-type v_prediction (the package's default)"


def test_a_network_alone_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(package.network().state_dict(), tmp_path / "unet.pt")
    assert run(tmp_path / "unet.pt", tmp_path / "out") == 0
    said = capsys.readouterr().out
    for option in ("--beta-schedule sigmoid", "--num-train-timesteps 1000", "--prediction-type v_prediction"):
        assert f"not in the file, assumed: {option}" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"self_condition": True}, "self_condition=True"),
        ({"learned_sinusoidal_cond": True}, "learned_sinusoidal_cond"),
        ({"random_fourier_features": True}, "random_fourier_features"),
        ({"out_dim": 8}, "8 channels come out where 3 go in"),
    ],
)
def test_other_networks_are_refused_by_name(
    options: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"net": package.network(**options).state_dict()}, tmp_path / "model.pt")
    assert run(tmp_path / "model.pt", tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/model.pt: denoising-diffusion-pytorch's Unet: ")
    assert reason in said
    assert said.count("\n") == 1


def test_a_version_before_2_is_refused() -> None:
    state = dict(package.diffusion(package.network()).state_dict())
    state = {name.replace(".norm.g", ".norm.weight"): tensor for name, tensor in state.items()}
    with pytest.raises(ConversionError, match="version before 2"):
        convert(state, Choices())


def test_what_is_unknown_beside_the_network_is_refused() -> None:
    state = dict(package.diffusion(package.network()).state_dict()) | {"learned_betas": torch.zeros(40)}
    with pytest.raises(ConversionError, match="learned_betas is nothing"):
        convert(state, Choices())
