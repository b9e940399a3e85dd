"""Networks of another family than diffusers', from what their package saves to pictures over HTTP."""

from __future__ import annotations

import base64
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.convert.__main__ import main
from tests.model import denoising_diffusion as package
from tests.service.live import Process


@pytest.mark.slow
def test_what_denoising_diffusion_pytorch_saves_is_served_with_its_own_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = package.diffusion(package.network())
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    assert main([str(tmp_path / "model.pt"), str(tmp_path / "model"), "--sample-size", "16"]) == 0
    flags = ["--model", str(tmp_path / "model"), "--max-batch", "2", "--dtype", "float32"]
    process = Process(flags, package.ENVIRONMENT)
    try:
        with closing(process.connect()) as client:
            info = client.get("/info").json()
            request = {"seed": 5, "sampler": "ddpm", "num_inference_steps": 40}
            answer = client.post("/generate", json=request)
    finally:
        process.stop()
    assert info["batch_invariance"]["invariant"], info["batch_invariance"]
    assert answer.status_code == 200, answer.text
    encoded = base64.b64decode(answer.json()["images"][0]["b64_json"])
    pixels = np.asarray(Image.open(BytesIO(encoded))).astype(np.int64)
    package.draw_as_here(monkeypatch, seed=5, steps=40)
    expected = (255 * theirs.sample(batch_size=1)[0].permute(1, 2, 0)).round().numpy()
    assert expected.std() > 10
    assert np.abs(pixels - expected).max() <= 1
