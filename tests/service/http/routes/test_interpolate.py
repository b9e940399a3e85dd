"""`/interpolate` over real sockets: with a tiny network, and with a fake one behind a gate."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tests.service.fakes import SIZE, FakeDenoiser, until
from tests.service.http.routes.test_edit import (
    BODIES,
    EVENTS,
    FEW,
    IMAGE,
    SECOND,
    images,
    pixels,
    real,
    text,
)
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, sse
from tests.service.tasks.test_uploads import file

__all__ = ["real"]


def test_the_images_of_a_path_are_in_one_row(real: Threaded) -> None:
    body = {"seeds": [1, 2], "points": 5, "num_inference_steps": 2}
    response = real.client.post("/interpolate", json=body, headers={"accept": "image/png"})
    assert Image.open(BytesIO(response.content)).size == (5 * SIZE + 8, SIZE)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "sde_dpmpp_2m"])
def test_a_stochastic_path_starts_as_an_edit(real: Threaded, sampler: str) -> None:
    how = {"strength": 0.5, "sampler": sampler, "class_label": 1, **FEW}
    made = images(real, "/interpolate", images=[text(IMAGE), text(SECOND)], points=3, **how)
    assert [image["lambda"] for image in made] == [0.0, 0.5, 1.0]
    assert [image["seed"] for image in made] == [7] * 3
    (edited,) = images(real, "/edit", image=text(IMAGE), **how)
    np.testing.assert_array_equal(pixels(made[0]), pixels(edited))
    if sampler == "ddim":  # no noise but that of the start, which is the next seed's
        (edited,) = images(real, "/edit", image=text(SECOND), **{**how, "seed": 8})
        np.testing.assert_array_equal(pixels(made[2]), pixels(edited))
    provenance = json.loads(Image.open(BytesIO(base64.b64decode(made[1]["b64_json"]))).info["parameters"])
    assert provenance.items() >= {"lambda": 0.5, "points": 3, "method": "stochastic", "seed": 7}.items()
    assert "n" not in provenance


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_a_path_between_seeds_has_their_images_at_its_ends(real: Threaded, sampler: str) -> None:
    how = {"sampler": sampler, "num_inference_steps": 6, "class_label": "cat"}
    made = images(real, "/interpolate", seeds=[7, 21], points=4, **how)
    for image, seed in ((made[0], 7), (made[-1], 21)):
        (plain,) = images(real, "/generate", seed=seed, **how)
        np.testing.assert_array_equal(pixels(image), pixels(plain))
    assert len({image["b64_json"] for image in made}) == 4


def test_an_inversion_returns_to_its_images(real: Threaded) -> None:
    """The nearer, the more steps it has."""
    smooth = (np.add.outer(np.arange(SIZE), np.arange(SIZE)) * 8 + 60).astype(np.uint8)
    ends = [smooth, np.rot90(smooth)]
    files = [text(file(Image.fromarray(end))) for end in ends]
    errors = []
    for steps in (5, 5, 30):
        how = {"method": "inversion", "points": 2, "num_inference_steps": steps}
        made = [pixels(image).astype(int) for image in images(real, "/interpolate", images=files, **how)]
        errors.append([float(np.abs(image - end).mean()) for image, end in zip(made, ends, strict=True)])
    assert errors[0] == errors[1]  # whatever the seed
    assert max(errors[2]) < min(*errors[0], 8.0)


def test_a_failure_in_the_first_stage_is_the_answer(serve: Serve) -> None:
    server = serve(FakeDenoiser(gives_nan={7}))
    body = {**BODIES["/interpolate"], "seed": 7}
    problem(server.client.post("/interpolate", json=body), 500, "non_finite")
    until(lambda: server.state.engine.idle)


def test_the_time_of_both_stages_is_reported(serve: Serve) -> None:
    server = serve()
    body = {**BODIES["/interpolate"], "points": 2}
    with server.client.stream("POST", "/interpolate", json=body, headers=EVENTS) as response:
        events = list(sse(response))
    assert events[0].data["eta_s"] == pytest.approx(2 * 6 * 0.001, rel=0.5)  # of steps as fakes.py has them
    timings = events[-1].data["timings"]
    assert timings["total_s"] >= timings["run_s"] > 0
    assert server.gate.arrived == 12
