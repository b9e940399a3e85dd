from __future__ import annotations

import asyncio
import base64
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from bench.load import body_of, check, drive
from bench.peers.pipeline import MAX_BATCH, Diffusers, Ours, Wanted, in_groups, load
from bench.servers import PIPELINES, Model, find, running
from bench.workload import Request
from model import checkpoint, noise
from model.chain import Chain
from model.denoiser import Denoiser, generate, to_pixels
from model.runtimes import load_runtime
from model.samplers import Guidance, build_plan

BOOT = Request(0.0, 4, images=3, guided=True, label=9, seed=70)
BAG = Request(0.0, 3, images=2, label=8, seed=80)


def pixels(images):
    return np.stack([np.asarray(Image.open(BytesIO(base64.b64decode(image)))) for image in images])


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline(request, tiny_folder):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BENCH_PIPELINE", request.param)
        environment.setenv("BENCH_MODEL", str(tiny_folder))
        yield load()


@pytest.fixture(scope="module", params=["plain", "grouped"])
def client(request, pipeline):
    """The app of a peer, freshly imported."""
    name = f"bench.peers.{request.param}"
    sys.modules.pop(name, None)
    with TestClient(importlib.import_module(name).app) as found:
        yield found
    del sys.modules[name]


def images_of(client, request):
    answer = client.post("/generate", json=body_of(request))
    assert answer.status_code == 200, answer.text
    check(answer.json(), request)
    return answer.json()["images"]


def test_a_seed_gives_the_same_picture_alone_and_in_a_request(client):
    together = pixels(images_of(client, BOOT)).astype(int)
    assert together.shape == (3, 8, 8)
    alone = [pixels(images_of(client, Request(0.0, 4, 1, True, 9, 70 + i)))[0] for i in range(3)]
    assert np.abs(together - alone).max() <= 1  # torch rounds otherwise at another batch size
    assert np.abs(together[0] - together[1]).max() > 10


def test_requests_of_other_kinds_do_not_mix(client):
    alone = pixels(images_of(client, BOOT)), pixels(images_of(client, BAG))
    with ThreadPoolExecutor(6) as pool:
        both = [pool.submit(images_of, client, request) for request in (BOOT, BAG) * 3]
        found = [pixels(answer.result()).astype(int) for answer in both]
    for i, answer in enumerate(found):
        assert np.abs(answer - alone[i % 2]).max() <= 1


def test_the_pipelines_follow_the_request(pipeline):
    plain = pipeline(Wanted(num_inference_steps=5, class_label=1).each())
    assert pipeline(Wanted(num_inference_steps=5, class_label=1).each()) == plain
    assert pipeline(Wanted(num_inference_steps=5, class_label=2).each()) != plain
    assert pipeline(Wanted(num_inference_steps=6, class_label=1).each()) != plain
    assert pipeline(Wanted(num_inference_steps=5, class_label=1, guidance_scale=3).each()) != plain
    assert pipeline(Wanted(num_inference_steps=5, class_label=1, seed=1).each()) != plain


@pytest.fixture(scope="module")
def ours(tiny_folder):
    return Ours(tiny_folder, dtype="float32")  # what is compared, whatever this processor runs best


def test_with_our_runtime_a_peer_gives_what_the_denoiser_gives(tiny_folder, ours):
    model = checkpoint.load(tiny_folder)
    denoiser = Denoiser.of(model, load_runtime(model, device="cpu", dtype="float32"))
    plan = build_plan(model.schedule, "ddim", BOOT.steps, guidance=Guidance(2.0))
    expected = to_pixels(generate(denoiser, [Chain(plan, 70 + i, BOOT.label) for i in range(3)]))
    found = pixels(ours(Wanted(**body_of(BOOT)).each()))
    assert (found == expected[:, 0]).all()


def test_both_pipelines_sample_alike(tiny_folder, ours, monkeypatch):
    """Given the same starting noise they give the same images: DDIM and guidance mean the same in both."""

    def starting_noise(shape, generator):
        return torch.from_numpy(noise.normal(generator.initial_seed(), noise.START, shape))

    theirs = Diffusers(tiny_folder)
    monkeypatch.setattr(torch, "randn", starting_noise)
    wanted = Wanted(**body_of(BOOT)).each()
    assert np.abs(pixels(ours(wanted)).astype(int) - pixels(theirs(wanted))).max() <= 1


def test_a_mixed_batch_is_run_kind_by_kind():
    seen = []

    def pipeline(images):
        seen.append([image.kind for image in images])
        return [f"{image.seed}" for image in images]

    requests = [
        Wanted(n=2, seed=10, num_inference_steps=20),
        Wanted(n=1, seed=20, num_inference_steps=50),
        Wanted(n=1, seed=30, num_inference_steps=20, guidance_scale=2),
        Wanted(n=20, seed=40, num_inference_steps=20),
    ]
    answers = in_groups(pipeline, requests)
    assert answers == [["10", "11"], ["20"], ["30"], [str(40 + i) for i in range(20)]]
    assert seen == [[(20, False)] * MAX_BATCH, [(20, False)] * 6, [(50, False)], [(20, True)]]


@pytest.mark.slow
def test_a_peer_runs_as_a_server(tiny_folder):
    kind, pipeline = find("grouped/ours")
    with running(kind, Model(tiny_folder).environment(pipeline)) as server:
        answers = asyncio.run(drive(server.endpoint, [BOOT, BAG, BAG], 60.0))
    assert [answer.result for answer in answers] == ["done"] * 3
