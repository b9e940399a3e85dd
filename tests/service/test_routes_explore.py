"""`/score` over real sockets, with the tiny network and with a fake one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from model import noise
from model.denoiser import from_pixels
from model.diffusion import predict_x0, prior_term, q_sample, vlb_terms
from model.likelihood import choose_timesteps, stretches
from service.scores import SAMPLES
from service.warmup import warm_up
from tests.service.fakes import SIZE, tiny_model, until
from tests.service.live import Serve, Threaded, serving, sse
from tests.service.test_app import problem
from tests.service.test_routes_edit import EVENTS, GREY, IMAGE, SECOND, pixels, text


@pytest.fixture(scope="module")
def real() -> Iterator[Threaded]:
    """A server with the tiny network itself."""
    servers = serving()
    yield next(servers)(warm=warm_up, runtime="torch", device="cpu", max_batch=4).ready()
    next(servers, None)


def scores(server: Threaded, **fields: Any) -> list[dict[str, Any]]:
    response = server.client.post("/score", json=fields)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["scores"]
    return found


def test_the_terms_are_those_of_the_bound(real: Threaded) -> None:
    """Every one computed anew, without the service: its own noise, one network call, the paper's formula."""
    (found,) = scores(real, images=[text(IMAGE)], terms=20, seed=5, class_label="dog")
    model = tiny_model()
    x0 = torch.from_numpy(from_pixels(GREY[..., None]))[None]
    timesteps = choose_timesteps(100, 20, 5)
    assert [term["timestep"] for term in found["terms"]] == timesteps.tolist()
    told = {term["timestep"]: term for term in found["terms"]}
    for place, part in enumerate(stretches(timesteps, SAMPLES)):
        for row, timestep in enumerate(part):
            stream = (noise.START, 0) if row == 0 else (row - 1, noise.KNOWN)
            z = torch.from_numpy(noise.normal(5 + place, stream[0], (1, SIZE, SIZE), stream[1]))[None]
            t = torch.tensor([timestep])
            x = q_sample(model.schedule, x0, t, z)
            with torch.no_grad():
                out = model.unet(x, t, torch.tensor([1]))
            guess = predict_x0(model.schedule, x, t, out).clamp(-1, 1)
            bits = vlb_terms(model.schedule, x0, guess, t, "fixed_small")
            assert told[timestep]["bits"] == pytest.approx(float(bits), rel=1e-3)
            assert told[timestep]["mse"] == pytest.approx(float((guess - x0).square().mean()), rel=1e-3)
    assert found["prior"] == pytest.approx(float(prior_term(model.schedule, x0)))


def test_all_terms_add_up_and_leave_no_error(real: Threaded) -> None:
    (found,) = scores(real, images=[text(IMAGE)], terms=100)
    bits = [term["bits"] for term in found["terms"]]
    assert len(bits) == 100
    assert found["standard_error"] == 0
    assert found["bits_per_dim"] == pytest.approx(found["prior"] + math.fsum(bits))
    curve = found["rate_distortion"]
    assert [point["timestep"] for point in curve] == list(range(99, -1, -1))
    assert curve[0]["rate"] == pytest.approx(found["prior"])
    assert curve[-1]["rate"] == pytest.approx(found["bits_per_dim"] - bits[-1])
    assert [point["rmse"] for point in curve] == pytest.approx(
        [127.5 * math.sqrt(term["mse"]) for term in found["terms"]]
    )
    (part,) = scores(real, images=[text(IMAGE)], terms=40)
    assert part["standard_error"] > 0
    assert abs(part["bits_per_dim"] - found["bits_per_dim"]) < 6 * part["standard_error"] + 0.1 * abs(
        found["bits_per_dim"]
    )


def test_company_changes_no_figure(real: Threaded) -> None:
    alone = scores(real, images=[text(IMAGE)], terms=30, seed=3)
    again, *_ = scores(real, images=[text(IMAGE), text(SECOND)], terms=30, seed=3)
    assert [again] == alone
    with ThreadPoolExecutor() as pool:
        other = pool.submit(real.client.post, "/generate", json={"n": 4, "num_inference_steps": 30})
        assert scores(real, images=[text(IMAGE)], terms=30, seed=3) == alone
        assert other.result().status_code == 200
    assert scores(real, images=[text(IMAGE)], terms=30, seed=4) != alone
    assert scores(real, images=[text(SECOND)], terms=30, seed=3) != alone


def test_a_stream_shows_what_the_network_saw_and_guessed(real: Threaded) -> None:
    body = {"images": [text(IMAGE)], "terms": 16, "seed": 2, "preview": "both"}
    with real.client.stream("POST", "/score", json=body, headers=EVENTS) as response:
        events = list(sse(response))
    assert [events[0].name, events[-1].name] == ["queued", "completed"]
    pictures = [each for event in events if event.name == "preview" for each in event.data["images"]]
    assert {each["kind"] for each in pictures} == {"x0", "xt"}
    assert {each["index"] for each in pictures} == {0}
    told = {term["timestep"]: term for term in events[-1].data["scores"][0]["terms"]}
    for each in pictures:
        assert each["measure"] == told[each["measure"]["timestep"]]
    # x_t at t = 0 is the picture but for a hundredth; at the end of its sample's chain it would be exact.
    (last,) = (p for p in pictures if p["kind"] == "xt" and p["measure"]["timestep"] == 0)
    off = np.abs(pixels(last).astype(int) - GREY)
    assert 0 < off.max() < 15


def test_pictures_of_a_form_are_scored_alike(real: Threaded) -> None:
    parts = [("images", ("a.png", IMAGE)), ("images", ("b.png", SECOND)), ("terms", (None, b"12"))]
    response = real.client.post("/score", files=parts)
    assert response.json()["scores"] == scores(real, images=[text(IMAGE), text(SECOND)], terms=12)
    one = real.client.post("/score", files=[parts[0], parts[2]])
    assert one.json()["scores"] == scores(real, images=[text(IMAGE)], terms=12)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"images": []}, "images"),
        ({"images": [text(IMAGE)] * 9}, "images"),
        ({"images": [text(b"no picture")]}, "images"),
        ({"images": [text(IMAGE), text(IMAGE[:60])]}, "images"),
        ({"images": [text(IMAGE)], "terms": 2}, "terms"),
        ({"images": [text(IMAGE)], "terms": 101}, "terms"),
        ({"images": [text(IMAGE)], "class_label": "cow"}, "class_label"),
        ({"images": [text(IMAGE)], "seed": 2**53 - 1}, "seed"),
        ({"images": [text(IMAGE)], "n": 2}, "n"),
    ],
)
def test_what_cannot_be_scored_is_refused(serve: Serve, fields: dict[str, Any], field: str) -> None:
    response = serve().client.post("/score", json=fields)
    found: Any = problem(response, 422, "invalid_request")
    assert [each["field"] for each in found["errors"]] == [field]


def test_a_score_is_no_picture(serve: Serve) -> None:
    response = serve().client.post("/score", json={"images": [text(IMAGE)]}, headers={"accept": "image/png"})
    problem(response, 406, "not_acceptable")


def test_scores_are_not_counted_as_images(serve: Serve) -> None:
    server = serve()
    assert len(scores(server, images=[text(IMAGE)], terms=10)) == 1
    until(lambda: "ddpm_steps_total" in server.client.get("/metrics").text)
    assert 'ddpm_images_generated_total{sampler="probe"}' not in server.client.get("/metrics").text
