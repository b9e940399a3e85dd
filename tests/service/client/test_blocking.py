"""The methods of both clients against the app on a real socket."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image
import pytest

from service.client import (
    Completed,
    ComputeFailed,
    ConnectionFailed,
    InvalidRequest,
    NotFound,
    Preview,
    Queued,
    ServiceError,
    Unauthorized,
)
from tests.service.client.either import Connect, Proxy
from tests.service.fakes import SIZE, FakeDenoiser
from tests.service.live import Serve, Threaded


def grey(level: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (SIZE, SIZE), level)


def png(picture: PIL.Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_images(client: Any, server: Threaded) -> None:
    result = client.generate(n=2, seed=7, class_label="dog", num_inference_steps=5)
    assert [(each.index, each.seed) for each in result.images] == [(0, 7), (1, 8)]
    assert {each.class_label for each in result.images} == {"dog"}
    assert result.parameters["num_inference_steps"] == 5
    assert result.model == "tiny"
    assert result.timings["total_s"] >= 0
    picture = server.client.post(
        "/generate",
        json={"seed": 8, "class_label": "dog", "num_inference_steps": 5},
        headers={"Accept": "image/png"},
    )
    assert result.images[1].array.tolist() == np.asarray(PIL.Image.open(BytesIO(picture.content))).tolist()


def test_arrays(client: Any) -> None:
    as_array = client.generate(seed=7, output_format="npy").images[0]
    as_picture = client.generate(seed=7).images[0]
    assert as_array.array[..., 0].tolist() == as_picture.array.tolist()
    with pytest.raises(ValueError, match="array"):
        _ = as_array.pil


def test_a_stream(client: Any) -> None:
    events = list(client.stream(seed=7, class_label=1, num_inference_steps=5, preview_every=1))
    assert isinstance(events[0], Queued)
    previews = events[1:-1]
    assert all(isinstance(each, Preview) for each in previews)
    assert (previews[0].step, previews[-1].step, previews[0].steps) == (1, 5, 5)
    assert previews[0].images[0].pil.size == (SIZE, SIZE)
    assert previews[0].images[0].kind == "x0"
    assert isinstance(events[-1], Completed)
    (image,) = client.generate(seed=7, class_label=1, num_inference_steps=5).images
    assert events[-1].result.images[0].data == image.data


def test_an_edit(client: Any) -> None:
    black, white = grey(0), grey(255)
    mask = black.copy()
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    result = client.edit(white, mask=mask, seed=1, num_inference_steps=5, jump_n_sample=1)
    assert result.parameters["masked"] is True
    assert result.parameters["jump_n_sample"] == 1


@pytest.mark.parametrize("form", ["path", "bytes", "array"])
def test_a_picture_may_be_a_file_bytes_or_an_array(client: Any, tmp_path: Any, form: str) -> None:
    image = grey(90)
    path = tmp_path / "grey.png"
    image.save(path)
    given = {"path": path, "bytes": path.read_bytes(), "array": np.asarray(image)[..., None]}[form]
    fields: dict[str, Any] = {"strength": 0.5, "seed": 3, "num_inference_steps": 4}
    found, wanted = (client.edit(each, **fields) for each in (given, image))
    assert found.images[0].array.tolist() == wanted.images[0].array.tolist()


def test_a_path_between_seeds(client: Any) -> None:
    result = client.interpolate(seeds=[1, 2], points=3, num_inference_steps=4)
    assert [each.share for each in result.images] == [0, 0.5, 1]


def test_a_path_between_pictures(client: Any) -> None:
    result = client.interpolate(images=[grey(0), grey(255)], points=2, num_inference_steps=4)
    assert len(result.images) == 2


def test_scores(client: Any, server: Threaded) -> None:
    pictures = [grey(0), grey(128)]
    result = client.score(pictures, terms=8, seed=1)
    files = [base64.b64encode(png(each)).decode() for each in pictures]
    body = server.client.post("/score", json={"images": files, "terms": 8, "seed": 1}).json()
    for found, wanted in zip(result.scores, body["scores"], strict=True):
        for name in ("index", "seed", "bits_per_dim", "standard_error", "prior", "terms", "rate_distortion"):
            assert getattr(found, name) == wanted[name]
    assert result.scores[0].guesses[0].pil.size == (SIZE, SIZE)


def test_info(client: Any) -> None:
    assert client.info()["model"]["height"] == SIZE


def test_an_impossible_request(client: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate(num_inference_steps=101)
    error = refused.value
    assert (error.status, error.code) == (422, "invalid_request")
    assert [each["field"] for each in error.errors] == ["num_inference_steps"]
    assert error.request_id
    assert error.detail in str(error)


def test_an_impossible_request_for_a_stream(client: Any) -> None:
    with pytest.raises(InvalidRequest):
        next(client.stream(num_inference_steps=101))


def test_a_job_that_is_not_known(client: Any) -> None:
    with pytest.raises(NotFound):
        client.job("unknown")
    with pytest.raises(NotFound):
        client.cancel("un/known?")


def test_a_job_that_fails(connect: Connect, serve: Serve) -> None:
    client = connect(serve(FakeDenoiser(gives_nan={13})).url)
    with pytest.raises(ComputeFailed) as failed:
        client.generate(seed=13)
    assert failed.value.code == "non_finite"
    with pytest.raises(ServiceError, match="non_finite"):
        list(client.stream(seed=13))


def test_a_key(connect: Connect, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    url = serve(api_keys="sesame").url
    with pytest.raises(Unauthorized):
        connect(url).info()
    assert connect(url, api_key="sesame").info()
    monkeypatch.setenv("DDPM_API_KEY", "sesame")
    monkeypatch.setenv("DDPM_URL", url)
    assert connect().info()


def test_nobody_answers(connect: Connect, server: Threaded) -> None:
    with Proxy(server.address, []) as gone:
        pass
    with pytest.raises(ConnectionFailed, match=gone.url):
        connect(gone.url, attempts=1).info()


# ── Streams that are cut ───────────────────────────────────────────────────────────────────────

FIELDS: dict[str, Any] = {"seed": 7, "num_inference_steps": 8, "preview_every": 1}


def test_a_stream_that_is_cut_goes_on_behind_its_last_event(connect: Connect, serve: Serve) -> None:
    server = serve(stream_grace_s=30.0)
    server.gate.shut()
    with Proxy(server.address, cuts=[2, 3]) as proxy:
        client = connect(proxy.url)
        found = []
        for event in client.stream(**FIELDS):
            found.append(event)
            # Previews that were sent but did not arrive are not sent again, so not every step has its turn.
            server.gate.allow(2 if len(found) < 3 else 8)
        steps = [each.step for each in found if isinstance(each, Preview)]
        assert steps == sorted(set(steps))
        assert isinstance(found[-1], Completed)
        assert b"".join(proxy.heads).lower().count(b"last-event-id: ") == 2
    assert len(server.denoiser.starts) == 1  # no second job


def test_a_stream_that_is_cut_before_its_first_event_is_not_started_again(
    connect: Connect, server: Threaded
) -> None:
    with Proxy(server.address, cuts=[0]) as proxy:
        client = connect(proxy.url)
        with pytest.raises(ConnectionFailed, match="broke off"):
            list(client.stream(**FIELDS))
        assert b"".join(proxy.heads).count(b"HTTP/1.1") == 1
