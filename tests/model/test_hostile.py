"""Model folders made to do harm: each ends with one line that names the file, soon and in little memory.

A limit of the address space stands in for the machine's memory, so that what would take gigabytes fails.
"""

from __future__ import annotations

import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import checkpoint, typicality
from model.checkpoint import CLASSIFIER_WEIGHTS, MANIFEST, WEIGHTS, Checkpoint, CheckpointError
from model.folder import MAX_MESSAGE, MAX_TEXT
from model.samplers import build_plan
from tests.model.conftest import tiny_checkpoint, tiny_classifier
from tests.model.test_checkpoint import edit, statistics_of

SPARE = 1 << 30
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
CLASSIFIER, STATISTICS = "classifier/config.json", "typicality.json"
WEIGHT_FILES = (f"unet/{WEIGHTS}", f"classifier/{CLASSIFIER_WEIGHTS}")
JSON_FILES = (UNET, SCHEDULER, INDEX, CLASSIFIER, STATISTICS)
FUZZ = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


WITH_LITTLE = """
import sys
from pathlib import Path
from model import checkpoint
from tests.model.test_hostile import leave

leave(int(sys.argv[2]))
try:
    checkpoint.load(Path(sys.argv[1]))
except checkpoint.CheckpointError as error:
    print(error)
"""
ROOT = Path(__file__).parent.parent.parent


def leave(size: int) -> None:
    """Let this process take so many bytes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, most))


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Let this process take one more gigabyte and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    leave(SPARE)
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a whole folder, manifest and all, by their names."""
    folder = tmp_path_factory.mktemp("whole") / "tiny"
    checkpoint.save(folder, tiny_checkpoint())
    checkpoint.save_classifier(folder, tiny_classifier())
    typicality.save(folder / STATISTICS, statistics_of(folder))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(original: dict[str, bytes], tmp_path: Path) -> Path:
    """That folder, with no manifest."""
    write(tmp_path, original)
    return tmp_path


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).unlink(missing_ok=True)


def refusal(folder: Path) -> str:
    """Why a folder is not loaded."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert len(line) < MAX_MESSAGE + 10
    return line


def loads_or_is_refused(folder: Path) -> None:
    """One of the two; and what loads can be run."""
    model, line = None, ""
    try:
        model = checkpoint.load(folder)
    except CheckpointError as error:
        line = str(error)
    if model is not None:
        run(model)
    else:
        assert len(line.splitlines()) == 1


def run(model: Checkpoint) -> None:
    plan = build_plan(model.schedule, "ddim", min(4, model.schedule.timesteps))
    t = torch.tensor([len(plan)]) * model.schedule.timestep_scale
    label = torch.zeros(1, dtype=torch.int64) if model.unet.config.conditional else None
    shape = model.unet.config.shape
    if max(shape) <= 64:
        with torch.inference_mode():
            model.unet(torch.zeros(1, *shape), t, label)
    if model.typicality is not None:
        timesteps = np.arange(model.schedule.timesteps)
        score = model.typicality.score(timesteps, np.full(len(timesteps), 0.1))
        assert score is None or isinstance(score, float)


# ── Numbers ────────────────────────────────────────────────────────────────────────────────────

NOT_COUNTS = (0, -1, 2**31, 2**63, 10**400, 1.5, True, "8", [8], float("nan"), float("inf"))


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        (UNET, {"block_out_channels": [16384, 16384]}, r"conv_in.* \(8, .* has \(16384, "),
        (UNET, {"block_out_channels": [2**40, 2**40]}, "block_out_channels=1099511627776 must be at most"),
        (UNET, {"layers_per_block": 10**6}, "layers_per_block=1000000 must be at most"),
        (
            UNET,
            {
                name: [kind] * 10**5
                for name, kind in (
                    ("block_out_channels", 8),
                    ("down_block_types", "DownBlock2D"),
                    ("up_block_types", "UpBlock2D"),
                )
            },
            "must be a list of 1 to",
        ),
        (UNET, {"block_out_channels": [], "down_block_types": [], "up_block_types": []}, "must be a list of"),
        (UNET, {"block_out_channels": 8}, "must be a list of"),
        (UNET, {"num_class_embeds": 10**6}, r"class_embedding.weight is \(4, 32\) .* \(1000000, 32\)"),
        (UNET, {"num_class_embeds": 10**9}, "num_class_embeds=1000000000 must be at most"),
        (UNET, {"time_embedding_dim": 10**5}, "time_embedding.* where the network has"),
        (UNET, {"sample_size": 2**20}, "sample_size=1048576 must be at most"),
        (UNET, {"sample_size": "88"}, "sample_size='88'"),
        (UNET, {"norm_eps": 0}, "norm_eps=0 must be above 0"),
        (UNET, {"mid_block_scale_factor": 0}, "mid_block_scale_factor=0 must be above 0"),
        (UNET, {"freq_shift": 4}, "freq_shift=4 must be below half"),
        (UNET, {"act_fn": "a\nb" * 10**5}, "act_fn="),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps=1000000000 must be from 1 to"),
        (SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        (SCHEDULER, {"num_train_timesteps": -5}, "num_train_timesteps=-5"),
        (SCHEDULER, {"num_train_timesteps": float("inf")}, "scheduler_config.json: "),
        (SCHEDULER, {"beta_end": 10**400}, "scheduler_config.json: "),
        (SCHEDULER, {"trained_betas": [10**400]}, "scheduler_config.json: "),
        (SCHEDULER, {"_class_name": ["DDPMScheduler"]}, "scheduler_config.json: "),
        (
            INDEX,
            {"unet": ["diffusers", "UNet2DModel"], "scheduler": 1, "id2label": {"0": "a" * 501, "1": ""}},
            "a name longer",
        ),
        (CLASSIFIER, {"attention_head_dim": 0}, "classifier/config.json: attention_head_dim=0"),
        (CLASSIFIER, {"block_out_channels": [16384, 16384, 16384]}, "where the network has"),
        (CLASSIFIER, {"layers_per_block": 10**6}, "classifier/config.json: layers_per_block=1000000"),
        (STATISTICS, {"edges": [0.0, 5.0, 4.0] + [9.0] * 6}, "typicality.json: its edges do not rise"),
        (STATISTICS, {"edges": [float(i) for i in range(9)]}, "its bands do not cover"),
        (STATISTICS, {"images": "many"}, "typicality.json: its number"),
    ],
)
def test_numbers_that_cannot_be_meant_are_named(
    whole: Path, file: str, values: dict[str, Any], named: str
) -> None:
    edit(whole / file, **values)
    assert re.search(named, refusal(whole))


@pytest.mark.parametrize("value", NOT_COUNTS, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize(
    ("file", "option"),
    [
        *(
            (UNET, name)
            for name in ("layers_per_block", "in_channels", "attention_head_dim", "norm_num_groups")
        ),
        *((CLASSIFIER, name) for name in ("layers_per_block", "classes", "attention_head_dim")),
    ],
)
def test_what_is_no_count_is_refused(whole: Path, file: str, option: str, value: Any) -> None:
    edit(whole / file, **{option: value})
    assert f"{file}: " in refusal(whole)


def test_a_file_as_large_as_its_header_says_needs_memory(whole: Path) -> None:
    # Widths and weights agree, and the file has the size, though no blocks on the disk.
    wide = 2**18
    edit(whole / UNET, in_channels=wide, out_channels=wide, block_out_channels=[8, 16])
    path = whole / "unet" / WEIGHTS
    header, offset = {}, 0
    for name, tensor in load_file(path).items():
        shape = list(tensor.shape)
        if name in ("conv_in.weight", "conv_out.weight", "conv_out.bias"):
            shape = [wide if side == 1 else side for side in shape]
            shape = shape if name != "conv_in.weight" else [8, wide, 3, 3]
        end = offset + int(np.prod(shape))
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    # In a process of its own, where nothing else lacks memory: more than the file, less than its network.
    program = [sys.executable, "-c", WITH_LITTLE, str(whole), str(120 << 20)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert "unet/diffusion_pytorch_model.safetensors: too little memory for" in done.stdout, done.stderr


# ── Files that are none, or not what they should be ────────────────────────────────────────────


@pytest.mark.parametrize("file", [*JSON_FILES, *WEIGHT_FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_only_files_are_opened(whole: Path, file: str, kind: str) -> None:
    path = whole / file
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert file.rpartition("/")[2] in refusal(whole)


@pytest.mark.parametrize("file", [*JSON_FILES, MANIFEST])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b'{"a":' * 10**5,
        b"[" * 10**6,
        b'{"a": "\\ud800"}',
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
    ids=lambda content: repr(content)[:16],
)
def test_json_that_is_none_is_named(whole: Path, file: str, content: bytes) -> None:
    (whole / file).write_bytes(content)
    assert file in refusal(whole)


@pytest.mark.parametrize("file", [*JSON_FILES, MANIFEST])
def test_a_large_text_is_not_read(whole: Path, file: str) -> None:
    with (whole / file).open("wb") as sparse:
        sparse.truncate(MAX_TEXT + 1)
    assert "larger than 8 MiB" in refusal(whole)


# ── Names ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "..", "a\0b", "a\nb/c"])
@pytest.mark.parametrize("class_name", ["UNet2DModel", "DDPMScheduler"])
def test_a_component_is_a_folder_of_this_one(whole: Path, name: str, class_name: str) -> None:
    index = json.loads((whole / INDEX).read_text())
    kept = {
        key: value for key, value in index.items() if not (isinstance(value, list) and class_name in value)
    }
    (whole / INDEX).write_text(json.dumps(kept | {name: ["diffusers", class_name]}))
    assert "which is not the name of a folder" in refusal(whole)


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", "a\0b", 1, None, ["a"], {}])
def test_a_shard_lies_beside_its_index(whole: Path, name: Any) -> None:
    index = whole / "unet" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors", "c": name}}))
    (whole / "unet" / WEIGHTS).unlink()
    assert index.name in refusal(whole)


@pytest.mark.parametrize("commit", ["../../x", "", "a/b", "\0", "\udcff"])
def test_a_cached_branch_is_at_a_commit(whole: Path, commit: str, tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    (cache / "refs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (cache / "refs" / "main").write_bytes(os.fsencode(commit))
    assert "is not the name of a commit" in refusal(cache)


# ── The manifest ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left_out", [*WEIGHT_FILES, UNET, SCHEDULER, INDEX, CLASSIFIER, None])
def test_what_is_loaded_is_listed(whole: Path, left_out: str | None) -> None:
    checkpoint.write_manifest(whole)
    lines = (whole / MANIFEST).read_text().splitlines()
    kept = [line for line in lines if left_out is not None and not line.endswith(f"  {left_out}")]
    assert len(kept) == (0 if left_out is None else len(lines) - 1)
    checkpoint.load(whole)
    (whole / MANIFEST).write_text("\n".join(kept))
    assert f"{left_out or WEIGHT_FILES[0]}: not listed in SHA256SUMS" in refusal(whole)


@pytest.mark.parametrize("name", ["/etc/passwd", "../tiny/model_index.json", "unet/../../x", "a\0b"])
def test_a_manifest_is_of_its_folder(whole: Path, name: str) -> None:
    checkpoint.write_manifest(whole)
    with (whole / MANIFEST).open("a") as manifest:
        manifest.write(f"{'0' * 64}  {name}\n")
    assert "line 7 is about a file that is not in this folder" in refusal(whole)


# ── Anything at all ────────────────────────────────────────────────────────────────────────────

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**63, 10**400, 0.5, 1e-320, 1e308, float("nan"), float("inf")])
    | st.sampled_from(["", "\n", "é", "linear", "DownBlock2D", "UNet2DModel", "../x", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(st.data(), st.sampled_from(JSON_FILES))
def test_any_json_is_loaded_or_refused(
    original: dict[str, bytes], tmp_path: Path, data: st.DataObject, file: str
) -> None:
    write(tmp_path, original)
    content = json.loads(original[file])
    keys = st.sampled_from(sorted(content)) | st.text(max_size=3)
    changes = data.draw(st.dictionaries(keys, values, min_size=1, max_size=3))
    removed = data.draw(st.sets(st.sampled_from(sorted(content)), max_size=2))
    kept = {name: value for name, value in content.items() if name not in removed}
    (tmp_path / file).write_text(json.dumps(kept | changes))
    loads_or_is_refused(tmp_path)


@FUZZ
@given(st.sampled_from((*JSON_FILES, *WEIGHT_FILES, MANIFEST)), st.binary(max_size=200))
@example(WEIGHT_FILES[0], struct.pack("<Q", 2**63))
@example(WEIGHT_FILES[0], struct.pack("<Q", 100_000_000) + b"{")
def test_any_bytes_are_refused(original: dict[str, bytes], tmp_path: Path, file: str, content: bytes) -> None:
    write(tmp_path, original)
    (tmp_path / file).write_bytes(content)
    loads_or_is_refused(tmp_path)


@FUZZ
@given(st.sampled_from(WEIGHT_FILES), st.data())
def test_a_damaged_safetensors_file_is_loaded_or_refused(
    original: dict[str, bytes], tmp_path: Path, file: str, data: st.DataObject
) -> None:
    write(tmp_path, original)
    content = bytearray(original[file])
    header = 8 + int(struct.unpack("<Q", content[:8])[0])
    for place in data.draw(
        st.lists(st.integers(0, header - 1) | st.integers(0, len(content) - 1), max_size=4)
    ):
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'019{}[]",:FIU')))
    (tmp_path / file).write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    loads_or_is_refused(tmp_path)


@FUZZ
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_manifest_is_refused(original: dict[str, bytes], tmp_path: Path, name: str) -> None:
    write(tmp_path, original)
    (tmp_path / MANIFEST).write_text(f"{'0' * 64}  {name}\n")
    refusal(tmp_path)


def test_saved_weights_of_a_strange_type_are_named(whole: Path) -> None:
    path = whole / "unet" / WEIGHTS
    state = load_file(path)
    save_file(state | {"conv_in.bias": state["conv_in.bias"].to(torch.int64)}, path)
    assert "conv_in.bias is torch.int64" in refusal(whole)
