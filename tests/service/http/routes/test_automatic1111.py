"""AUTOMATIC1111's API over real sockets, by a client that was written for it."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import webuiapi
from PIL import Image

from service.engine.messages import Pixels
from service.engine.warmup import warm_up
from tests.service.fakes import SIZE, tiny_model, until
from tests.service.live import Serve, Threaded, serving
from tests.service.tasks.test_uploads import halves, noise

GREY = Image.fromarray(noise(SIZE, SIZE))
LEFT_HALF = np.s_[:, : SIZE // 2]
SMALL = {"width": SIZE, "height": SIZE}
TWICE = {"width": 2 * SIZE, "height": 2 * SIZE}
PATH = "/sdapi/v1"


def client(server: Threaded, **options: Any) -> webuiapi.WebUIApi:
    host, port = server.address
    return webuiapi.WebUIApi(host=host, port=port, **options)


@pytest.fixture(scope="module")
def server() -> Iterator[Threaded]:
    """A server with the tiny network itself."""
    servers = serving()
    yield next(servers)(
        warm=lambda config: warm_up(tiny_model(), config),
        a1111=True,
        runtime="torch",
        device="cpu",
        max_batch=4,
        max_images=8,
    ).ready()
    next(servers, None)


@pytest.fixture
def api(server: Threaded) -> Iterator[webuiapi.WebUIApi]:
    made = client(server)
    yield made
    made.session.close()


def pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture)


def ours(server: Threaded, **fields: Any) -> list[Pixels]:
    """The same by our own route."""
    answer = server.client.post("/generate", json=fields).json()
    files = [base64.b64decode(image["b64_json"]) for image in answer["images"]]
    return [pixels(Image.open(BytesIO(data))) for data in files]


# ── Pictures ───────────────────────────────────────────────────────────────────────────────────


def test_images_are_those_of_our_own_route(server: Threaded, api: webuiapi.WebUIApi) -> None:
    found = api.txt2img(
        prompt="a photo of a dog",
        sampler_name="DPM++ 2M",
        seed=7,
        steps=5,
        cfg_scale=3.0,
        batch_size=2,
        **SMALL,
    )
    wanted = ours(
        server,
        class_label="dog",
        seed=7,
        n=2,
        sampler="dpmpp_2m",
        num_inference_steps=5,
        guidance_scale=3.0,
    )
    np.testing.assert_array_equal([pixels(image) for image in found.images], wanted)
    assert found.info["all_seeds"] == [7, 8]
    assert found.parameters["prompt"] == "a photo of a dog"


def test_what_the_client_sends_by_itself_is_understood(server: Threaded, api: webuiapi.WebUIApi) -> None:
    """Euler a, 512 × 512, η 1, guidance 7, and a dozen fields that mean nothing here."""
    found = api.txt2img(prompt="cat", seed=3)
    assert found.image.size == (found.info["width"], found.info["height"]) == (64 * SIZE, 64 * SIZE)
    wanted = ours(
        server,
        class_label="cat",
        seed=3,
        sampler="ddim",
        eta=1.0,
        num_inference_steps=20,
        guidance_scale=7.0,
        scale=64,
    )
    np.testing.assert_array_equal(pixels(found.image), wanted[0])
    assert found.info["sampler_name"] == "Euler a"


def test_a_picture_carries_the_text_that_makes_it(api: webuiapi.WebUIApi) -> None:
    found = api.txt2img(prompt="eine Katze – cat", negative_prompt="blur", seed=3, steps=2, **SMALL)
    assert found.image.info["parameters"] == found.info["infotexts"][0]
    assert found.info["infotexts"][0].startswith("eine Katze – cat\nNegative prompt: blur\nSteps: 2, ")


def test_a_picture_is_changed_by_the_strength(server: Threaded, api: webuiapi.WebUIApi) -> None:
    options = {"sampler_name": "DDIM", "eta": 0.0, "seed": 5, "steps": 10, **SMALL}
    little, much = (
        pixels(api.img2img(images=[GREY], denoising_strength=strength, **options).image)
        for strength in (0.1, 1.0)
    )
    distances = [np.abs(each.astype(float) - pixels(GREY)).mean() for each in (little, much)]
    assert distances[0] < distances[1]


def test_only_white_of_a_mask_is_changed(api: webuiapi.WebUIApi) -> None:
    options = {"mask_image": halves(SIZE), "seed": 5, "steps": 4, **SMALL}
    found = pixels(api.img2img(images=[GREY], **options).image)
    np.testing.assert_array_equal(found[LEFT_HALF], pixels(GREY)[LEFT_HALF])
    assert (found != pixels(GREY)).any()


def test_pictures_are_repeated_only_on_request(server: Threaded) -> None:
    buffer = BytesIO()
    GREY.save(buffer, "PNG")
    body = {"init_images": [base64.b64encode(buffer.getvalue()).decode()], "steps": 2, **SMALL}
    answer = server.client.post(f"{PATH}/img2img", json=body).json()
    assert "init_images" not in answer["parameters"]
    repeated = server.client.post(f"{PATH}/img2img", json={**body, "include_init_images": True}).json()
    assert repeated["parameters"]["init_images"] == body["init_images"]


def test_an_answer_without_its_images(api: webuiapi.WebUIApi) -> None:
    found = api.txt2img(prompt="cat", steps=2, send_images=False, **SMALL)
    assert found.images == []
    assert len(found.info["infotexts"]) == 1


# ── What there is ──────────────────────────────────────────────────────────────────────────────


def test_the_model_and_the_samplers(api: webuiapi.WebUIApi) -> None:
    assert api.util_get_current_model() == "tiny"
    assert api.util_get_model_names() == ["tiny"]
    assert {"DPM++ 2M", "DPM++ 2M SDE", "DDIM", "DDPM"} <= set(api.util_get_sampler_names())
    assert "automatic" in api.util_get_scheduler_names()
    api.util_wait_for_ready()


@pytest.mark.parametrize("name", ["DPM++ 2M", "DPM++ 2M SDE", "DDIM", "DDPM", "Euler", "Euler a"])
def test_every_sampler_of_the_list_runs(api: webuiapi.WebUIApi, name: str) -> None:
    found = api.txt2img(sampler_name=name, scheduler="uniform", steps=3, **SMALL)
    assert found.info["sampler_name"] == name
    assert "Schedule type: Uniform" in found.info["infotexts"][0]


def test_what_other_clients_read_at_their_start(server: Threaded) -> None:
    """SillyTavern's lists. `None` is the first upscaler, and latent ones are put after it."""
    read = {
        path: server.client.get(f"{PATH}/{path}").json()
        for path in ("upscalers", "latent-upscale-modes", "sd-vae", "scripts", "sd-models")
    }
    assert [each["name"] for each in read["upscalers"]] == ["None"]
    assert read["latent-upscale-modes"] == read["sd-vae"] == []
    assert read["scripts"] == {"txt2img": [], "img2img": []}
    (model,) = read["sd-models"]
    assert model["title"] == model["model_name"] == "tiny"


def test_settings_are_accepted_but_no_other_model(server: Threaded, api: webuiapi.WebUIApi) -> None:
    assert api.set_options(api.get_options()) is None
    assert api.set_options({"CLIP_stop_at_last_layers": 2}) is None
    api.util_set_model("tiny")
    refused = server.client.post(f"{PATH}/options", json={"sd_model_checkpoint": "v1-5"})
    assert (refused.status_code, refused.json()["detail"]) == (404, "Model not found")


# ── While they are made ────────────────────────────────────────────────────────────────────────


def test_progress_and_an_early_end(serve: Serve) -> None:
    server = serve(a1111=True)
    api = client(server)
    assert api.get_progress()["progress"] == 0
    assert api.get_progress()["state"]["job_count"] == 0
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.txt2img, prompt="cat", seed=3, steps=40, batch_size=2, **TWICE)
        server.gate.wait_for_arrival(1)
        waiting = api.get_progress()
        assert (waiting["state"]["job_count"], waiting["current_image"]) == (1, None)
        assert waiting["textinfo"] == "Waiting"

        server.gate.allow(1)
        until(lambda: api.get_progress()["progress"] > 0, "the first step")
        there = api.get_progress()
        assert there["progress"] == pytest.approx(1 / 40)
        state = there["state"]
        assert (state["job"], state["job_count"], state["sampling_steps"]) == ("txt2img", 1, 40)
        assert state["sampling_step"] == 1
        assert there["eta_relative"] >= 0
        shown = Image.open(BytesIO(base64.b64decode(there["current_image"])))
        assert shown.size == (2 * SIZE + 2, SIZE)
        skipping = server.client.get(f"{PATH}/progress", params={"skip_current_image": True}).json()
        assert skipping["current_image"] is None
        assert skipping["progress"] > 0

        assert api.interrupt() == {}
        assert api.get_progress()["state"]["interrupted"]
        server.gate.open()
        found = answer.result()
    assert len(found.images) == 2
    assert len(server.denoiser.widths) < 40
    first, second = (pixels(image) for image in found.images)
    assert first.shape == (2 * SIZE, 2 * SIZE)
    sheet = np.hstack([first[::2, ::2], np.full((SIZE, 2), 255, np.uint8), second[::2, ::2]])
    np.testing.assert_array_equal(sheet, pixels(shown))
    assert api.get_progress()["state"]["job_count"] == 0
    api.session.close()


def test_a_job_that_had_no_step_ends_without_images(serve: Serve) -> None:
    server = serve(a1111=True, max_batch_size=1, policy="fifo")
    server.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.client.post, "/generate", json={"num_inference_steps": 5})
        server.gate.wait_for_arrival(1)
        answer = pool.submit(server.client.post, f"{PATH}/txt2img", json={"steps": 5})
        until(lambda: server.client.get(f"{PATH}/progress").json()["state"]["job_count"] == 1, "the job")
        server.client.post(f"{PATH}/interrupt")
        server.gate.open()
        found = answer.result()
        assert first.result().status_code == 200
    assert found.status_code == 200
    assert json.loads(found.json()["info"])["all_seeds"] == found.json()["images"] == []
    assert len(server.denoiser.widths) == 5


def test_other_clients_jobs_are_neither_seen_nor_ended(serve: Serve) -> None:
    server = serve(a1111=True, api_keys="sesame,caraway")
    server.gate.shut()
    with (
        httpx.Client(base_url=server.url, auth=("me", "sesame")) as mine,
        httpx.Client(base_url=server.url, auth=("you", "caraway")) as yours,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(mine.post, f"{PATH}/txt2img", json={"steps": 3, "seed": 1})
        server.gate.wait_for_arrival(1)
        assert yours.get(f"{PATH}/progress").json()["state"]["job_count"] == 0
        assert mine.get(f"{PATH}/progress").json()["state"]["job_count"] == 1
        yours.post(f"{PATH}/interrupt")
        server.gate.open()
        assert json.loads(answer.result().json()["info"])["all_seeds"] == [1]
    assert len(server.denoiser.widths) == 3


def test_a_client_that_leaves_cancels_its_job(serve: Serve) -> None:
    server = serve(a1111=True)
    server.gate.shut()
    head = b"Host: here\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n"
    with socket.create_connection(server.address) as leaving:
        leaving.sendall(b"POST /sdapi/v1/txt2img HTTP/1.1\r\n" + head + b'{"steps":30}')
        server.gate.wait_for_arrival(1)
    until(lambda: server.client.get(f"{PATH}/progress").json()["state"]["job_count"] == 0, "the end")
    server.gate.open()
    until(lambda: server.metric("ddpm_cancelled_total") == 1, "the cancellation")


# ── Errors ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        ("txt2img", {"sampler_name": "Heun"}, 404, "Sampler not found"),
        ("img2img", {"sampler_index": "Heun"}, 404, "Sampler not found"),
        ("img2img", {}, 404, "Init image not found"),
        ("img2img", {"init_images": ["%"]}, 422, "It is not base64."),
        ("txt2img", {"steps": 0}, 422, "steps: Input should be greater than or equal to 1"),
        ("txt2img", {"steps": 101}, 422, "This model has 100 timesteps."),
        ("txt2img", {"batch_size": 3, "n_iter": 3}, 422, "At most 8 images per request."),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_errors_are_in_the_form_that_clients_read(
    server: Threaded, path: str, body: dict[str, Any], status: int, detail: str
) -> None:
    refused = server.client.post(f"{PATH}/{path}", json=body)
    assert refused.status_code == status
    assert refused.json()["detail"] == refused.json()["errors"] == detail
    assert refused.json().keys() == {"error", "detail", "body", "errors"}


def test_a_job_that_fails_is_an_error(serve: Serve) -> None:
    server = serve(a1111=True)
    server.denoiser.gives_nan = {9}
    failed = server.client.post(f"{PATH}/txt2img", json={"seed": 9, "steps": 2})
    assert (failed.status_code, failed.json()["error"]) == (500, "non_finite")
    assert server.client.get(f"{PATH}/progress").json()["state"]["job_count"] == 0


def test_a_full_queue_says_when_to_try_again(serve: Serve) -> None:
    server = serve(a1111=True, max_queue=2)
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.client.post, f"{PATH}/txt2img", json={"steps": 2, "batch_size": 2})
        server.gate.wait_for_arrival(1)
        refused = server.client.post(f"{PATH}/txt2img", json={"steps": 2})
        server.gate.open()
        assert first.result().status_code == 200
    assert (refused.status_code, refused.json()["error"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


# ── Off, and with keys ─────────────────────────────────────────────────────────────────────────


def test_it_is_off_by_default(serve: Serve) -> None:
    missing = serve().client.post(f"{PATH}/txt2img", json={})
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


def test_a_key_is_the_password_of_any_user(serve: Serve) -> None:
    server = serve(a1111=True, api_keys="sesame,cara:way")
    for password in ("sesame", "cara:way"):
        api = client(server, username="anybody", password=password)
        assert api.get_scripts() == {"txt2img": [], "img2img": []}
        assert len(api.txt2img(prompt="cat", steps=2, **SMALL).images) == 1
        api.session.close()
    for given in (
        "",
        "Basic",
        "Basic sesame",
        "Basic %%%",
        f"Basic {base64.b64encode(b'sesame').decode()}",
        f"Basic {base64.b64encode(b'sesame:').decode()}",
        f"Basic {base64.b64encode(b'me:public').decode()}",
        f"Basic {base64.b64encode(bytes([255, 58, 255])).decode()}",
        "Bearer public",
    ):
        refused = server.client.get(f"{PATH}/options", headers={"authorization": given})
        assert (refused.status_code, refused.json()["error"]) == (401, "unauthorized"), given
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert refused.json()["detail"].endswith("the password of HTTP basic credentials")
    bearer = server.client.get(f"{PATH}/options", headers={"authorization": "Bearer sesame"})
    assert bearer.status_code == 200


def test_a_password_opens_nothing_else(serve: Serve) -> None:
    server = serve(a1111=True, api_keys="sesame")
    for path in ("/info", "/sdapifoo"):
        refused = server.client.get(path, auth=("me", "sesame"))
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
