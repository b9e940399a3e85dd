"""`/edit`, and what it has in common with `/interpolate`, over real sockets."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.engine.messages import Pixels
from service.engine.warmup import warm_up
from service.http.middleware import MAX_BODY_BYTES, MAX_UPLOAD_BYTES
from service.tasks import uploads
from tests.service.fakes import SIZE, tiny_model, until
from tests.service.http.test_problems import MARK, problem
from tests.service.live import Serve, Threaded, serving, sse
from tests.service.tasks.test_uploads import ANIMATED, DAMAGED, NO_PICTURE, claims, file, halves, noise

GREY, OTHER = noise(SIZE, SIZE), 255 - noise(SIZE, SIZE)
IMAGE, SECOND = file(Image.fromarray(GREY)), file(Image.fromarray(OTHER))
RIGHT = file(halves(SIZE))
LEFT_HALF = np.s_[:, : SIZE // 2]
FEW = {"seed": 7, "num_inference_steps": 6}
EVENTS = {"accept": "text/event-stream"}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels(image: dict[str, Any]) -> Pixels:
    return np.asarray(Image.open(BytesIO(base64.b64decode(image["b64_json"]))))


def images(server: Threaded, path: str, **fields: Any) -> list[dict[str, Any]]:
    response = server.client.post(path, json=fields)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["images"]
    return found


@pytest.fixture(scope="module")
def real() -> Iterator[Threaded]:
    """A server with the tiny network itself."""
    servers = serving()
    yield next(servers)(
        warm=lambda config: warm_up(tiny_model(), config),
        runtime="torch",
        device="cpu",
        max_batch=4,
        max_images=8,
    ).ready()
    next(servers, None)


# ── Edits by a real network ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 0.7, "jump_length": 2, "jump_n_sample": 3},
        {"jump_length": 1, "jump_n_sample": 2, "class_label": "dog"},
        {"strength": 0.5},
        {"strength": 1.0, "sampler": "sde_dpmpp_2m"},
        {"strength": 0.7, "sampler": "dpmpp_2m", "class_label": 0, "guidance_scale": 4.0},
    ],
    ids=str,
)
def test_known_pixels_come_back_exactly(real: Threaded, how: dict[str, Any]) -> None:
    made = images(real, "/edit", image=text(IMAGE), mask=text(RIGHT), n=2, **FEW, **how)
    for image in made:
        np.testing.assert_array_equal(pixels(image)[LEFT_HALF], GREY[LEFT_HALF])
        assert (pixels(image) != GREY).any()
    assert made[0]["b64_json"] != made[1]["b64_json"]


def test_known_pixels_of_another_size_are_those_of_the_fitted_picture(real: Threaded) -> None:
    large, mask = noise(3 * SIZE, 5 * SIZE), np.zeros((3 * SIZE, 5 * SIZE), np.uint8)
    mask[: SIZE + SIZE // 2] = 255
    data = file(Image.fromarray(large))
    (made,) = images(real, "/edit", image=text(data), mask=text(file(Image.fromarray(mask))), **FEW)
    fitted = uploads.decode(data, (1, SIZE, SIZE))[..., 0]
    np.testing.assert_array_equal(pixels(made)[SIZE // 2 :], fitted[SIZE // 2 :])


def test_at_full_strength_nothing_is_left_of_the_picture(real: Threaded) -> None:
    (edited,) = images(real, "/edit", image=text(IMAGE), strength=1.0, **FEW)
    (plain,) = images(real, "/generate", sampler="ddim", **FEW)
    np.testing.assert_array_equal(pixels(edited), pixels(plain))
    (weaker,) = images(real, "/edit", image=text(IMAGE), strength=0.9, **FEW)
    assert (pixels(weaker) != pixels(plain)).any()


def test_what_is_little_noised_changes_little(real: Threaded) -> None:
    near, far = (
        images(real, "/edit", image=text(IMAGE), strength=strength, seed=1, num_inference_steps=50)[0]
        for strength in (0.02, 0.9)
    )
    distance = [np.abs(pixels(image).astype(int) - GREY).mean() for image in (near, far)]
    assert distance[0] < 10 < distance[1]


def test_image_i_comes_back_alone(real: Threaded) -> None:
    many = images(real, "/edit", image=text(IMAGE), strength=0.6, n=3, sampler="ddpm", **FEW)
    assert [image["seed"] for image in many] == [7, 8, 9]
    (alone,) = images(real, "/edit", image=text(IMAGE), strength=0.6, sampler="ddpm", **{**FEW, "seed": 9})
    assert alone["b64_json"] == many[2]["b64_json"]


def test_what_made_it_is_inside(real: Threaded) -> None:
    response = real.client.post("/edit", json={"image": text(IMAGE), "mask": text(RIGHT), "n": 2, **FEW})
    body = response.json()
    assert response.headers["x-job-id"] == body["id"]
    assert body["parameters"].items() >= {
        "n": 2, "masked": True, "sampler": "ddpm", "jump_length": 10, "jump_n_sample": 5, "seed": 7,
    }.items()  # fmt: skip
    image = Image.open(BytesIO(base64.b64decode(body["images"][1]["b64_json"])))
    assert json.loads(image.info["parameters"]) == {**body["parameters"], "n": 1, "seed": 8, "model": "tiny"}


# ── A form and JSON are one ────────────────────────────────────────────────────────────────────

REQUESTS: list[tuple[str, dict[str, Any], dict[str, bytes]]] = [
    ("/edit", {"strength": 0.5, "n": 2, **FEW}, {"image": IMAGE}),
    ("/edit", {"class_label": "2", "eta": 0.5, "sampler": "ddim", **FEW}, {"image": IMAGE, "mask": RIGHT}),
    ("/edit", {"output_format": "webp", "guidance_sigma_max": 5.5, **FEW}, {"image": IMAGE}),
]


@pytest.mark.parametrize(("path", "fields", "files"), REQUESTS, ids=["edit", "mask", "webp"])
def test_a_form_gives_the_bytes_that_json_gives(
    real: Threaded, path: str, fields: dict[str, Any], files: dict[str, bytes]
) -> None:
    by_json = images(real, path, **fields, **{name: text(data) for name, data in files.items()})
    words = {name: str(value) for name, value in fields.items()}
    by_form = real.client.post(path, data=words, files={name: (name, data) for name, data in files.items()})
    by_text = real.client.post(
        path,
        data={**words, **{name: f"data:image/png;base64,{text(data)}" for name, data in files.items()}},
        files={"deadline_s": (None, b"100")},  # or httpx would not send multipart/form-data
    )
    for response in (by_form, by_text):
        assert response.status_code == 200, response.text
        assert response.json()["images"] == by_json


def test_a_file_input_that_was_left_empty_is_not_there(real: Threaded) -> None:
    """As browsers send it: a file of no bytes and no name, or no text."""
    (wanted,) = images(real, "/edit", image=text(IMAGE), **FEW)
    data = {name: str(value) for name, value in FEW.items()}
    for head in ('name="mask"; filename=""\r\nContent-Type: application/octet-stream', 'name="mask"'):
        request = real.client.build_request("POST", "/edit", data=data, files={"image": ("a", IMAGE)})
        whole, boundary = request.read(), request.headers["content-type"].partition("boundary=")[2]
        part = f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n\r\n".encode()
        kind = {"content-type": request.headers["content-type"]}
        response = real.client.post("/edit", content=part + whole, headers=kind)
        assert response.status_code == 200, response.text
        assert response.json()["parameters"]["masked"] is False
        assert response.json()["images"] == [wanted]
    named = real.client.post("/edit", data=data, files={"image": ("a", IMAGE), "mask": ("m.png", b"")})
    assert problem(named, 422, "invalid_request")["errors"] == [{"field": "mask", "message": "It is empty."}]
    by_json = real.client.post("/edit", json={"image": text(IMAGE), "mask": "", **FEW})
    assert problem(by_json, 422, "invalid_request")["detail"] == "It is empty."


@pytest.mark.parametrize("method", ["stochastic", "inversion"])
def test_files_of_one_name_are_a_pair(real: Threaded, method: str) -> None:
    fields = {"method": method, "points": 3, **FEW}
    by_json = images(real, "/interpolate", images=[text(IMAGE), text(SECOND)], **fields)
    files = [("images", ("a", IMAGE)), ("images", ("b", SECOND))]
    response = real.client.post("/interpolate", data=fields, files=files)
    assert response.json()["images"] == by_json
    parts = [("seeds", (None, b"3")), ("seeds", (None, b"4")), ("num_inference_steps", (None, b"2"))]
    seeds = real.client.post("/interpolate", files=parts)
    assert seeds.json()["parameters"]["seeds"] == [3, 4]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (MARK.encode(), "application/json"),
        (b"", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"image": "\xff"}', "application/json"),
        (b'{"image": "\\ud800"}', "application/json"),
        (json.dumps({"image": text(IMAGE), MARK: 1}).encode(), "application/json"),
        (json.dumps({"image": text(IMAGE), "n": "7"}).encode(), "application/json"),
        (b'{"strength": NaN, "image": ""}', "application/json"),
        (MARK.encode(), "text/plain"),
        (MARK.encode(), "multipart/form-data"),
        (MARK.encode(), "multipart/form-data; boundary=x"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--", "multipart/form-data; boundary=x"),
        (
            b"--x\r\nContent-Disposition: form-data; name=n\r\n\r\n1\r\n--x--",
            "multipart/form-data; boundary=x",
        ),
        (b"image=" + MARK.encode(), "application/x-www-form-urlencoded"),
    ],
    ids=range(14),
)
def test_a_body_that_is_none(serve: Serve, content: bytes, kind: str) -> None:
    server = serve()
    for path in ("/edit", "/interpolate"):
        response = server.client.post(path, content=content, headers={"content-type": kind})
        body = problem(response, 422, "invalid_request")
        assert body["errors"]
        assert len(response.content) < 2000
    assert server.client.post("/edit").status_code == 422
    assert server.denoiser.starts == []


def test_a_field_that_comes_twice_is_no_number(serve: Serve) -> None:
    parts = [("image", ("a", IMAGE)), ("n", (None, b"1")), ("n", (None, b"2"))]
    body = problem(serve().client.post("/edit", files=parts), 422, "invalid_request")
    assert body["errors"] == [{"field": "n", "message": "Input should be a valid integer"}]
    many = [("n", (None, b"1"))] * 1000
    problem(serve().client.post("/edit", files=many), 422, "invalid_request")


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", ["/edit", "/interpolate"])
def test_a_body_may_be_as_large_as_a_photograph_and_no_larger(
    serve: Serve, framing: str, kind: str, path: str
) -> None:
    server = serve()
    head, tail = b'{"image": "', b'"}'
    if "multipart" in kind:
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        tail = b"\r\n--x--\r\n"

    def post(size: int) -> httpx.Response:
        body = head + b"x" * (size - len(head) - len(tail)) + tail
        chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
        content = body if framing == "length" else chunks
        return server.client.post(path, content=content, headers={"content-type": kind})

    assert post(MAX_BODY_BYTES + 1).status_code == 422  # read, and found to be no picture
    assert post(MAX_UPLOAD_BYTES).status_code == 422
    assert problem(post(MAX_UPLOAD_BYTES + 1), 413, "content_too_large")["title"] == "Content Too Large"


# ── Refusals ───────────────────────────────────────────────────────────────────────────────────

BAD = {
    **DAMAGED,
    **NO_PICTURE,
    **{f"animated {n}": d for n, d in ANIMATED.items()},
    "huge": claims(9999, 9999),
}


def test_bad_pictures_are_422_by_their_field(serve: Serve) -> None:
    server = serve()
    for name, data in BAD.items():
        asked: list[tuple[str, str, dict[str, Any]]] = [
            ("/edit", "image", {"image": text(data)}),
            ("/edit", "mask", {"image": text(IMAGE), "mask": text(data)}),
            ("/interpolate", "images", {"images": [text(IMAGE), text(data)]}),
        ]
        for path, field, body in asked:
            found = problem(server.client.post(path, json=body), 422, "invalid_request")
            assert found["errors"] == [{"field": field, "message": found["detail"]}], name
    found = problem(server.client.post("/edit", json={"image": f"{MARK}!"}), 422, "invalid_request")
    assert found["detail"] == "It is not base64."
    assert server.denoiser.starts == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mask": text(RIGHT), "sampler": "dpmpp_2m"}, "sampler"),
        ({"mask": text(RIGHT), "jump_n_sample": 10**9}, "jump_n_sample"),
        ({"mask": text(file(halves(SIZE + 2)))}, "mask"),
        ({"jump_length": 3}, "jump_length"),
        ({"strength": 1.5}, "strength"),
        ({"n": 1000}, "n"),
        ({"image": 5}, "image"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_is_a_422(serve: Serve, fields: dict[str, Any], field: str) -> None:
    server = serve()
    response = server.client.post("/edit", json={"image": text(IMAGE), **fields})
    found = problem(response, 422, "invalid_request")
    assert {error["field"] for error in found["errors"]} == {field}  # type: ignore[attr-defined]
    assert server.denoiser.starts == []


def test_the_other_refusals_are_those_of_generate(serve: Serve) -> None:
    server = serve(max_queue=3)
    body = {"image": text(IMAGE)}
    problem(
        server.client.post("/edit", json=body, headers={"accept": "application/pdf"}), 406, "not_acceptable"
    )
    problem(server.client.post("/edit", json={**body, "deadline_s": 1e-6}), 504, "deadline_exceeded")
    pair = {"images": [text(IMAGE), text(SECOND)], "method": "inversion", "points": 3}
    problem(server.client.post("/interpolate", json={**pair, "deadline_s": 1e-6}), 504, "deadline_exceeded")
    assert server.denoiser.starts == []
    server.gate.shut()
    with server.client.stream("POST", "/edit", json=body, headers=EVENTS) as running:
        assert running.status_code == 200
        # It begins with two images; the room for the third is asked for as well.
        problem(server.client.post("/interpolate", json=pair), 429, "queue_full")
        server.gate.open()
    server.state.engine.drain()
    until(lambda: server.state.engine.refusal() is not None)
    problem(server.client.post("/edit", json=body), 503, "draining")


def test_a_key_is_needed(serve: Serve) -> None:
    server = serve(api_keys="sesame")
    for path in ("/edit", "/interpolate"):
        problem(server.client.post(path, json={"image": text(IMAGE)}), 401, "unauthorized")


# ── The forms of an answer ─────────────────────────────────────────────────────────────────────


def test_the_picture_itself(real: Threaded) -> None:
    body = {"image": text(IMAGE), "strength": 0.5, "n": 2, **FEW}
    response = real.client.post("/edit", json=body, headers={"accept": "image/png"})
    assert (response.headers["content-type"], response.headers["vary"]) == ("image/png", "Accept")
    sheet = np.asarray(Image.open(BytesIO(response.content)))
    assert sheet.shape == (SIZE, 2 * SIZE + 2)
    (first, _) = images(real, "/edit", **body)
    np.testing.assert_array_equal(sheet[:, :SIZE], pixels(first))


def test_an_edit_is_seen_in_the_making(serve: Serve) -> None:
    server = serve()
    server.gate.shut()
    body = {"image": text(IMAGE), "strength": 0.5, "num_inference_steps": 8, "preview_every": 1}
    with server.client.stream("POST", "/edit", json=body, headers=EVENTS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = []
        for event in sse(response):
            events.append(event)
            server.gate.allow(1)
    assert [event.name for event in events] == ["queued", *["preview"] * 4, "completed"]
    assert [event.data["step"] for event in events[1:-1]] == [1, 2, 3, 4]
    assert {event.data["steps"] for event in events[1:-1]} == {4}
    assert events[-1].data["parameters"]["strength"] == 0.5


@pytest.mark.parametrize("method", ["stochastic", "inversion"])
def test_a_lost_stream_is_resumed_by_get(serve: Serve, method: str) -> None:
    server = serve(stream_grace_s=30)
    server.gate.shut()
    pair = {"images": [text(IMAGE), text(SECOND)], "method": method, "points": 3, "num_inference_steps": 4}
    with server.client.stream("POST", "/interpolate", json=pair, headers=EVENTS) as first:
        queued = next(sse(first))
    until(lambda: server.state.streams.followed == 0, "the disconnect")
    server.gate.open()
    with server.client.stream("GET", "/stream", headers={"last-event-id": queued.id}) as second:
        rest = list(sse(second))
    assert rest[-1].name == "completed"
    assert rest[-1].data["id"] == queued.data["id"]
    assert [image["lambda"] for image in rest[-1].data["images"]] == [0.0, 0.5, 1.0]
    assert {image["lambda"] for image in rest[0].data["images"]} <= {0.0, 0.5, 1.0}
    assert "queued" not in [event.name for event in rest]  # not for the second part either
    assert len(server.denoiser.starts) == 3 + 2 * (method == "inversion")


# ── Clients that go, and long work ─────────────────────────────────────────────────────────────

BODIES: dict[str, dict[str, Any]] = {
    "/edit": {"image": text(IMAGE), "mask": text(RIGHT), "num_inference_steps": 60},
    "/interpolate": {"images": [text(IMAGE), text(SECOND)], "method": "inversion", "num_inference_steps": 6},
}


@pytest.mark.parametrize(
    ("path", "steps"), [("/edit", 1), ("/interpolate", 1), ("/interpolate", 8)], ids=["edit", "up", "down"]
)
def test_client_disconnect_cancels_its_post(serve: Serve, path: str, steps: int) -> None:
    server = serve()
    server.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        going = httpx.Client(base_url=server.url, timeout=httpx.Timeout(60, read=1.0), verify=False)
        leaving = pool.submit(going.post, path, json=BODIES[path])
        server.gate.wait_for_arrival(1)
        server.gate.allow(steps - 1)
        server.gate.wait_for_arrival(steps)
        with pytest.raises(httpx.ReadTimeout):
            leaving.result()
        going.close()
    until(lambda: not server.state.streams._streams, "the disconnect")
    server.gate.open()
    until(lambda: server.state.engine.idle)
    assert server.gate.arrived <= steps + 1
    assert server.metric("ddpm_cancelled_total") == 1
    assert server.client.post("/generate", json={"num_inference_steps": 1}).status_code == 200


def test_a_client_that_goes_while_it_sends_is_no_bug_of_ours(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    def half() -> Iterator[bytes]:
        yield b'{"image": "'
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        server.client.post("/edit", content=half(), headers={"content-type": "application/json"})
    until(lambda: server.metric("ddpm_requests_total", route="/edit", outcome="4xx") == 1)
    assert "unhandled" not in caplog.text
    assert server.denoiser.starts == []


def test_pictures_are_decoded_on_another_thread(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    seen: list[str] = []
    opened = uploads._opened

    def watched(data: bytes, field: str, channels: int) -> tuple[Image.Image, int]:
        seen.append(threading.current_thread().name)
        return opened(data, field, channels)

    monkeypatch.setattr(uploads, "_opened", watched)
    server.client.post("/edit", json={"image": text(IMAGE), "num_inference_steps": 1})
    assert seen == ["decoder"]


# ── What is said of it ─────────────────────────────────────────────────────────────────────────


def test_the_info_of_editing(real: Threaded) -> None:
    info = real.client.get("/info").json()["editing"]
    assert info == {
        "pictures": {"formats": ["png", "jpeg", "webp", "npy"], "max_pixels": 1 << 24},
        "edit": {"strength": 0.6},
        "inpainting": {
            "samplers": ["ddpm", "ddim"], "jump_length": 10, "jump_n_sample": 5, "max_rows": 10_000,
        },
        "interpolation": {
            "methods": ["stochastic", "inversion"], "points": 8, "strength": 0.5, "inversion_steps": 100,
        },
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/edit", "/interpolate"])
def test_openapi_has_examples_that_work(real: Threaded, path: str) -> None:
    operation = real.client.get("/openapi.json").json()["paths"][path]["post"]
    assert {"200", "406", "422", "429", "503", "504"} <= operation["responses"].keys()
    content = operation["requestBody"]["content"]
    for example in content["application/json"]["examples"].values():
        response = real.client.post(path, json={**example["value"], "num_inference_steps": 3})
        assert response.status_code == 200, response.text
    as_json, as_form = (content[kind]["schema"] for kind in ("application/json", "multipart/form-data"))
    assert as_json["properties"].keys() == as_form["properties"].keys() > {"seed", "deadline_s", "preview"}
    assert '"contentEncoding": "base64"' in json.dumps(as_json)
    assert '"format": "binary"' in json.dumps(as_form)
    assert "contentEncoding" not in json.dumps(as_form)
