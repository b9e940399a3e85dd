from __future__ import annotations

import json

import pytest

from bench.quality import Judge
from model import checkpoint
from model.evaluation.judge import ClassifierConfig
from model.runtimes import TorchRuntime
from tests.model.evaluation.test_evaluate import data, model, run  # noqa: F401 (two are fixtures)


def test_it_says_what_an_evaluation_says(model, data):  # noqa: F811
    epochs = str(ClassifierConfig().epochs)
    assert run(model, data, "--classifier-epochs", epochs) == 0
    rows = json.loads((model / "evaluation.json").read_text())["rows"]
    judge = Judge(model, data, 12)
    runtime = TorchRuntime(checkpoint.load(model))
    for row in rows:
        found = judge.of(runtime, row["sampler"], row["steps"])
        for name, value in found.items():
            assert value == pytest.approx(row[name], rel=1e-5)  # the judge's batches differ
