"""What is asked for: every route that makes or scores images, and every branch that decides their bytes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PNG, JPEG, WEBP = ({"accept": f"image/{kind}"} for kind in ("png", "jpeg", "webp"))
EVENTS = {"accept": "text/event-stream"}
KEY = {"authorization": "Bearer secret"}
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "logsnr")
SAMPLERS = ("ddpm", "ddim", "dpmpp_2m", "sde_dpmpp_2m")
ALL = {"guidance_sigma_min": 0.0, "guidance_sigma_max": None}
"""Guidance at every noise level."""


@dataclass(frozen=True)
class Ask:
    """One request. model: a key of MODELS. body: JSON; content: a body as it is.

    files: of a form, beside its fields, which are the body's then. looks: previews of a stream, all of them.
    """

    name: str
    path: str
    body: Mapping[str, Any] | None = None
    model: str = "grey"
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[tuple[str, bytes], ...] = ()
    looks: int = 0


# ── Pictures ───────────────────────────────────────────────────────────────────────────────────


def file_of(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawn(number: int, width: int = 8, height: int = 8, channels: int = 1) -> Image.Image:
    """A picture that its number makes: slopes and a checked pattern."""
    i, j, c = np.ogrid[:height, :width, :channels]
    values = (number * 37 + i * (9 + 4 * number) + j * 17 + c * 50 + (i + j) % 2 * 20 * (number + 1)) % 256
    pixels = values.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def half(width: int = 8, height: int = 8, white: int = 255) -> Image.Image:
    """A mask: the right half is to be made anew."""
    mask = Image.new("L", (width, height))
    mask.paste(white, (width // 2, 0, width, height))
    return mask


def turned() -> bytes:
    """A picture lying on its side, which says so in its EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(drawn(2), exif=exif)


def animated() -> bytes:
    return file_of(drawn(0), "webp", save_all=True, append_images=[drawn(1)], lossless=True)


def noted() -> bytes:
    """A picture in 16 bits of grey, with a text beside it."""
    info = PngInfo()
    info.add_text("parameters", '{"seed": 1}')
    pixels = np.asarray(drawn(3)).astype(np.uint16) * 257
    return file_of(Image.fromarray(pixels), pnginfo=info)


def transparent() -> bytes:
    image = drawn(4, channels=3)
    image.putalpha(drawn(5))
    return file_of(image, "webp", lossless=True, exact=True)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


A, B = file_of(drawn(0)), file_of(drawn(1))
WIDE = file_of(drawn(6, 20, 12, 3))
MASK, GREYISH = file_of(half()), file_of(half(white=128))
WIDE_MASK = file_of(half(20, 12))
BLACK = file_of(Image.new("L", (8, 8)))
PAIR: dict[str, Any] = {"images": [text(A), text(B)]}


# ── Requests ───────────────────────────────────────────────────────────────────────────────────


def generating() -> Iterator[Ask]:
    """`/generate` answered at once."""

    def ask(name: str, **more: Any) -> Ask:
        places = ("model", "headers")
        body = {"seed": 7, **{key: value for key, value in more.items() if key not in places}}
        return Ask(f"generate {name}", "/generate", body, **{key: more[key] for key in places if key in more})

    yield ask("by default")
    yield ask("for a class by default", class_label="dog")
    for sampler in SAMPLERS:
        yield ask(sampler, sampler=sampler, num_inference_steps=6, class_label=0)
        yield ask(f"{sampler} in one step", sampler=sampler, num_inference_steps=1)
        yield ask(f"{sampler} by default", sampler=sampler, class_label=2)
    yield ask("all steps of ddpm", sampler="ddpm", num_inference_steps=100)
    for eta in (0.0, 0.5, 1.0):
        yield ask(f"ddim with eta {eta}", sampler="ddim", eta=eta, num_inference_steps=5, n=2)
    for number, label in enumerate(("ANKLE boot", 2, "2", " cat ")):
        yield ask(f"a class, {number}", class_label=label, num_inference_steps=4)
    for scale in (0.0, 1.0, 2.0, 5.0):
        yield ask(f"guided by {scale}", class_label=1, guidance_scale=scale, num_inference_steps=5, **ALL)
    yield ask("guided in between", class_label=1, guidance_scale=3.0, guidance_sigma_min=0.2,
              guidance_sigma_max=0.9, num_inference_steps=8)  # fmt: skip
    yield ask("guided from above", class_label=1, guidance_scale=3.0, guidance_sigma_max=None)
    yield ask("led by the classifier", class_label=1, classifier_scale=2.0, num_inference_steps=6)
    yield ask("led by both", class_label=1, classifier_scale=1.5, guidance_scale=2.0, sampler="ddpm",
              num_inference_steps=6, n=2, **ALL)  # fmt: skip
    for spacing in SPACINGS:
        yield ask(f"spaced {spacing}", timestep_spacing=spacing, num_inference_steps=7, sampler="ddim")
    for n in (2, 5, 11):
        yield ask(f"{n} images", n=n, num_inference_steps=4, sampler="sde_dpmpp_2m", class_label=n % 3)
    yield ask("the second of two alone", seed=8, num_inference_steps=5, sampler="ddim", eta=0.5)
    yield ask("by the largest seed", seed=2**53 - 1, num_inference_steps=4, sampler="ddpm")
    for kind in ("png", "jpeg", "webp"):
        yield ask(f"{kind} in JSON", output_format=kind, n=2, num_inference_steps=4, scale=3)
        yield ask(
            f"{kind} in JSON, in colour", model="colour", output_format=kind, n=2, num_inference_steps=4
        )
    for number, headers in enumerate((PNG, JPEG, WEBP)):
        one: dict[str, Any] = {"num_inference_steps": 4, "class_label": 1, "headers": headers}
        yield ask(f"a picture, {number}", **one)
        yield ask(f"a sheet, {number}", n=5, scale=2, **one)
    yield ask("a sheet in colour", n=3, num_inference_steps=5, model="colour", class_label=1, headers=PNG)
    yield ask("whatever is taken best", num_inference_steps=2,
              headers={"accept": "image/webp;q=0.5, image/png;q=0.9, text/html"})  # fmt: skip
    yield ask("any form", num_inference_steps=2, headers={"accept": "*/*"})
    for model in ("colour", "plain", "keyed", "learned"):
        headers = KEY if model == "keyed" else {}
        label = {} if model == "plain" else {"class_label": 2}
        for sampler in SAMPLERS:
            yield ask(f"{sampler} from {model}", model=model, headers=headers, sampler=sampler, n=2,
                      num_inference_steps=6, **label)  # fmt: skip
    yield ask("by the spacing of plain", model="plain")
    yield ask("that breaks", model="learned", class_label="dog", num_inference_steps=8)
    yield ask("beside the one that breaks", model="learned", class_label="cat", num_inference_steps=8)


def editing() -> Iterator[Ask]:
    """`/edit` answered at once."""

    def ask(name: str, image: bytes = A, mask: bytes | None = None, **more: Any) -> Ask:
        places = ("model", "headers")
        body = {"image": text(image), "seed": 3, **{k: v for k, v in more.items() if k not in places}}
        if mask is not None:
            body["mask"] = text(mask)
        return Ask(f"edit {name}", "/edit", body, **{key: more[key] for key in places if key in more})

    yield ask("by default")
    url = {"image": f"data:image/png;base64,{text(A)}", "seed": 3, "num_inference_steps": 5}
    yield Ask("edit of a data URL", "/edit", url)
    for strength in (0.01, 0.3, 1.0):
        yield ask(f"by {strength}", strength=strength, num_inference_steps=10, n=2, class_label="cat")
    for sampler in SAMPLERS:
        yield ask(f"by {sampler}", sampler=sampler, strength=0.5, num_inference_steps=10, class_label=1)
        yield ask(f"of a mask with strength by {sampler}", mask=MASK, sampler=sampler, strength=0.8,
                  num_inference_steps=6, n=2)  # fmt: skip
    for sampler in ("ddpm", "ddim"):
        yield ask(f"of a mask by {sampler}", mask=MASK, sampler=sampler, num_inference_steps=9,
                  jump_length=3, jump_n_sample=2, class_label=1, n=2)  # fmt: skip
    yield ask("of a mask by ddim with eta", mask=MASK, sampler="ddim", eta=0.7, num_inference_steps=9,
              jump_length=2, jump_n_sample=3)  # fmt: skip
    yield ask("of a mask without jumps", mask=GREYISH, num_inference_steps=6, jump_n_sample=1)
    yield ask("of a mask by default", mask=MASK, num_inference_steps=15)
    yield ask("of a mask with strength by default", mask=MASK, strength=0.4)
    yield ask("of a wide picture", image=WIDE, num_inference_steps=5)
    yield ask("of a wide picture and mask", image=WIDE, mask=WIDE_MASK, num_inference_steps=4, strength=0.5)
    yield ask("of a turned picture", image=turned(), num_inference_steps=5, strength=0.2)
    yield ask("of a picture in 16 bits", image=noted(), num_inference_steps=5, strength=0.2)
    yield ask("of a transparent picture", image=transparent(), num_inference_steps=5, strength=0.2)
    yield ask("guided", class_label=2, guidance_scale=4.0, classifier_scale=1.0, sampler="dpmpp_2m",
              num_inference_steps=8, timestep_spacing="logsnr")  # fmt: skip
    yield ask("as a sheet", n=3, scale=2, num_inference_steps=5, headers=PNG)
    yield ask("as a file", num_inference_steps=5, output_format="png", headers=WEBP)
    yield ask("in colour", model="colour", image=WIDE, class_label=0, num_inference_steps=6)
    yield ask("of a mask in colour", model="colour", mask=MASK, class_label=0, num_inference_steps=12)
    yield ask("from learned", model="learned", class_label=0, mask=MASK, num_inference_steps=12)
    form = {"seed": "3", "num_inference_steps": "6"}
    more = {"strength": "0.5", "n": "2", "class_label": "1"}
    yield Ask("edit by a form", "/edit", {**form, **more}, files=(("image", A),))
    files = (("image", WIDE), ("mask", WIDE_MASK))
    yield Ask("edit by a form with a mask", "/edit", {**form, "jump_length": "2"}, files=files)


def interpolating() -> Iterator[Ask]:
    """`/interpolate` answered at once."""

    def ask(name: str, **more: Any) -> Ask:
        places = ("model", "headers")
        body = {key: value for key, value in more.items() if key not in places}
        return Ask(
            f"interpolate {name}", "/interpolate", body, **{key: more[key] for key in places if key in more}
        )

    seeds: dict[str, Any] = {"seeds": [5, 11]}
    yield ask("by default", **PAIR, seed=3)
    for sampler in SAMPLERS:
        yield ask(f"by {sampler}", **PAIR, seed=3, points=4, strength=0.4, sampler=sampler,
                  num_inference_steps=8, class_label=1)  # fmt: skip
    yield ask("in two points", **PAIR, seed=3, points=2, method="stochastic", num_inference_steps=4)
    yield ask("as a picture", **PAIR, seed=3, points=5, num_inference_steps=6, scale=2, headers=PNG)
    yield ask("two seeds by default", **seeds)
    for sampler in ("ddim", "dpmpp_2m"):
        yield ask(f"two seeds by {sampler}", **seeds, points=5, sampler=sampler, num_inference_steps=6,
                  class_label="dog", guidance_scale=3.0)  # fmt: skip
    yield ask("two seeds as a picture", **seeds, points=3, num_inference_steps=4, headers=PNG)
    yield ask("by inversion by default", **PAIR, seed=3, method="inversion")
    yield ask("by inversion", **PAIR, seed=3, method="inversion", points=5, num_inference_steps=10,
              class_label=1)  # fmt: skip
    yield ask("by inversion in two points", **PAIR, seed=3, method="inversion", points=2,
              num_inference_steps=10, timestep_spacing="quadratic")  # fmt: skip
    yield ask("by inversion as a picture", **PAIR, seed=3, method="inversion", points=4,
              num_inference_steps=8, headers=WEBP)  # fmt: skip
    yield ask("by inversion in colour", **PAIR, seed=3, method="inversion", points=3, num_inference_steps=8,
              model="colour")  # fmt: skip
    yield ask("by inversion from plain", **PAIR, seed=3, method="inversion", points=3, num_inference_steps=8,
              model="plain")  # fmt: skip
    form = {"seed": "3", "points": "3", "num_inference_steps": "4"}
    yield Ask("interpolate by a form", "/interpolate", form, files=(("images", A), ("images", B)))


def scoring() -> Iterator[Ask]:
    """`/score` answered at once."""

    def ask(name: str, images: tuple[bytes, ...] = (A,), **more: Any) -> Ask:
        places = ("model", "headers")
        body = {"images": [text(each) for each in images], "seed": 3}
        body |= {key: value for key, value in more.items() if key not in places}
        return Ask(f"score {name}", "/score", body, **{key: more[key] for key in places if key in more})

    yield ask("by three terms", terms=3)
    yield ask("by four terms", terms=4)
    yield ask("by many terms", terms=40)
    yield ask("by all terms")
    yield ask("of three images", images=(A, B, WIDE), terms=16, output_format="webp")
    yield ask("of the second alone", images=(B,), terms=16, seed=4)
    yield ask("for a class", terms=24, class_label="dog")
    yield ask("of a black image", images=(BLACK,), terms=16)
    yield ask("as a strip", terms=16, headers=PNG)
    yield ask("of two as strips", images=(A, B), terms=3, headers=WEBP)
    yield ask("in colour", images=(WIDE,), terms=16, model="colour")
    yield ask("from plain", terms=16, model="plain")
    yield ask("from learned", terms=16, model="learned", class_label=2)
    yield ask("that breaks", terms=16, model="learned", class_label="dog")
    yield Ask("score by a form", "/score", {"seed": "3", "terms": "16"}, files=(("images", A), ("images", B)))


def watching() -> Iterator[Ask]:
    """The same as events."""

    def ask(name: str, path: str, looks: int, model: str = "grey", **body: Any) -> Ask:
        return Ask(f"watch {name}", path, {"seed": 3, **body}, model, headers=EVENTS, looks=looks)

    def get(name: str, looks: int, **query: Any) -> Ask:
        return Ask(f"watch {name}", "/stream", method="GET", query={"seed": 3, **query}, looks=looks)

    every: dict[str, Any] = {"preview_every": 1}
    yield get("every step", 20, **every)
    yield get("x0", 12, n=2, num_inference_steps=6, class_label="dog", preview="x0", **every)
    yield get("xt", 6, num_inference_steps=6, sampler="ddpm", preview="xt", output_format="webp", **every)
    yield get("both", 24, n=2, num_inference_steps=6, sampler="ddim", eta="0.5", preview="both", **every)
    yield get("none", 0, num_inference_steps=6, preview="none")
    yield get("every third", 4, num_inference_steps=8, preview_every=3, scale=2)
    yield get("every second of 52", 27, num_inference_steps=52, sampler="ddpm", preview_every=2)
    yield ask("a generation", "/generate", 6, num_inference_steps=6, class_label=1, **every)
    yield ask(
        "a generation in colour", "/generate", 12, "colour", num_inference_steps=6, preview="both", **every
    )
    yield ask("one that breaks", "/generate", 5, "learned", class_label="dog", num_inference_steps=8, **every)
    image: dict[str, Any] = {"image": text(A)}
    yield ask("an edit", "/edit", 8, **image, num_inference_steps=8, strength=0.5, n=2, **every)
    yield ask("an edit of a mask", "/edit", 20, **image, mask=text(MASK), num_inference_steps=6,
              jump_length=2, jump_n_sample=2, preview="both", n=1, **every)  # fmt: skip
    yield ask("a way", "/interpolate", 12, **PAIR, points=3, num_inference_steps=8, preview="x0", **every)
    yield ask("a way by inversion", "/interpolate", 36, **PAIR, points=3, num_inference_steps=6,
              method="inversion", preview="both", **every)  # fmt: skip
    yield Ask("watch a way between seeds", "/interpolate", {"seeds": [1, 2], "points": 3,
              "num_inference_steps": 5, "preview": "xt", **every}, headers=EVENTS, looks=15)  # fmt: skip
    yield ask("a score, x0", "/score", 32, **PAIR, terms=16, preview="x0", **every)
    yield ask("a score, xt", "/score", 16, images=[text(A)], terms=16, preview="xt", **every)
    yield ask("a score, both", "/score", 32, images=[text(A)], terms=16, preview="both", **every)
    yield ask("a score, none", "/score", 0, images=[text(A)], terms=16, preview="none")


def refused() -> Iterator[Ask]:
    """What is not answered."""
    bodies: dict[str, dict[str, Any]] = {
        "an unknown field": {"colour": "red"},
        "a number as text": {"n": "2"},
        "a class that is not": {"class_label": "hat"},
        "a class by too high an index": {"class_label": 3},
        "eta with another sampler": {"sampler": "ddpm", "eta": 0.5},
        "eta above 1": {"sampler": "ddim", "eta": 1.5},
        "a sampler that is not": {"sampler": "euler"},
        "an empty interval": {"guidance_sigma_min": 2.0, "guidance_sigma_max": 1.0},
        "guidance without a class": {"guidance_scale": 3.0},
        "a classifier without a class": {"classifier_scale": 3.0},
        "too many steps": {"num_inference_steps": 101},
        "no steps": {"num_inference_steps": 0},
        "no images": {"n": 0},
        "too many images": {"n": 65},
        "too large a scale": {"scale": 65},
        "a negative seed": {"seed": -1},
        "a seed beyond the last": {"seed": 2**53},
        "seeds beyond the last": {"seed": 2**53 - 1, "n": 2},
        "a format that is not": {"output_format": "gif"},
        "a preview that is not": {"preview": "all"},
        "a spacing that is not": {"timestep_spacing": "even"},
        "two wrong fields": {"n": 0, "seed": -1, "eta": 2},
        "an impossible deadline": {"deadline_s": 1e-6},
        "a deadline of nothing": {"deadline_s": 0},
    }
    for name, body in bodies.items():
        yield Ask(f"refused: {name}", "/generate", body)
    labelled: dict[str, tuple[str, dict[str, Any]]] = {
        "a class of plain": ("plain", {"class_label": 0}),
        "guidance of plain": ("plain", {"guidance_scale": 3.0}),
        "a classifier of colour": ("colour", {"class_label": 0, "classifier_scale": 1.0}),
        "too many enlarged pixels": ("plain", {"n": 1025, "scale": 16}),
        "no class of learned": ("learned", {}),
        "guidance of learned": ("learned", {"class_label": 0, "guidance_scale": 3.0}),
        "no key": ("keyed", {}),
    }
    for name, (model, body) in labelled.items():
        yield Ask(f"refused: {name}", "/generate", body, model)
    json = {"content-type": "application/json"}
    yield Ask("refused: a wrong key", "/generate", {}, "keyed", headers={"authorization": "Bearer public"})
    yield Ask("refused: broken JSON", "/generate", headers=json, content=b'{"n": ')
    yield Ask("refused: a list", "/generate", headers=json, content=b"[1]")
    yield Ask("refused: bytes", "/generate", headers=json, content=b"\xff\xfe")
    yield Ask("refused: a large body", "/generate", headers=json, content=b" " * (1 << 20) + b"{}")
    yield Ask("refused: an unknown form", "/generate", {}, headers={"accept": "text/html"})
    yield Ask("refused: an impossible deadline as events", "/generate", {"deadline_s": 1e-6}, headers=EVENTS)
    yield Ask("refused: no such route", "/paint", {})
    yield Ask("refused: no such method", "/generate", method="PUT")
    yield Ask("refused: an unknown field of a query", "/stream", method="GET", query={"colour": "red"})
    yield Ask("refused: words for a number", "/stream", method="GET", query={"n": "two"})
    yield Ask("refused: a stream that is not", "/stream", method="GET", headers={"last-event-id": "abc:1"})
    yield from _refused_pictures()


def _refused_pictures() -> Iterator[Ask]:
    image = {"image": text(A)}
    edits: dict[str, dict[str, Any]] = {
        "no picture": {},
        "an unknown field of an edit": {**image, "colour": "red"},
        "what is not base64": {"image": "!!!!"},
        "what is no picture": {"image": text(b"no picture at all")},
        "a picture cut short": {"image": text(A[: len(A) // 2])},
        "an animated picture": {"image": text(animated())},
        "a GIF": {"image": text(file_of(drawn(0), "gif"))},
        "a mask of another size": {**image, "mask": text(WIDE_MASK)},
        "a mask all black": {**image, "mask": text(BLACK)},
        "a mask that is no picture": {**image, "mask": text(b"nothing")},
        "jumps without a mask": {**image, "jump_length": 2},
        "jumps with strength": {**image, "mask": text(MASK), "strength": 0.5, "jump_n_sample": 2},
        "a mask by dpmpp_2m": {**image, "mask": text(MASK), "sampler": "dpmpp_2m"},
        "too many jumps": {**image, "mask": text(MASK), "jump_length": 1, "jump_n_sample": 1000},
        "no strength": {**image, "strength": 0.0},
        "eta of ddpm in an edit": {**image, "mask": text(MASK), "eta": 0.5},
        "too many edits": {**image, "n": 65},
        "an edit in no time": {**image, "deadline_s": 1e-6},
    }
    inverted = {**PAIR, "method": "inversion"}
    ways: dict[str, dict[str, Any]] = {
        "no ends": {},
        "both kinds of ends": {**PAIR, "seeds": [1, 2]},
        "one image": {"images": [text(A)]},
        "equal seeds": {"seeds": [4, 4]},
        "one seed": {"seeds": [4]},
        "seeds and a seed": {"seeds": [1, 2], "seed": 3},
        "seeds and a method": {"seeds": [1, 2], "method": "stochastic"},
        "seeds and strength": {"seeds": [1, 2], "strength": 0.5},
        "seeds by ddpm": {"seeds": [1, 2], "sampler": "ddpm"},
        "seeds with eta": {"seeds": [1, 2], "eta": 0.5},
        "one point": {"seeds": [1, 2], "points": 1},
        "too many points": {"seeds": [1, 2], "points": 65},
        "an inversion guided": {**inverted, "class_label": 0, "guidance_scale": 2.0},
        "an inversion led": {**inverted, "class_label": 0, "classifier_scale": 2.0},
        "an inversion by dpmpp_2m": {**inverted, "sampler": "dpmpp_2m"},
        "an inversion with strength": {**inverted, "strength": 0.5},
        "an inversion with eta": {**inverted, "eta": 0.5},
        "an inversion in one step": {**inverted, "num_inference_steps": 1},
        "an end that is no picture": {"images": [text(A), "?"]},
    }
    one = {"images": [text(A)]}
    scores: dict[str, dict[str, Any]] = {
        "nothing to score": {"images": []},
        "too many to score": {"images": [text(A)] * 9},
        "too many terms": {**one, "terms": 101},
        "too few terms": {**one, "terms": 2},
        "a sampler for a score": {**one, "sampler": "ddim"},
        "a score of what is no picture": {"images": [text(b"nothing")]},
        "a score for a class that is not": {**one, "class_label": "hat"},
        "a score in no time": {**one, "deadline_s": 1e-6},
    }
    for path, bodies in (("/edit", edits), ("/interpolate", ways), ("/score", scores)):
        for name, body in bodies.items():
            yield Ask(f"refused: {name}", path, body)
    yield Ask("refused: a form without a picture", "/edit", {"seed": "1"}, files=(("picture", A),))
    yield Ask("refused: a body of text", "/edit", headers={"content-type": "text/plain"}, content=b"image")
    yield Ask("refused: a large upload", "/edit", headers={"content-type": "application/json"},
              content=b" " * (8 << 20) + b"{}")  # fmt: skip


def all_requests() -> dict[str, Ask]:
    """Every request by its name, which no two share."""
    makers = (generating, editing, interpolating, scoring, watching, refused)
    asks = [ask for maker in makers for ask in maker()]
    found = {ask.name: ask for ask in asks}
    assert len(found) == len(asks)
    return found
