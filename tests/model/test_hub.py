"""Models of the Hub, from a server of this machine that speaks its protocol."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from model import checkpoint, hub
from model.checkpoint import WEIGHTS, Checkpoint, CheckpointError
from model.hub import locate
from tests.model import hub_server
from tests.model.hub_server import REPOSITORY, Hub, files_of

FIRST, SECOND = "a" * 40, "b" * 40
MODEL = f"hf:{REPOSITORY}"


@pytest.fixture
def repository(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A repository of a model and of what else lies beside models, with an empty cache."""
    files = files_of(folder)
    assert "SHA256SUMS" in files
    others = {
        "README.md": b"# Cats\n",
        "unet/diffusion_pytorch_model.bin": b"PK",
        "logs/train/config.json": b"{}",
        "samples/0001.png": b"PNG",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return Hub({FIRST: {**files, **others}}, {"main": FIRST, "refs/pr/1": FIRST})


def use(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does to a new process."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", repository.url)
    template = repository.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def served(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serving(repository):
        use(repository, monkeypatch)
        yield repository


def with_file(repository: Hub, name: str, content: bytes | None) -> None:
    """Add a file to the first commit, or remove one."""
    files = {**repository.commits[FIRST], name: content}
    repository.commits[FIRST] = {name: each for name, each in files.items() if each is not None}


def test_a_path_is_itself() -> None:
    assert locate("weights/fashion-mnist") == Path("weights/fashion-mnist")


def test_a_model_is_downloaded_and_loads(
    served: Hub, tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "model.hub"):
        found = checkpoint.load(locate(MODEL))
    assert torch.equal(*(model.unet.get_parameter("conv_in.weight") for model in (found, tiny)))
    assert found.name == "tiny-cats"
    assert f"{MODEL} is commit {FIRST}: 5 files, all with the Hub's checksums" in caplog.text
    assert served.downloaded == {
        "SHA256SUMS",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
    }


def test_a_download_shows_how_far_it_is(served: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    locate(MODEL)
    assert "100%|██████████|" in capsys.readouterr().err


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", FIRST])
def test_a_revision_may_be_named(served: Hub, revision: str) -> None:
    assert locate(f"{MODEL}@{revision}").name == FIRST


def test_what_is_cached_needs_no_server(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server.serving(repository):
        use(repository, monkeypatch)
        found = locate(MODEL)
    for offline in (False, True):  # nobody listens there any more; nobody is asked
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert locate(MODEL) == found
        assert locate(f"{MODEL}@{FIRST}") == found
        with pytest.raises(CheckpointError, match="not in the cache, and the Hub cannot be reached"):
            locate("hf:someone/else")
    with pytest.raises(CheckpointError, match="not in the cache, and the Hub cannot be reached"):
        locate(f"{MODEL}@{SECOND}")


def test_a_branch_that_has_moved_is_followed_and_a_commit_stays(served: Hub) -> None:
    assert locate(MODEL).name == FIRST
    served.commits[SECOND] = served.commits[FIRST]
    served.branches["main"] = SECOND
    before = len(served.requests)
    assert locate(f"{MODEL}@{FIRST}").name == FIRST
    assert len(served.requests) == before
    assert locate(MODEL).name == SECOND


def test_moving_averages_are_all_the_weights_that_are_downloaded(served: Hub) -> None:
    files = served.commits[FIRST]
    with_file(served, "SHA256SUMS", None)
    with_file(served, "unet_ema/config.json", files["unet/config.json"])
    with_file(served, f"unet_ema/{WEIGHTS}", files[f"unet/{WEIGHTS}"])
    assert checkpoint.load(locate(MODEL)).name == "tiny-cats"
    assert {name for name in served.downloaded if name.endswith(".safetensors")} == {f"unet_ema/{WEIGHTS}"}


def test_a_flat_repository_loads(served: Hub) -> None:
    flat = {"config.json", "scheduler_config.json", WEIGHTS, "model_index.json"}
    files = {
        name.rpartition("/")[2]: each for name, each in served.commits[FIRST].items() if "logs" not in name
    }
    served.commits[FIRST] = {name: files[name] for name in flat} | {"old/x.safetensors": b""}
    assert checkpoint.load(locate(MODEL)).name == "tiny-cats"
    assert served.downloaded == flat


def test_another_pipeline_is_refused_before_its_weights_are_downloaded(served: Hub) -> None:
    index = json.loads(served.commits[FIRST]["model_index.json"])
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    with_file(served, "model_index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=rf"{MODEL}: a LDMPipeline with vqvae \(VQModel\), which"):
        locate(MODEL)
    assert not any(name.endswith(".safetensors") for name in served.downloaded)


def test_a_pickle_is_refused_and_not_downloaded(served: Hub) -> None:
    with_file(served, f"unet/{WEIGHTS}", None)
    with pytest.raises(
        CheckpointError, match=r"no network with safetensors weights; pickles .*model.convert"
    ):
        locate(MODEL)
    assert not any(name.endswith(".bin") for name in served.downloaded)


@pytest.mark.parametrize("name", [f"unet/{WEIGHTS}", "unet/config.json"])
def test_a_damaged_file_in_the_cache_is_named(served: Hub, name: str) -> None:
    path = locate(MODEL) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: damaged.*: remove .*/blobs/.* and start again"):
        locate(MODEL)
    path.resolve().unlink()
    locate(MODEL)


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("hf:", r"hf:: a model on the Hub is hf:owner/name"),
        ("hf:someone/tiny cats", "a model on the Hub is"),
        ("hf:someone/tiny-cats@", "a model on the Hub is"),
        ("hf:a/b/c", "cannot be downloaded"),
        ("hf:someone/else", "hf:someone/else: no such repository"),
        (f"{MODEL}@v9", rf"{MODEL}@v9: the repository has no such revision"),
    ],
)
def test_a_reference_to_nothing_is_refused(served: Hub, model: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as refused:
        locate(model)
    assert "\n" not in str(refused.value)


def test_a_gated_repository_says_what_is_needed(served: Hub) -> None:
    served.gated = True
    with pytest.raises(CheckpointError, match="its owner gives access on request; set HF_TOKEN"):
        locate(MODEL)


def test_a_disk_that_is_full_is_one_line(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=rf"{MODEL}: cannot be downloaded \(.*No space left"):
        locate(MODEL)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install huggingface_hub"):
        hub.locate(MODEL)
