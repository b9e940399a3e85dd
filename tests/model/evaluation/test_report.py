from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.evaluation import report
from model.evaluation.report import Setting
from model.samplers import Guidance

JUDGE = {"accuracy": 0.95, "interval": [0.94, 0.96], "features": 64, "by_class": {"cat": 0.9, "dog": 1.0}}
REAL_BASELINE = {"draws": 5, "frechet": 4.5, "frechet_sd": 0.4, "precision": 0.87, "recall": 0.88}


def row(sampler: str = "ddim", steps: int = 20, scale: float = 1.0, **more: Any) -> dict[str, Any]:
    about = {"sampler": sampler, "steps": steps, "guidance_scale": scale, "dtype": "float32"}
    agreement = {"agreement": 0.9, "agreement_interval": [0.85, 0.93]}
    by_class = {"agreement_by_class": {"cat": 0.8, "dog": 1.0}}
    measures = {"evaluations": steps, "frechet": 20.0, "precision": 0.8, "recall": 0.7}
    return {**about, **agreement, **by_class, **measures, **more}


def evaluation(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "weights_sha256": "abc", "conditional": True, "samples": 200, "seed": 7,
        "train_images": 60, "test_images": 30, "classifier": JUDGE, "real_baseline": REAL_BASELINE,
        "commands": ["a command"],
        "rows": list(rows), **more,
    }  # fmt: skip


def test_a_row_from_before_there_were_the_later_columns_is_read() -> None:
    setting = Setting.of(row(scale=2.0))
    assert setting == Setting("ddim", 20, 2.0, "float32", 0.0, 0.0, None)
    assert setting.guidance == Guidance(2.0)


def test_a_setting_is_what_its_row_says() -> None:
    found = Setting.of(row(scale=2.0, classifier_scale=4.0, guidance_sigma_min=0.3, guidance_sigma_max=5.0))
    assert found.guidance == Guidance(2.0, (0.3, 5.0), 4.0)
    half = Setting("ddim", 20, 2.0, guidance_sigma_min=0.3)
    assert half.guidance.sigmas == (0.3, math.inf)


def test_the_page_says_how_rows_are_guided() -> None:
    page = report.markdown(
        evaluation(
            row(),
            row(scale=2.0, guidance_sigma_min=0.3, guidance_sigma_max=5.0, evaluations=31),
            row(classifier_scale=4.0, frechet=3.0),
        )
    )
    assert "| ddim | 20 | 1 | float32 | 20 | 0.900 (0.850–0.930) | 20 | 0.800 | 0.700 |" in page
    assert "| ddim | 20 | 2 at σ 0.3–5 | float32 | 31 |" in page
    assert "| ddim | 20 | 1, classifier 4 | float32 | 20 | 0.900 (0.850–0.930) | 3 |" in page
    assert "| class | real images | ddim, 20 steps, guidance 1, classifier 4, float32 |" in page
    assert "costs its gradient" in page
    assert "a command" in page
    assert "seeds 7 to 206" in page
    assert "gradient" not in report.markdown(evaluation(row()))


def test_an_unconditional_page_has_no_agreement() -> None:
    page = report.markdown(evaluation(row(agreement=None), conditional=False))
    assert "Agreement" not in page
    assert "| ddim | 20 | 1 | float32 | 20 |  | 20 |" in page


@pytest.mark.parametrize("over", ["evaluations", "guidance"])
def test_what_is_written_is_in_order_and_can_be_resumed(tmp_path: Path, over: Any) -> None:
    path = tmp_path / "deep" / "guided.json"
    rows = [
        row("sde_dpmpp_2m"),
        row(scale=2.0),
        row(classifier_scale=1.0),
        row(steps=50),
        row(scale=2.0, guidance_sigma_min=0.3),
        row(scale=2.0, guidance_sigma_max=5.0),
        row(),
    ]
    report.write(path, evaluation(*rows), over)
    assert sorted(p.name for p in path.parent.iterdir()) == ["guided.json", "guided.md", "guided.png"]
    kept = json.loads(path.read_text())["rows"]
    assert kept == [rows[i] for i in (6, 3, 2, 5, 1, 4, 0)]
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 500
    fresh = evaluation(commands=["another"])
    found = report.resumed(path, fresh, ("weights_sha256", "samples"))
    assert found["rows"] == kept
    assert found["commands"] == ["a command", "another"]


def test_a_file_about_something_else_is_put_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "guided.json"
    fresh = evaluation(samples=300)
    assert report.resumed(path, fresh, ("samples",)) is fresh
    report.write(path, evaluation(row()))
    assert report.resumed(path, fresh, ("samples",)) == fresh
    assert json.loads((tmp_path / "guided.json.old").read_text())["samples"] == 200
    assert "it is now guided.json.old" in capsys.readouterr().out
