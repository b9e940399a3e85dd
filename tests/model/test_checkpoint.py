from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from model import checkpoint, typicality, weights
from model.checkpoint import CLASSIFIER_WEIGHTS, MANIFEST, WEIGHTS, Checkpoint, CheckpointError
from model.likelihood import choose_timesteps
from model.typicality import Typicality
from model.unet import UNet, UNetConfig
from model.weights import LEGACY_ATTENTION
from tests.model.conftest import SCHEDULER, TINY, randomise, tiny_classifier


def flatten(folder: Path) -> None:
    """Make it a flat one: everything at the root, as google/ddpm-cifar10-32 has it."""
    for path in (*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()):
        path.rename(folder / path.name)
    (folder / "unet").rmdir()
    (folder / "scheduler").rmdir()
    checkpoint.write_manifest(folder)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (path.parent.parent / MANIFEST).unlink(missing_ok=True)
    (path.parent / MANIFEST).unlink(missing_ok=True)


def rewrite(folder: Path, change: Any) -> None:
    """Pass the weights through `change`, and forget the manifest."""
    path = folder / "unet" / WEIGHTS
    save_file(change(load_file(path)), path)
    (folder / MANIFEST).unlink(missing_ok=True)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_what_is_saved_is_what_loads(tiny: Checkpoint, folder: Path) -> None:
    loaded = checkpoint.load(folder)
    assert same_weights(loaded.unet, tiny.unet)
    assert loaded.unet.config == tiny.unet.config
    assert not loaded.unet.training
    assert (loaded.name, loaded.class_names, loaded.null_class) == ("tiny", ("cat", "dog", "fox"), 3)
    assert loaded.scheduler_config == SCHEDULER
    assert loaded.schedule.timestep_spacing == "trailing"


def test_the_weights_can_be_read_by_others(folder: Path) -> None:
    assert (folder / "unet" / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_a_flat_folder_loads(tiny: Checkpoint, folder: Path) -> None:
    flatten(folder)
    assert (folder / MANIFEST).read_text().count("\n") == 4
    loaded = checkpoint.load(folder)
    assert same_weights(loaded.unet, tiny.unet)
    assert loaded.class_names == ("cat", "dog", "fox")


def test_diffusers_loads_what_we_write_and_gives_the_same_eps(tiny: Checkpoint, folder: Path) -> None:
    theirs = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 950]), torch.tensor([1, 3])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x, t, y).sample, tiny.unet(x, t, y), rtol=1e-5, atol=1e-6)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.timestep_spacing == "trailing"


def test_a_diffusers_pipeline_runs_on_what_we_write(tiny: Checkpoint, tmp_path: Path) -> None:
    unet = UNet(UNetConfig(**(TINY | {"num_class_embeds": None})))
    checkpoint.save(tmp_path, replace(tiny, unet=unet, class_names=(), null_class=None))
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 1)


def test_what_diffusers_writes_loads_and_gives_the_same_eps(tmp_path: Path) -> None:
    theirs = UNet2DModel(**TINY).eval()
    randomise(theirs)
    DDPMPipeline(theirs, DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path)
    assert ours.schedule.variance_type == "fixed_large"
    assert (ours.class_names, ours.null_class) == (("0", "1", "2", "3"), None)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 950]), torch.tensor([1, 3])
    with torch.inference_mode():
        torch.testing.assert_close(ours.unet(x, t, y), theirs(x, t, y).sample, rtol=1e-5, atol=1e-6)


def test_legacy_attention_names_load(tiny: Checkpoint, folder: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {}
        for name, tensor in state.items():
            for legacy, new in LEGACY_ATTENTION.items():
                name = name.replace(f".{new}.", f".{legacy}.")
            old[name] = tensor
        assert sum(".proj_attn." in name for name in old) == 2 * 4  # weight and bias of four attentions
        return old

    rewrite(folder, rename)
    assert same_weights(checkpoint.load(folder).unet, tiny.unet)


def test_half_precision_weights_load_as_float32(folder: Path) -> None:
    rewrite(folder, lambda state: {name: tensor.half() for name, tensor in state.items()})
    assert {p.dtype for p in checkpoint.load(folder).unet.parameters()} == {torch.float32}


def test_a_single_safetensors_file_of_another_name_loads(tiny: Checkpoint, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(checkpoint.load(folder).unet, tiny.unet)


def test_a_pickle_is_refused_with_a_way_out(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"model.bin: a pickle.*python -m model.convert {folder} OUT"):
        checkpoint.load(folder)


def test_a_changed_file_is_noticed(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: its sha256"):
        checkpoint.load(folder)


def test_a_missing_listed_file_is_noticed(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model_index.json: listed in SHA256SUMS but missing"):
        checkpoint.load(folder)


def test_the_manifest_lists_the_model_and_nothing_else(tiny: Checkpoint, folder: Path) -> None:
    # Training states are not shipped and evaluations change: neither may stop a model from loading.
    (folder / "training").mkdir()
    for name in ("training/state.safetensors", "evaluation.json"):
        (folder / name).write_text("{}")
    checkpoint.save(folder, tiny)
    listed = [line.split("  ")[1] for line in (folder / MANIFEST).read_text().splitlines()]
    assert listed == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}",
    ]  # fmt: skip
    shutil.rmtree(folder / "training")
    checkpoint.load(folder)


def test_the_manifest_is_what_sha256sum_reads(folder: Path) -> None:
    for line in (folder / MANIFEST).read_text().splitlines():
        digest, name = line.split("  ")
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    binary = (folder / MANIFEST).read_text().replace("  ", " *")  # `sha256sum --binary`
    (folder / MANIFEST).write_text(binary)
    checkpoint.load(folder)


def test_a_save_cut_short_leaves_a_folder_that_loads(
    tiny: Checkpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    other = UNet(cast("UNetConfig", tiny.unet.config))
    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, replace(tiny, unet=other, class_names=("owl", "rat", "yak")))
    assert same_weights(checkpoint.load(folder).unet, tiny.unet)


def test_missing_surplus_and_misshapen_tensors_are_named(folder: Path) -> None:
    original = load_file(folder / "unet" / WEIGHTS)
    rewrite(folder, lambda state: {n: t for n, t in state.items() if n != "conv_in.bias"})
    with pytest.raises(CheckpointError, match=r"conv_in.bias is missing"):
        checkpoint.load(folder)
    rewrite(folder, lambda _: original | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="extra is not in the network"):
        checkpoint.load(folder)
    rewrite(folder, lambda _: original | {"conv_in.bias": torch.zeros(9)})
    with pytest.raises(CheckpointError, match=r"conv_in.bias is \(9,\) where the network has \(8,\)"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("unet/config.json", {"act_fn": "tanh"}, r"unet/config.json: act_fn='tanh'"),
        ("unet/config.json", {"sample_size": None}, r"unet/config.json: sample_size is missing"),
        ("unet/config.json", {"sample_size": 7}, r"unet/config.json: sample_size=7"),
        ("unet/config.json", {"attention_head_dim": 99}, r"unet/config.json: attention_head_dim=99"),
        ("scheduler/scheduler_config.json", {"clip_smaple": True}, r"scheduler_config.json: .*clip_smaple"),
        (
            "scheduler/scheduler_config.json",
            {"use_flow_sigmas": True},
            r"scheduler_config.json: use_flow_sigmas",
        ),
        ("scheduler/scheduler_config.json", {"beta_start": "low"}, r"scheduler_config.json: could not"),
        ("scheduler/scheduler_config.json", {"clip_sample_range": None}, "scheduler_config.json"),
        ("model_index.json", {"id2label": {"0": "a"}}, "1 names for 4 class embeddings"),
        ("model_index.json", {"id2label": {"1": "a", "2": "b", "3": "c"}}, "count up from 0"),
        ("model_index.json", {"id2label": ["a", "b", "c"]}, "count up from 0"),
    ],
)
def test_a_bad_config_is_named(folder: Path, file: str, values: dict[str, Any], named: str) -> None:
    edit(folder / file, **values)
    with pytest.raises(CheckpointError, match=named) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


def test_a_size_that_is_missing_is_needed_and_one_that_is_there_is_kept(
    tiny: Checkpoint, folder: Path
) -> None:
    assert checkpoint.load(folder, sample_size=(8, 8)).unet.config == tiny.unet.config
    with pytest.raises(CheckpointError, match=r"config.json: sample_size=.*DDPM_SAMPLE_SIZE is \(8, 16\)"):
        checkpoint.load(folder, sample_size=(8, 16))
    edit(folder / "unet" / "config.json", sample_size=None)
    with pytest.raises(CheckpointError, match=r"config.json: sample_size is missing: set DDPM_SAMPLE_SIZE"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"config.json: sample_size=\(8, 5\)"):
        checkpoint.load(folder, sample_size=(8, 5))
    assert checkpoint.load(folder, sample_size=(8, 16)).unet.config.shape == (1, 8, 16)


def test_labels_for_every_embedding_mean_no_null_class(folder: Path) -> None:
    edit(folder / "model_index.json", id2label={str(i): f"class {i}" for i in range(4)})
    loaded = checkpoint.load(folder)
    assert (len(loaded.class_names), loaded.null_class) == (4, None)


def test_labels_may_be_numbers_with_names_or_without(tmp_path: Path) -> None:
    options = TINY | {"class_embed_type": "timestep", "num_class_embeds": None}
    theirs = UNet2DModel(**options).eval()
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert (loaded.class_names, loaded.null_class) == ((), None)
    assert loaded.unet.config.conditional
    edit(tmp_path / "model_index.json", id2label={"0": "cat", "1": "dog"})
    loaded = checkpoint.load(tmp_path)
    assert (loaded.class_names, loaded.null_class) == (("cat", "dog"), None)


def test_learned_time_embeddings_have_to_be_enough(tmp_path: Path) -> None:
    options = TINY | {"time_embedding_type": "learned", "num_train_timesteps": 100}
    DDPMPipeline(UNet2DModel(**options), DDPMScheduler(100)).save_pretrained(tmp_path)
    assert checkpoint.load(tmp_path).unet.get_parameter("time_proj.weight").shape == (100, 8)
    edit(tmp_path / "scheduler" / "scheduler_config.json", num_train_timesteps=101)
    with pytest.raises(CheckpointError, match=r"100 learned time embeddings are too few .* 101 timesteps"):
        checkpoint.load(tmp_path)


def test_unreadable_files_are_named(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / "unet" / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        checkpoint.load(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
        checkpoint.load(folder)
    (folder / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: a JSON object"):
        checkpoint.load(folder)
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: missing"):
        checkpoint.load(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(folder / "elsewhere")


# ── Learned variances ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small"])
def test_a_network_with_twice_the_outputs_loads(tiny: Checkpoint, folder: Path, variance: str) -> None:
    unet = UNet(UNetConfig(**(TINY | {"out_channels": 2})))
    randomise(unet)
    config = SCHEDULER | {"variance_type": variance}
    checkpoint.save(folder, replace(tiny, unet=unet, scheduler_config=config))
    loaded = checkpoint.load(folder)
    assert same_weights(loaded.unet, unet)
    assert (loaded.unet.config.out_channels, loaded.schedule.variance_type) == (2, variance)
    theirs = UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 950]), torch.tensor([1, 3])
    with torch.inference_mode():
        torch.testing.assert_close(theirs(x, t, y).sample, loaded.unet(x, t, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "variance", "wanted"),
    [
        (1, "learned_range", "a learned variance needs an even number"),
        (3, "fixed_small", "pictures, or pictures and variances, of the input"),
        (3, "learned_range", "even number"),
    ],
)
def test_outputs_that_mean_nothing_are_refused(
    tiny: Checkpoint, folder: Path, outputs: int, variance: str, wanted: str
) -> None:
    unet = UNet(UNetConfig(**(TINY | {"out_channels": outputs})))
    config = SCHEDULER | {"variance_type": variance}
    checkpoint.save(folder, replace(tiny, unet=unet, scheduler_config=config))
    with pytest.raises(CheckpointError, match=rf"out_channels={outputs} with in_channels=1.*{wanted}"):
        checkpoint.load(folder)


# ── The classifier beside the network ──────────────────────────────────────────────────────────


def test_a_classifier_is_saved_listed_and_loaded(tiny: Checkpoint, folder: Path) -> None:
    assert checkpoint.load(folder).classifier is None
    classifier = tiny_classifier()
    checkpoint.save(folder, replace(tiny, classifier=classifier))
    listed = [line.split("  ")[1] for line in (folder / MANIFEST).read_text().splitlines()]
    assert listed[:2] == ["classifier/config.json", "classifier/model.safetensors"]
    loaded = checkpoint.load(folder).classifier
    assert loaded is not None
    assert loaded.config == classifier.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 950])
    assert torch.equal(loaded(x, t), classifier(x, t))
    assert (folder / "classifier" / CLASSIFIER_WEIGHTS).stat().st_mode & 0o777 == 0o644
    # A network that is saved anew, as training does, leaves it where it is.
    checkpoint.save(folder, tiny)
    assert checkpoint.load(folder).classifier is not None


def test_a_changed_classifier_is_noticed(folder: Path) -> None:
    checkpoint.save_classifier(folder, tiny_classifier())
    path = folder / "classifier" / CLASSIFIER_WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{CLASSIFIER_WEIGHTS}: its sha256"):
        checkpoint.load(folder)


def test_a_classifier_cut_short_leaves_a_folder_that_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_classifier(folder, tiny_classifier())
    assert checkpoint.load(folder).classifier is None
    checkpoint.save_classifier(folder, tiny_classifier())
    assert checkpoint.load(folder).classifier is not None


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"classes": 4},
            r"classifier/config.json: .*are \(1, 8, 8, 4\) where the network has \(1, 8, 8, 3\)",
        ),
        ({"sample_size": 16}, r"classifier/config.json: .*are \(1, 16, 16, 3\)"),
        ({"block_out_channels": [8, 30]}, "classifier/config.json: norm_num_groups=4 does not divide"),
        ({"block_out_channels": "wide"}, "classifier/config.json"),
        ({"pool": "max"}, "classifier/config.json: pool='max' is not supported"),
        ({"pooling": "mean"}, "classifier/config.json: pooling is not an option"),
        ({"block_out_channels": [8, 16]}, r"model.safetensors: .* is not in the network"),
        ({"block_out_channels": [8, 16, 32]}, r"model.safetensors: .* where the network has"),
    ],
)
def test_a_bad_classifier_is_named(folder: Path, values: dict[str, Any], named: str) -> None:
    checkpoint.save_classifier(folder, tiny_classifier())
    edit(folder / "classifier" / "config.json", **values)
    with pytest.raises(CheckpointError, match=named) as caught:
        checkpoint.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", CLASSIFIER_WEIGHTS])
def test_half_a_classifier_is_none(folder: Path, file: str) -> None:
    checkpoint.save_classifier(folder, tiny_classifier())
    (folder / MANIFEST).unlink()
    (folder / "classifier" / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(folder)


# ── Statistics beside the weights ──────────────────────────────────────────────────────────────


def statistics_of(folder: Path) -> Typicality:
    random = np.random.default_rng(0)
    chosen = np.stack([choose_timesteps(1000, 50, seed) for seed in range(100)])
    mse = np.exp(random.normal(-3, 1, (100, 1)) + random.normal(0, 1, chosen.shape))
    return typicality.fit(1000, chosen, mse, checkpoint.weights_sha256(folder))


@pytest.mark.parametrize("flat", [False, True])
def test_statistics_load_with_the_weights_that_they_are_about(folder: Path, flat: bool) -> None:
    assert checkpoint.load(folder).typicality is None
    if flat:
        flatten(folder)
    typicality.save(folder / typicality.FILE, statistics_of(folder))
    loaded = checkpoint.load(folder).typicality
    assert loaded is not None
    assert loaded.images == 100


def test_statistics_of_other_weights_are_refused(folder: Path) -> None:
    typicality.save(folder / typicality.FILE, replace(statistics_of(folder), weights_sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"typicality\.json: it is about other weights"):
        checkpoint.load(folder)


def test_broken_statistics_are_named(folder: Path) -> None:
    (folder / typicality.FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"typicality\.json: not readable"):
        checkpoint.load(folder)


def test_new_weights_take_the_statistics_of_old_ones_with_them(tiny: Checkpoint, folder: Path) -> None:
    typicality.save(folder / typicality.FILE, statistics_of(folder))
    checkpoint.save(folder, tiny)
    assert checkpoint.load(folder).typicality is None


def test_the_checksum_is_that_of_the_weights_file(folder: Path) -> None:
    expected = hashlib.sha256((folder / "unet" / WEIGHTS).read_bytes()).hexdigest()
    assert checkpoint.weights_sha256(folder) == expected
    (folder / "unet" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.weights_sha256(folder)


def test_the_checksum_is_that_of_what_decides_the_results(tiny: Checkpoint, folder: Path) -> None:
    found = {checkpoint.load(folder).checksum}
    (folder / "README.md").write_text("It draws animals.")
    assert {checkpoint.load(folder).checksum} == found
    rewrite(folder, lambda tensors: {name: tensor + 1e-6 for name, tensor in tensors.items()})
    found.add(checkpoint.load(folder).checksum)
    for file, name, value in (
        ("scheduler/scheduler_config.json", "beta_end", 0.019),
        ("model_index.json", "id2label", {"0": "cat", "1": "dog", "2": "wolf"}),
        ("unet/config.json", "_diffusers_version", "0.0.1"),
    ):
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
        found.add(checkpoint.load(folder).checksum)
    checkpoint.save_classifier(folder, tiny_classifier())
    found.add(checkpoint.load(folder).checksum)
    assert len(found) == 6
    assert all(len(each) == 64 for each in found)
