"""The client's keyword arguments are the service's fields."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest
from pydantic import BaseModel

from service.client import fields
from service.tasks.edit import EditRequest
from service.tasks.generate import GenerateRequest
from service.tasks.images import ImageFormat
from service.tasks.interpolate import InterpolateRequest
from service.tasks.sampling import Sampler
from service.tasks.score import ScoreRequest
from tests.service.live import ROOT


@pytest.mark.parametrize(
    ("ours", "theirs", "positional"),
    [
        (fields.GenerateFields, GenerateRequest, set()),
        (fields.EditFields, EditRequest, {"image"}),
        (fields.InterpolateFields, InterpolateRequest, set()),
        (fields.ScoreFields, ScoreRequest, {"images"}),
    ],
)
def test_every_field_is_an_argument(ours: type, theirs: type[BaseModel], positional: set[str]) -> None:
    assert set(ours.__optional_keys__) | positional == set(theirs.model_fields)  # type: ignore[attr-defined]


def test_the_choices_are_the_service_s() -> None:
    assert get_args(fields.Sampler) == get_args(Sampler)
    assert get_args(fields.Format) == get_args(ImageFormat)


def test_the_client_is_light() -> None:
    heavy = "{'torch', 'fastapi', 'pydantic', 'numpy', 'PIL'}"
    program = f"import sys, service.client\nsys.exit(', '.join({heavy} & sys.modules.keys()) or None)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
