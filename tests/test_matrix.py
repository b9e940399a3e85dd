"""What is found in the field: each folder loads and generates as diffusers does, or says why not."""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Callable
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor

from model import checkpoint, noise
from model.chain import Chain
from model.checkpoint import Checkpoint, CheckpointError
from model.convert.__main__ import main as convert
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import TorchRuntime
from model.samplers import Plan, build_plan
from service.engine.warmup import warm_up
from tests.matrix import CASES, SOURCES, Case, Source, table
from tests.service.live import serving

SEED, STEPS = 7, 4
LOADING = [case for case in CASES if not case.refused]
ROOT = Path(__file__).parents[1]


def by_diffusers(case: Case, timesteps: tuple[int, ...]) -> NDArray[np.uint8]:
    """What diffusers' network generates by DDIM from the same starting noise: [H, W, C] uint8.

    Of the folder's own scheduler class are ᾱ, the bound of x₀ and where the last step ends; the steps of DDPM
    and DDIM folders are those of DDIMScheduler.
    """
    net = case.network()
    config = net.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    y = None if case.label is None else torch.tensor([case.label])

    channels = min(config.in_channels, config.out_channels)
    condition = torch.from_numpy(beside(config.in_channels - channels, (height, width))[None])

    def network(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(torch.cat((x, condition), dim=1), t, class_labels=y).sample
        return out

    shape = channels, height, width
    return pixels(ddim(network, shape, case.scheduler_config(), timesteps, ends_at_one=case.ends_at_one))


def beside(channels: int, size: tuple[int, int]) -> NDArray[np.float32]:
    """What such a network takes beside x: [channels, H, W]."""
    drawn: NDArray[np.float32] = noise.normals([SEED + 1], [noise.START], (channels, *size))[0]
    return drawn


def generated(model: Checkpoint, plan: Plan, label: int | None) -> NDArray[np.uint8]:
    """What we generate: [H, W, C] uint8."""
    inputs, *size = model.unet.config.shape
    extra = inputs - model.shape[0]
    condition = beside(extra, (size[0], size[1])) if extra else None
    chain = Chain(plan, SEED, label, condition=condition)
    sample = generate(Denoiser.of(model, TorchRuntime(model)), [chain])[0]
    return to_pixels(sample, model.schedule.data_range).transpose(1, 2, 0)


def ddim(
    network: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int, int],
    options: dict[str, Any],
    timesteps: tuple[int, ...],
    *,
    ends_at_one: bool = True,
) -> Tensor:
    """A sample [C, H, W] by diffusers' DDIMScheduler. options: of the folder's scheduler."""
    x = torch.from_numpy(noise.normals([SEED], [noise.START], shape))
    name = options["_class_name"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them ask NumPy for what it no longer does
        own = getattr(diffusers, name).from_config(options)
    kept: dict[str, Any] = {"trained_betas": own.betas.tolist(), "clip_sample": False}
    kept["set_alpha_to_one"] = own.config.get("set_alpha_to_one", ends_at_one)
    for name in set(signature(type(own)).parameters) & set(signature(DDIMScheduler).parameters):
        kept[name] = own.config[name]
    scheduler = DDIMScheduler(**kept | {"trained_betas": own.betas.tolist(), "beta_schedule": "linear"})
    scheduler.alphas_cumprod = own.alphas_cumprod
    if options["_class_name"] in ("DDPMScheduler", "DDIMScheduler"):
        scheduler.set_timesteps(STEPS)
        assert tuple(scheduler.timesteps.tolist()) == timesteps
    ends = [*timesteps[1:], -1]
    with torch.inference_mode():
        for t, end in zip(timesteps, ends, strict=True):
            out = network(x, torch.tensor([t]))[:, : shape[0]]
            # Its step goes down by T / steps; this is one step over the whole distance.
            scheduler.num_inference_steps = 1
            scheduler.config.num_train_timesteps = t - end
            x = scheduler.step(out, t, x).prev_sample
    return x[0]


def pixels(x: Tensor, low: float = -1.0) -> NDArray[np.uint8]:
    """A sample [C, H, W] in [low, 1] as [H, W, C] uint8."""
    levels: NDArray[np.uint8] = ((x - low) / (1 - low)).clamp(0, 1).mul(255).round().byte().numpy()
    return levels.transpose(1, 2, 0)


def assert_alike(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    """Within one grey level, of pictures that are not all alike."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 10, "a dead network would prove nothing"
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("case", LOADING, ids=lambda case: f"{case.family}: {case.what}")
def test_a_folder_generates_what_diffusers_does(case: Case, tmp_path: Path) -> None:
    model = checkpoint.load(case.make(tmp_path / "model"), sample_size=case.sample_size)
    plan = build_plan(model.schedule, "ddim", STEPS)
    assert_alike(generated(model, plan, case.label), by_diffusers(case, plan.timesteps))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.refused], ids=lambda case: f"{case.family}: {case.what}"
)
def test_a_folder_that_cannot_be_served_is_refused_with_the_reason(case: Case, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(case.refused)) as caught:
        checkpoint.load(case.make(tmp_path / "model"), sample_size=case.sample_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", [each for each in SOURCES if not each.refused], ids=lambda each: f"{each.family}: {each.what}"
)
def test_a_converted_checkpoint_generates_what_its_own_network_does(source: Source, tmp_path: Path) -> None:
    net = source.network()
    torch.save(source.content(net), tmp_path / "model.pt")
    out = tmp_path / "model"
    assert convert([str(tmp_path / "model.pt"), str(out), *source.options.split()]) == 0
    model = checkpoint.load(out)
    plan = build_plan(model.schedule, "ddim", STEPS)
    options = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    low = options.pop("data_range", [-1, 1])[0]
    scale = options.pop("timestep_scale", 1.0)
    labels = {} if source.label is None else {source.keyword: torch.tensor([source.label])}
    inputs, height, width = model.unet.config.shape
    condition = torch.from_numpy(beside(inputs - model.shape[0], (height, width))[None])

    def network(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(torch.cat((x, condition), dim=1), t * scale, **labels, **source.arguments)
        return out

    theirs = ddim(network, model.shape, options, plan.timesteps)
    assert_alike(generated(model, plan, source.label), pixels(theirs, low))


@pytest.mark.parametrize(
    "source", [each for each in SOURCES if each.refused], ids=lambda each: f"{each.family}: {each.what}"
)
def test_a_checkpoint_that_cannot_be_converted_is_refused_by_name(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(source.content(source.network()), tmp_path / "model.pt")
    assert convert([str(tmp_path / "model.pt"), str(tmp_path / "model"), *source.options.split()]) == 3
    assert source.refused in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("case", [case for case in LOADING if case.over_http], ids=lambda case: case.what)
def test_over_http_it_is_the_same(case: Case, tmp_path: Path) -> None:
    model = checkpoint.load(case.make(tmp_path / "model"))
    servers = serving()
    limits: dict[str, Any] = {"runtime": "torch", "device": "cpu", "max_batch": 1}
    server = next(servers)(warm=lambda config: warm_up(model, config), **limits).ready()
    try:
        fields = {"seed": SEED, "sampler": "ddim", "num_inference_steps": STEPS, "output_format": "npy"}
        if case.label is not None:
            fields |= {"class_label": case.label, "guidance_scale": 1}
        answer = server.client.post("/generate", json=fields)
        assert answer.status_code == 200, answer.text
        (image,) = answer.json()["images"]
        ours = np.load(BytesIO(base64.b64decode(image["b64_json"])), allow_pickle=False)
    finally:
        next(servers, None)
    assert_alike(ours, by_diffusers(case, build_plan(model.schedule, "ddim", STEPS).timesteps))


def test_there_are_as_many_cases_as_promised_and_the_documents_list_them() -> None:
    assert len({(case.family, case.what) for case in CASES}) == len(CASES)
    assert len(CASES) >= 60
    assert sum(case.over_http for case in CASES) >= 12
    assert table() in (ROOT / "docs" / "models.md").read_text()
