"""The shipped weights through `python -m service`: the same seeds give the same bytes in any company."""

from __future__ import annotations

import base64
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model import checkpoint
from tests.service.live import ROOT, Process, sse

SHIPPED = ROOT / "weights" / "fashion-mnist"
GENEROUS_S = 60.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, whole: a training that is under way rewrites the folder."""
    copy = tmp_path_factory.mktemp("weights") / SHIPPED.name
    for _ in range(20):
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(SHIPPED, copy, ignore=shutil.ignore_patterns("training", "*.part"))
            checkpoint.check_manifest(copy)
        except (OSError, shutil.Error, checkpoint.CheckpointError):
            time.sleep(0.5)  # it was being written
        else:
            return copy
    raise AssertionError(f"{SHIPPED} is never whole")


@contextmanager
def serving(*flags: str) -> Iterator[httpx.Client]:
    """A client of the service with these flags, which is drained in the end."""
    process = Process([*flags])
    try:
        begun = time.monotonic()
        with closing(process.connect(timeout_s=GENEROUS_S)) as connected:
            assert time.monotonic() - begun < GENEROUS_S
            yield connected
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 0, process.log
    finally:
        process.stop()


@pytest.fixture(scope="module")
def client(weights: Path) -> Iterator[httpx.Client]:
    # Wide enough for company whatever the step times on this machine recommend.
    with serving("--model", str(weights), "--max-batch", "8") as connected:
        yield connected


def pixels(b64_json: str) -> NDArray[np.int64]:
    """A picture's levels [H, W], or [H, W, 3] in colour."""
    return np.asarray(Image.open(BytesIO(base64.b64decode(b64_json)))).astype(np.int64)


def generate(client: httpx.Client, **request: Any) -> list[str]:
    """The images of a request, as base64."""
    response = client.post("/generate", json=request)
    assert response.status_code == 200, response.text
    return [image["b64_json"] for image in response.json()["images"]]


def test_the_service_says_what_it_serves(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert info["model"]["name"] == "fashion-mnist"
    assert len(info["model"]["classes"]) == 10
    assert info["model"]["guidance"]
    assert info["model"]["classifier"]
    assert info["batch_invariance"]["invariant"], info["batch_invariance"]


def company(count: int) -> list[dict[str, Any]]:
    """Requests of mixed samplers, lengths, guidance, classes and sizes; the same ones every time."""
    draw = random.Random(0)
    requests = []
    for seed in range(count):
        request: dict[str, Any] = {
            "seed": 1000 * seed,
            "n": draw.choice([1, 1, 2]),
            "sampler": draw.choice(["ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m"]),
            "num_inference_steps": draw.randint(2, 10),
        }
        if request["sampler"] == "ddim":
            request["eta"] = draw.choice([0.0, 0.5, 1.0])
        if draw.random() < 0.7:
            request |= {"class_label": draw.randrange(10), "guidance_scale": draw.choice([1.0, 2.0, 4.0])}
            request["classifier_scale"] = draw.choice([0.0, 0.0, 3.0])
        requests.append(request)
    return requests


@pytest.mark.parametrize("guidance", [{}, {"classifier_scale": 2.0}], ids=["free", "classifier"])
def test_the_same_seeds_give_the_same_bytes_alone_and_in_company(
    client: httpx.Client, guidance: dict[str, float]
) -> None:
    ours = {"num_inference_steps": 6, "class_label": "ankle boot", "sampler": "ddpm", **guidance}
    together = generate(client, n=8, seed=40, **ours)
    assert len(set(together)) == 8

    alone = [generate(client, seed=seed, **ours)[0] for seed in range(40, 48)]
    assert alone == together

    with ThreadPoolExecutor(28) as pool:
        others = [pool.submit(generate, client, **request) for request in company(20)]
        amid = [pool.submit(generate, client, seed=seed, **ours) for seed in range(40, 48)]
        assert [answer.result()[0] for answer in amid] == together
        in_company = [other.result() for other in others]
    # The others, too, are what they are alone.
    for request, images in list(zip(company(20), in_company, strict=True))[:4]:
        assert generate(client, **request) == images
    # They really shared steps: fewer network calls than the longest chains one after the other.
    metrics = client.get("/metrics").text
    widths = dict(line.split() for line in metrics.splitlines() if line.startswith("ddpm_batch_rows_"))
    assert float(widths["ddpm_batch_rows_sum"]) > 2 * float(widths["ddpm_batch_rows_count"])


def test_another_seed_gives_other_bytes(client: httpx.Client) -> None:
    assert generate(client, seed=1, num_inference_steps=2) != generate(client, seed=2, num_inference_steps=2)


def test_a_50_step_chain_is_seen_in_the_making(client: httpx.Client) -> None:
    query = "/stream?seed=7&num_inference_steps=50&preview_every=1"
    with client.stream("GET", query) as response:
        events = list(sse(response))
    previews = [event.data for event in events if event.name == "preview"]
    assert len(previews) >= 10
    steps = [preview["step"] for preview in previews]
    assert steps == sorted(set(steps))
    assert all(preview["steps"] == 50 for preview in previews)
    assert (events[0].name, events[-1].name) == ("queued", "completed")
    (image,) = events[-1].data["images"]
    assert image["b64_json"] == generate(client, seed=7, num_inference_steps=50)[0]


def test_an_inversion_comes_back_to_its_images(client: httpx.Client) -> None:
    """At the ends of the way are the pictures given: not exactly, but nothing else either."""
    ends = [
        generate(client, class_label=label, seed=3, num_inference_steps=10) for label in ("bag", "ankle boot")
    ]
    request = {"images": [end for (end,) in ends], "method": "inversion", "points": 3}
    response = client.post("/interpolate", json=request)
    assert response.status_code == 200, response.text
    first, middle, last = (pixels(image["b64_json"]) for image in response.json()["images"])
    given = [pixels(end) for (end,) in ends]
    apart = float(np.abs(given[0] - given[1]).mean())
    assert [float(np.abs(a - b).mean()) for a, b in zip((first, last), given, strict=True)] == pytest.approx(
        [0, 0], abs=10
    )
    assert min(apart, *(float(np.abs(middle - end).mean()) for end in given)) > 10


def test_the_second_model_is_in_colour_and_enlarged_without_smoothing() -> None:
    with serving("--model", str(ROOT / "weights" / "avatars")) as client:
        assert client.get("/info").json()["model"]["channels"] == 3
        asked = {"class_label": "hat and glasses", "seed": 3, "num_inference_steps": 4}
        (small,), (large,) = generate(client, **asked), generate(client, **asked, scale=8)
        picture = pixels(small)
        assert picture.shape == (16, 16, 3)
        assert (pixels(large) == picture.repeat(8, axis=0).repeat(8, axis=1)).all()
        assert (picture.max(axis=2) - picture.min(axis=2)).mean() > 20, "grey"
        (scored,) = client.post("/score", json={"images": [small], "terms": 50}).json()["scores"]
        assert scored["typicality"]["score"] > 0
