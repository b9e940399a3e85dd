"""The models in weights/ are whole, what was measured was measured on them, and no page leads nowhere."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from model import checkpoint
from model.runtimes import DtypeName, RuntimeName, load_runtime
from service.engine.warmup import run_self_test

ROOT = Path(__file__).parents[1]
MODELS = sorted(path.parent for path in (ROOT / "weights").glob("*/model_index.json"))
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*/*.md")})
NOT_MEASURED = ("model_index.json", "self_test.json")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def leads(page: Path) -> list[str]:
    """The files a page links to, pictures included, as it writes them."""
    return [target for target in LINK.findall(page.read_text()) if "://" not in target]


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_a_shipped_model_is_what_its_card_is_about(folder: Path):
    model = checkpoint.load(folder)
    assert model.name == folder.name
    assert (
        f"{sum(value.numel() for value in model.unet.parameters()):,}" in (folder / "README.md").read_text()
    )
    sha = checkpoint.weights_sha256(folder)
    found = {path.name: json.loads(path.read_text()).get("weights_sha256") for path in folder.glob("*.json")}
    measured = {name: value for name, value in found.items() if name not in NOT_MEASURED}
    assert measured
    assert set(measured.values()) == {sha}, measured


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_a_shipped_model_passes_its_self_test(folder: Path, runtime: RuntimeName, dtype: DtypeName):
    model = checkpoint.load(folder)
    result = run_self_test(model, load_runtime(model, runtime, "cpu", dtype))
    assert result is not None
    assert result.passed, result


def test_there_are_two_of_them_and_a_student_of_each():
    names = ["avatars", "avatars-4", "fashion-mnist", "fashion-mnist-4"]
    assert [folder.name for folder in MODELS] == names


@pytest.mark.parametrize(("name", "guidance"), [("avatars", 1.25), ("fashion-mnist", 2.0)])
def test_a_student_has_the_classes_and_levels_of_its_teacher(name: str, guidance: float):
    teacher, student = (checkpoint.load(ROOT / "weights" / folder) for folder in (name, f"{name}-4"))
    assert student.schedule.distilled_guidance == guidance
    assert teacher.schedule.guidance_scale in (guidance, None)
    assert student.class_names == teacher.class_names
    levels = teacher.schedule.alphas_cumprod[[124, 353, 649, 999]]
    assert np.allclose(student.schedule.alphas_cumprod, levels, rtol=1e-9)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_leads_nowhere(page: Path):
    missing = [target for target in leads(page) if not (page.parent / target).exists()]
    assert not missing


def test_links_are_found():
    card = ROOT / "weights" / "fashion-mnist" / "README.md"
    assert {"evaluation.md", "samples-guided.png"} <= set(leads(card))
