"""What a model's path may lead to, and which copy is taken. The folders are as diffusers writes them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from model import checkpoint
from model.checkpoint import MANIFEST, WEIGHTS, Checkpoint, CheckpointError
from model.layout import find
from tests.model.conftest import TINY, randomise


def theirs(seed: int) -> UNet2DModel:
    net = UNet2DModel(**TINY).eval()
    randomise(net, seed)
    return net


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """What diffusers' training script leaves: a pipeline, and below it a checkpoint with moving averages."""
    out = tmp_path / "trained"
    DDPMPipeline(theirs(1), DDPMScheduler()).save_pretrained(out)
    step = out / "checkpoint-500"
    theirs(2).save_pretrained(step / "unet")
    averages = EMAModel(theirs(3).parameters(), model_cls=UNet2DModel, model_config=theirs(3).config)
    averages.save_pretrained(step / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (step / name).write_bytes(b"PK")
    return out


def conv_in(path: Path) -> torch.Tensor:
    return checkpoint.load(path).unet.get_parameter("conv_in.weight")


def is_network(path: Path, seed: int) -> bool:
    return torch.equal(conv_in(path), theirs(seed).get_parameter("conv_in.weight"))


def test_moving_averages_are_taken_and_that_is_said(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = trained / "checkpoint-500"
    with caplog.at_level(logging.INFO, "model.layout"):
        assert is_network(step, 3)
    assert f"taken: {step / 'unet_ema' / WEIGHTS}; not: {step / 'unet'}" in caplog.text
    assert f"the noise schedule is that of {trained / 'scheduler'}" in caplog.text
    found = find(step)
    assert (found.is_ema, found.name, found.root) == (True, "checkpoint-500", step)
    assert find(trained).is_ema is None


def test_a_network_or_a_file_that_the_path_names_is_taken(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(trained / "checkpoint-500" / "unet_ema", trained / "unet_ema")
    assert is_network(trained, 3)
    for path in (trained / "unet", trained / "unet" / WEIGHTS):
        caplog.clear()
        assert is_network(path, 1)
        assert f"{trained / 'unet' / WEIGHTS}: not moving averages" in caplog.text
        assert (find(path).root, find(path).name, find(path).is_ema) == (trained, "trained", False)
    assert find(trained / "unet_ema").is_ema


def test_a_network_may_be_the_working_directory(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "unet")
    assert [find(Path(path)).name for path in (".", "..", WEIGHTS)] == ["trained"] * 3


def test_a_network_without_a_noise_schedule_says_what_is_missing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "unet", tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"alone/scheduler_config.json: missing: it says what noise"):
        checkpoint.load(tmp_path / "alone")
    (trained / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"trained/scheduler/scheduler_config.json: missing: it says"):
        checkpoint.load(trained)


def test_averages_in_a_pickle_are_not_taken_and_that_is_said(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averages = trained / "checkpoint-500" / "unet_ema"
    (averages / WEIGHTS).rename(averages / "diffusion_pytorch_model.bin")
    assert is_network(trained / "checkpoint-500", 2)
    assert f"{averages}: not taken, since its weights are not safetensors" in caplog.text
    assert "not moving averages" in caplog.text


def test_a_variant_is_taken_by_its_name(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs(4).save_pretrained(trained / "unet", variant="ema")
    theirs(5).half().save_pretrained(trained / "unet", variant="fp16")
    with caplog.at_level(logging.INFO, "model.layout"):
        assert is_network(trained, 4)
    ema, fp16 = (f"diffusion_pytorch_model.{name}.safetensors" for name in ("ema", "fp16"))
    place = trained / "unet"
    assert f"taken: {place / ema}; not: {place / WEIGHTS}, {place / fp16}" in caplog.text
    half = theirs(5).half().float().get_parameter("conv_in.weight")
    assert torch.equal(conv_in(trained / "unet" / fp16), half)


def test_shards_load_and_come_before_one_file(trained: Path) -> None:
    theirs(4).save_pretrained(trained / "unet", max_shard_size="5KB")  # leaves the file that was there
    assert len(find(trained).weights.files) > 1
    assert is_network(trained, 4)
    assert is_network(trained / "unet" / f"{WEIGHTS}.index.json", 4)
    assert is_network(trained / "unet" / WEIGHTS, 1)
    assert checkpoint.weights_sha256(trained) != checkpoint.weights_sha256(trained / "unet" / WEIGHTS)


def test_components_have_the_names_that_the_pipeline_gives_them(trained: Path) -> None:
    (trained / "unet").rename(trained / "model")
    (trained / "scheduler").rename(trained / "noise_scheduler")
    content = json.loads((trained / "model_index.json").read_text())
    content["model"], content["noise_scheduler"] = content.pop("unet"), content.pop("scheduler")
    (trained / "model_index.json").write_text(json.dumps(content))
    assert is_network(trained, 1)


def test_another_pipeline_is_refused_by_name(trained: Path) -> None:
    content = json.loads((trained / "model_index.json").read_text())
    content |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (trained / "model_index.json").write_text(json.dumps(content))
    for path in (trained, trained / "unet", trained / "unet" / WEIGHTS, trained / "checkpoint-500"):
        with pytest.raises(CheckpointError, match=r"model_index.json: a LDMPipeline with vqvae \(VQModel\)"):
            checkpoint.load(path)
    shutil.rmtree(trained / "checkpoint-500")
    (trained / "model_index.json").unlink()
    config = trained / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(CheckpointError, match=r"unet/config.json: a UNet2DConditionModel, which is cond"):
        checkpoint.load(trained)


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("alone/model.safetensors", r"the network's config.json must lie beside it"),
        ("alone/model.pt", r"model.pt: a pickle.*python -m model.convert .*alone/model.pt OUT"),
        ("alone/model.dduf", r"unpack it \(unzip model.dduf -d model\)"),
        ("alone/model.onnx", "neither a model folder nor a safetensors file"),
        ("alone/elsewhere", "elsewhere: no such folder"),
        ("alone/model.pt/unet", r"unet: cannot be read \(Not a directory\)"),
        ("alone", r"model.ckpt: a pickle.*python -m model.convert .*alone/model.ckpt OUT"),
        ("runs", r"config.json: missing; there are models in checkpoint-500: give one"),
        ("empty", r"empty/config.json: missing"),
    ],
)
def test_what_holds_no_model_says_what_is_needed(tmp_path: Path, file: str, named: str) -> None:
    for name in ("model.safetensors", "model.pt", "model.ckpt", "model.dduf", "model.onnx"):
        (tmp_path / "alone").mkdir(exist_ok=True)
        (tmp_path / "alone" / name).touch()
    (tmp_path / "runs" / "checkpoint-500" / "unet").mkdir(parents=True)
    (tmp_path / "runs" / "checkpoint-500" / "unet" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=named) as refused:
        checkpoint.load(tmp_path / file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("below", ["", "unet"])
def test_a_folder_that_may_not_be_entered_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    # Tests may run as root, whom no permissions keep out.
    closed, stat = folder / below, Path.stat

    def refuse(path: Path, **options: bool) -> object:
        if closed in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(CheckpointError, match=rf"{closed}.*: cannot be read \(Permission denied\)"):
        checkpoint.load(folder)


def test_the_cache_of_a_repository_leads_to_its_main_branch(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny-cats"
    commits = [repository / "snapshots" / name for name in ("a" * 40, "b" * 40)]
    (repository / "refs").mkdir(parents=True)
    folder.rename(repository / "model")
    for commit in commits:
        shutil.copytree(repository / "model", commit)
    with pytest.raises(CheckpointError, match="2 snapshots: give the path of one"):
        find(repository)
    (repository / "refs" / "main").write_text("b" * 40)
    assert (find(repository).root, find(repository).name) == (commits[1], "tiny-cats")
    # Only some of a repository's files are downloaded.
    with (commits[1] / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  README.md\n")
    assert checkpoint.load(repository).name == "tiny-cats"


def test_weights_are_not_saved_beside_others_that_would_be_taken(
    trained: Path, tiny: Checkpoint, tmp_path: Path
) -> None:
    before = sorted(trained.rglob("*"))
    shutil.move(trained / "checkpoint-500" / "unet_ema", trained / "unet_ema")
    with pytest.raises(CheckpointError, match=r"unet_ema.*: other weights of this model: choose another"):
        checkpoint.save(trained, tiny)
    shutil.move(trained / "unet_ema", trained / "checkpoint-500" / "unet_ema")
    assert sorted(trained.rglob("*")) == before
    assert is_network(trained, 1)
    checkpoint.save(trained, tiny)
    assert torch.equal(conv_in(trained), tiny.unet.get_parameter("conv_in.weight"))
