"""`/score` over real sockets: a fake network behind a gate, and a real one beside plain equations."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from model import noise
from model.chain import Chain, from_pixels
from model.denoiser import Latent
from model.diffusion import predict_x0, q_sample, vlb_terms
from model.likelihood import choose_timesteps, chunks
from model.noise import NoiseStream
from model.schedule import NoiseSchedule, linear_betas
from service.engine.messages import Finished, Measurement
from service.engine.streams import SequencedEvent
from service.engine.warmup import warm_up
from service.http.answers import EventPresenter
from service.tasks.sampling import MAX_SEED
from tests.model.gaussian import prior_divergence
from tests.service.fakes import SIZE, FakeDenoiser, tiny_model, until
from tests.service.http.routes.test_generate import opened
from tests.service.http.test_problems import problem
from tests.service.live import Serve, Threaded, sse
from tests.service.tasks.test_score import picture, prepare, uploaded

EVENTS = {"accept": "text/event-stream"}
FOUND = Measurement(3, 0.5, 0.25)


def body(images: int = 1, first: int = 0, **more: Any) -> dict[str, Any]:
    return {"images": [uploaded(picture(first + i)) for i in range(images)], "seed": 3, **more}


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post("/score", json=body(**request))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# ── With a fake network ────────────────────────────────────────────────────────────────────────


def test_json_is_the_default(serve: Serve) -> None:
    server = serve()
    response = server.client.post("/score", json=body(2, terms=40))
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "Accept"
    found = response.json()
    assert found.keys() == {"id", "model", "scores", "parameters", "timings"}
    assert response.headers["x-job-id"] == found["id"]
    assert [score["seed"] for score in found["scores"]] == [3, 4]
    assert found["parameters"] == {
        "n": 2, "seed": 3, "terms": 40, "class_label": None, "output_format": "png",
    }  # fmt: skip
    assert sum(server.denoiser.widths) == 80
    assert not next(iter(server.state.telemetry.images.collect())).samples  # measured, not generated
    assert server.client.get("/info").json()["scoring"] == {
        "max_images": 8,
        "terms": 100,
        "typicality": False,
    }


def test_a_form_will_do(serve: Serve) -> None:
    client = serve().client
    png = base64.b64decode(uploaded(picture()))
    by_form = client.post("/score", files={"images": ("a.png", png)}, data={"seed": "3", "terms": "40"})
    assert by_form.status_code == 200, by_form.text
    assert by_form.json()["scores"] == ask(client, terms=40)["scores"]


def test_the_picture_is_a_strip_of_guesses(serve: Serve) -> None:
    server = serve()
    response = server.client.post("/score", json=body(2, terms=40), headers={"accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    sheet = opened(response.content)
    assert sheet.size == (9 * SIZE + 8 * 2, 2 * SIZE + 2)
    np.testing.assert_array_equal(np.asarray(sheet)[:SIZE, -SIZE:], picture(0))
    parameters = json.loads(sheet.info["parameters"])
    scores = ask(server.client, images=2, terms=40)["scores"]
    assert parameters["model"] == "tiny"
    for index, (line, score) in enumerate(zip(parameters["scores"], scores, strict=True)):
        assert line["bits_per_dim"] == score["bits_per_dim"]
        for place, (guess, whole) in enumerate(zip(line["guesses"], score["guesses"], strict=True)):
            assert guess == {key: whole[key] for key in ("timestep", "rate", "rmse")}
            tile = np.asarray(sheet)[index * (SIZE + 2) :, place * (SIZE + 2) :][:SIZE, :SIZE]
            assert tile.tobytes() == opened(base64.b64decode(whole["b64_json"])).tobytes()


def test_events_show_every_guess_with_its_measure(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    request = body(1, terms=40, preview="both", preview_every=1)
    with server.client.stream("POST", "/score", json=request, headers=EVENTS) as response:
        events = []
        for event in sse(response):
            events.append(event)
            server.gate.allow(1)
    assert [event.name for event in events] == ["queued", *["preview"] * 5, "completed"]
    assert events[0].data["seed"] == 3
    looks = [image for event in events[1:-1] for image in event.data["images"]]
    (score,) = events[-1].data["scores"]
    for kind in ("x0", "xt"):
        measures = [image["measure"] for image in looks if image["kind"] == kind]
        assert sorted(measures, key=lambda each: -each["timestep"]) == score["terms"]
    # The last look at a stretch is what the answer holds of it; what was seen is another picture.
    last = {image["measure"]["timestep"]: image["b64_json"] for image in looks if image["kind"] == "x0"}
    seen = {image["measure"]["timestep"]: image["b64_json"] for image in looks if image["kind"] == "xt"}
    for guess in score["guesses"]:
        assert guess["b64_json"] == last[guess["timestep"]] != seen[guess["timestep"]]


def test_a_lost_stream_is_resumed(serve: Serve) -> None:
    server = serve(stream_grace_s=30)
    server.gate.shut()
    request = body(1, terms=40, preview_every=1)
    with server.client.stream("POST", "/score", json=request, headers=EVENTS) as first:
        seen = next(sse(first))
    with server.client.stream("GET", "/stream", headers={"last-event-id": seen.id}) as second:
        server.gate.open()
        rest = list(sse(second))
    assert rest[-1].name == "completed"
    assert rest[-1].data["id"] == seen.data["id"]
    assert len(rest[-1].data["scores"][0]["terms"]) == 40
    assert len(server.denoiser.starts) == 8  # one job's, and no second one


def test_it_shares_its_steps_with_other_requests(serve: Serve) -> None:
    server = serve(max_batch_size=64)
    server.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        scored = pool.submit(ask, server.client, terms=40)
        server.gate.wait_for_arrival(1)
        made = pool.submit(
            server.client.post, "/generate", json={"n": 4, "seed": 9, "num_inference_steps": 4}
        )
        until(lambda: len(server.state.engine._in_flight) == 2, "the second job")
        server.gate.open()
        assert made.result().status_code == 200
        scored.result()
    # The step after the first had been launched already.
    assert server.denoiser.widths == [8, 8, 12, 12, 12, 4]


def test_client_disconnect_cancels_a_score(serve: Serve) -> None:
    server = serve(stream_grace_s=0)
    server.gate.shut()
    with server.client.stream("POST", "/score", json=body(1), headers=EVENTS) as response:
        next(sse(response))
    server.gate.allow(2)
    until(lambda: not server.state.streams._streams, "the disconnect")
    server.gate.open()
    until(lambda: server.state.engine.idle)
    assert server.metric("ddpm_cancelled_total") == 1
    assert len(server.denoiser.widths) < 13


@pytest.mark.parametrize(("measurements", "inline"), [((), True), (((), (FOUND,)), False)])
def test_terms_are_added_up_on_another_thread(
    measurements: Any, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thread(*_: object) -> bytes:
        return str(threading.get_ident()).encode()

    monkeypatch.setattr(EventPresenter, "_chunk", thread)
    event = SequencedEvent(1, Finished("job", (), 0.0, 0.0, measurements))
    made = asyncio.run(EventPresenter(prepare(), "tiny").chunk(event))
    assert (made == thread()) == inline


class NothingButNan(FakeDenoiser):
    """A network whose x₀ predictions are not finite, while the known image is."""

    def _one(self, chain: Chain, latent: Latent, step: int) -> Latent:
        made = super()._one(chain, latent, step)
        made.x0[0, 0, 0] = math.nan
        return made


@pytest.mark.parametrize("accept", ["application/json", "image/png", "text/event-stream"])
def test_a_nan_is_an_error_and_never_in_an_answer(serve: Serve, accept: str) -> None:
    server = serve(NothingButNan())
    response = server.client.post("/score", json=body(1), headers={"accept": accept})
    if accept == "text/event-stream":
        last = response.text.rpartition("data: ")[2].splitlines()[0]
        assert json.loads(last, parse_constant=pytest.fail)["code"] == "non_finite"
    else:
        problem(response, 500, "non_finite")


def test_pictures_that_are_none_are_refused(serve: Serve) -> None:
    server = serve()
    for request, status in (
        ({"images": ["bm8gcGljdHVyZQ=="]}, 422),
        ({"images": []}, 422),
        ({"images": ["x"] * 9}, 422),
        ({}, 422),
        (body(1, terms=101), 422),
        (body(1, deadline_s=1e-6), 504),
    ):
        code = "invalid_request" if status == 422 else "deadline_exceeded"
        problem(server.client.post("/score", json=request), status, code)
    problem(
        server.client.post("/score", json=body(1), headers={"accept": "text/html"}), 406, "not_acceptable"
    )
    assert server.denoiser.starts == []


def test_a_photograph_is_no_too_large_body(serve: Serve) -> None:
    large = uploaded(picture(size=1200))
    assert len(large) > 1 << 20
    client = serve().client
    assert client.post("/score", json={"images": [large], "terms": 3}).status_code == 200


# ── With a real one ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def real(serve: Serve) -> Threaded:
    server = serve(warm=lambda config: warm_up(tiny_model(), config), runtime="torch", max_batch=8)
    return server.ready()


def offline(pixels: np.ndarray, label: int, terms: int, seed: int) -> list[tuple[int, float, float]]:
    """(timestep, bits, mse) of an image by model/diffusion.py alone."""
    model = tiny_model()
    x0 = torch.from_numpy(from_pixels(pixels[..., None]))[None]
    found = []
    for place, part in enumerate(chunks(choose_timesteps(100, terms, seed), 8)):
        for row, timestep in enumerate(part):
            where = (noise.START, NoiseStream.STEP) if row == 0 else (row - 1, NoiseStream.KNOWN_PIXELS)
            eps = noise.normal(seed + place * (MAX_SEED + 1), where[0], (1, SIZE, SIZE), where[1])
            t = torch.tensor([timestep])
            x = q_sample(model.schedule, x0, t, torch.from_numpy(eps)[None])
            with torch.inference_mode():
                out = model.unet(x, t, torch.tensor([label]))
            guess = predict_x0(model.schedule, x, t, out).clamp(-1, 1)
            bits = vlb_terms(model.schedule, x0, guess, t, model.schedule.variance_type).item()
            found.append((timestep, bits, (guess - x0).square().mean().item()))
    return found


@pytest.mark.parametrize("options", [{}, {"data_range": (0.0, 1.0)}, {"timestep_scale": 0.25}])
@pytest.mark.parametrize("total", [1, 2])
def test_the_shortest_chains_have_scores(serve: Serve, total: int, options: dict[str, Any]) -> None:
    """A decoder alone, and with one term: finite, and the engine lives on."""
    schedule = NoiseSchedule(linear_betas(total, 0.9, 0.99), **options)
    model = replace(tiny_model(), schedule=schedule)
    server = serve(warm=lambda config: warm_up(model, config), runtime="torch", max_batch=2).ready()
    for _ in range(2):
        (score,) = ask(server.client, images=1)["scores"]
        assert [term["timestep"] for term in score["terms"]] == list(range(total))[::-1]
        assert math.isfinite(score["bits_per_dim"])
        assert score["standard_error"] == 0
    refused = server.client.post("/score", json=body(1, terms=3))
    problem(refused, 422, "invalid_request")


@pytest.mark.parametrize(("class_label", "label"), [(None, 3), ("dog", 1)])
@pytest.mark.parametrize("terms", [100, 31])
def test_scores_are_those_of_plain_equations(
    real: Threaded, class_label: str, label: int, terms: int
) -> None:
    given = {"terms": terms} if class_label is None else {"terms": terms, "class_label": class_label}
    scores = ask(real.client, images=2, **given)["scores"]
    for index, score in enumerate(scores):
        expected = offline(picture(index), label, terms, 3 + index)
        for term, (timestep, bits, mse) in zip(score["terms"], expected, strict=True):
            assert term["timestep"] == timestep
            assert term["bits"] == pytest.approx(bits, rel=1e-4, abs=1e-9)
            assert term["mse"] == pytest.approx(mse, rel=1e-4, abs=1e-9)
        prior = prior_divergence(tiny_model().schedule, picture(index) / 127.5 - 1)
        assert score["prior"] == pytest.approx(prior, rel=1e-5)
        if terms == 100:
            assert score["bits_per_dim"] == pytest.approx(
                prior + sum(bits for _, bits, _ in expected), rel=1e-4
            )


def test_batch_neighbours_do_not_change_the_numbers(real: Threaded) -> None:
    alone = [ask(real.client, first=i, terms=40)["scores"][0] for i in range(3)]
    with ThreadPoolExecutor(12) as pool:
        others = [
            pool.submit(
                real.client.post, "/generate", json={"n": n, "num_inference_steps": 9, "sampler": sampler}
            )
            for n, sampler in ((3, "ddpm"), (1, "dpmpp_2m"), (2, "ddim"))
        ]
        amid = [pool.submit(ask, real.client, first=i, terms=40) for i in range(3)]
        assert [answer.result()["scores"][0] for answer in amid] == alone
        assert all(other.result().status_code == 200 for other in others)
    # And in one request: image i is asked with seed + i.
    request = body(1, first=1, terms=40)
    request["images"].insert(0, uploaded(picture(7)))
    request["seed"] = 2
    together = real.client.post("/score", json=request).json()["scores"][1]
    for key in ("bits_per_dim", "standard_error", "terms", "rate_distortion"):
        assert together[key] == alone[1][key]


def test_openapi_has_examples_that_work(real: Threaded) -> None:
    operation = real.client.get("/openapi.json").json()["paths"]["/score"]["post"]
    assert {"200", "406", "422", "429", "503", "504"} <= operation["responses"].keys()
    content = operation["requestBody"]["content"]
    for example in content["application/json"]["examples"].values():
        response = real.client.post("/score", json=example["value"])
        assert response.status_code == 200, response.text
    assert '"format": "binary"' in json.dumps(content["multipart/form-data"]["schema"])


def test_the_numbers_are_about_the_picture(real: Threaded) -> None:
    """A control for all of the above."""
    grey = base64.b64encode(_png(np.full((SIZE, SIZE), 128, np.uint8))).decode()
    request = {"images": [uploaded(picture()), grey], "seed": 0}
    first, second = real.client.post("/score", json=request).json()["scores"]
    assert first["bits_per_dim"] != pytest.approx(second["bits_per_dim"], rel=1e-3)
    assert all(math.isfinite(score["bits_per_dim"]) for score in (first, second))


def _png(pixels: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
