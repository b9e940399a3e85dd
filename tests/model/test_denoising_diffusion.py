from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import checkpoint, noise
from model.chain import Chain
from model.checkpoint import Checkpoint, CheckpointError
from model.denoiser import Denoiser, generate
from model.denoising_diffusion import DenoisingDiffusionConfig, DenoisingDiffusionUnet
from model.runtimes import DtypeName, OpenVinoRuntime, TorchRuntime
from model.samplers import Guidance, build_plan
from model.schedule import NoiseSchedule
from model.unet import ConfigError
from tests.model import denoising_diffusion as package

SIZE = 16
CLASSES = 3


def scheduler_config(diffusion: Any) -> dict[str, Any]:
    objectives = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(diffusion.betas),
        "trained_betas": diffusion.betas.tolist(),
        "prediction_type": objectives[diffusion.objective],
        "timestep_spacing": "trailing",
    }


def checkpoint_of(diffusion: Any, **options: Any) -> Checkpoint:
    """What the package's `GaussianDiffusion` is here, without a converter in between."""
    theirs = diffusion.model
    classes = CLASSES if isinstance(theirs, package.conditional.Unet) else None
    config = DenoisingDiffusionConfig(
        8, (SIZE, SIZE), dim_mults=(1, 2), channels=theirs.channels, num_classes=classes, **options
    )
    state = {f"model.{name}": value for name, value in theirs.state_dict().items()}
    if classes is not None:
        rows = state["model.classes_emb.weight"], state.pop("model.null_classes_emb")[None]
        state["model.classes_emb.weight"] = torch.cat(rows)
    unet = DenoisingDiffusionUnet(config).eval()
    unet.load_state_dict(state)
    scheduler = scheduler_config(diffusion)
    names, null_class = (("cat", "dog", "fox"), CLASSES) if classes else ((), None)
    return Checkpoint("tiny", unet, NoiseSchedule.from_diffusers(scheduler), scheduler, names, null_class)


@pytest.fixture(scope="module")
def plain() -> Any:
    return package.diffusion(package.network())


@pytest.fixture(scope="module")
def conditional() -> Any:
    return package.diffusion(package.network(num_classes=CLASSES))


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, timesteps and labels, of which the third is the null class."""
    rng = torch.Generator().manual_seed(rows)
    t, y = torch.arange(rows) * 7 % 40, (torch.arange(rows) + 1) % (CLASSES + 1)
    return torch.randn(rows, 3, SIZE, SIZE, generator=rng), t, y


def outputs(theirs: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """What the package's network itself gives, each row alone."""
    if y is None:
        return torch.cat([theirs(x[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    of_rows = [
        theirs(x[i : i + 1], t[i : i + 1], y[i : i + 1] % CLASSES, cond_drop_prob=float(y[i] == CLASSES))
        for i in range(len(x))
    ]
    return torch.cat(of_rows)


@pytest.fixture(params=["plain", "conditional"])
def both(request: pytest.FixtureRequest) -> tuple[Any, tuple[Tensor, Tensor, Tensor | None]]:
    x, t, y = batch(4)
    return request.getfixturevalue(request.param), (x, t, y if request.param == "conditional" else None)


@torch.inference_mode()
def test_it_computes_what_the_package_computes(both: Any) -> None:
    theirs, given = both
    expected = outputs(theirs.model, *given)
    assert expected.std() > 0.1
    torch.testing.assert_close(checkpoint_of(theirs).unet(*given), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_openvino_agrees_with_the_package(both: Any) -> None:
    theirs, given = both
    runtime = OpenVinoRuntime(checkpoint_of(theirs), threads=1)
    torch.testing.assert_close(runtime.forward(*given), outputs(theirs.model, *given), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_parts_are_the_whole(both: Any) -> None:
    theirs, (x, t, y) = both
    net = checkpoint_of(theirs).unet
    before = {name: id(module) for name, module in net.named_modules()}
    features, body, scaled = net.split()
    assert features(t, y)[0].ndim == 2
    assert torch.equal(scaled(body(x, *features(t, y)), t), net(x, t, y))
    assert {name: id(module) for name, module in net.named_modules()} == before, "what was split is whole"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_runs_in_half_precision(both: Any, dtype: DtypeName) -> None:
    theirs, given = both
    out = TorchRuntime(checkpoint_of(theirs), dtype=dtype).forward(*given)
    expected = outputs(theirs.model, *given)
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


def test_labels_are_asked_for_exactly_where_there_are_classes(plain: Any, conditional: Any) -> None:
    x, t, y = batch(1)
    with pytest.raises(ValueError, match="class labels"):
        checkpoint_of(plain).unet(x, t, y)
    with pytest.raises(ValueError, match="class labels"):
        checkpoint_of(conditional).unet(x, t)


OBJECTIVES = [("pred_v", "sigmoid"), ("pred_noise", "cosine"), ("pred_x0", "linear")]


@pytest.mark.parametrize(("objective", "betas"), OBJECTIVES)
@pytest.mark.parametrize(("sampler", "steps", "eta"), [("ddpm", 24, 0.0), ("ddim", 8, 0.0), ("ddim", 8, 0.7)])
def test_a_chain_ends_where_the_packages_does(
    sampler: str, steps: int, eta: float, objective: str, betas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = package.diffusion(
        package.network(),
        objective=objective,
        beta_schedule=betas,
        timesteps=24,
        sampling_timesteps=steps,
        ddim_sampling_eta=eta,
    )
    model = checkpoint_of(theirs)
    plan = build_plan(model.schedule, sampler, steps, eta=eta, use_clipped_model_output=True)
    ours = generate(Denoiser.of(model, TorchRuntime(model)), [Chain(plan, seed=5)])
    package.draw_as_here(monkeypatch, 5, steps)
    expected = 2 * theirs.sample(batch_size=1) - 1
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = package.network(learned_variance=True)
    theirs = package.LearnedGaussianDiffusion(unet, image_size=SIZE, timesteps=24, objective="pred_noise")
    model = checkpoint_of(theirs, learned_variance=True)
    plan = build_plan(model.schedule, "ddpm", 24, variance="learned_range")
    ours = generate(Denoiser.of(model, TorchRuntime(model)), [Chain(plan, seed=5)])
    package.draw_as_here(monkeypatch, 5, 24)
    expected = 2 * theirs.sample(batch_size=1) - 1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_guidance_is_the_packages_without_its_corrections(conditional: Any) -> None:
    model = checkpoint_of(conditional)
    plan = build_plan(model.schedule, "ddim", 1, timesteps=[20], guidance=Guidance(scale=3.0))
    ours = generate(Denoiser.of(model, TorchRuntime(model)), [Chain(plan, seed=5, label=1)])
    start = torch.from_numpy(noise.normals([5], [noise.START], (3, SIZE, SIZE)))
    t = torch.tensor([plan.timesteps[0]])
    out, _ = conditional.model.forward_with_cond_scale(
        start, t, torch.tensor([1]), cond_scale=3.0, rescaled_phi=0.0, remove_parallel_component=False
    )
    expected = conditional.predict_start_from_noise(start, t, out).clamp(-1, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_what_is_saved_loads(both: Any, tmp_path: Path) -> None:
    model = checkpoint_of(both[0])
    checkpoint.save(tmp_path, model)
    loaded = checkpoint.load(tmp_path)
    assert loaded.unet.config == model.unet.config
    assert (loaded.class_names, loaded.null_class) == (model.class_names, model.null_class)
    given = both[1]
    assert torch.equal(loaded.unet(*given), model.unet(*given))


def test_without_the_package_the_message_says_what_to_install(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, checkpoint_of(plain))
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    with pytest.raises(CheckpointError, match=r"config\.json: .* pip install denoising-diffusion-pytorch$"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 15}, "sample_size"),
        ({"self_condition": True}, "self_condition=True is not an option"),
        ({"attn_heads": [4, 4, 4]}, "attn_heads"),
        ({"dim_mults": [1, 2.5]}, "dim_mults=2.5"),
        ({"num_classes": 3}, "num_classes=3 does not go with"),
        ({"sample_size": None}, "sample_size is not known"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(change: dict[str, Any], message: str, plain: Any) -> None:
    config = checkpoint_of(plain).unet.config.to_diffusers()
    with pytest.raises(ConfigError, match=message):
        _ = DenoisingDiffusionConfig.from_diffusers(config | change).shape


def test_a_config_goes_there_and_back() -> None:
    cases: list[dict[str, Any]] = [{"full_attn": (False, True), "init_dim": 4}, {"num_classes": 3}]
    for options in cases:
        config = DenoisingDiffusionConfig(8, (8, 16), dim_mults=(1, 2), **options)
        assert DenoisingDiffusionConfig.from_diffusers(config.to_diffusers()) == config
    assert replace(config, sample_size=(8, 8)).to_diffusers()["sample_size"] == 8
    assert np.prod(config.shape) == 3 * 8 * 16
