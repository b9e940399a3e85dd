"""Requests for scores: what is refused, the chains that come of them, and what their answers add up."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace as replace_fields
from PIL import Image
from pydantic import ValidationError

from model.checkpoint import Checkpoint
from model.likelihood import FEWEST_TERMS, choose_timesteps, estimate, prior_bits, rmse
from model.sheets import contact_sheet
from model.typicality import fit
from service.engine.jobs import SnapshotKind
from service.engine.messages import Finished, Measurement, Picture, Preview
from service.errors import InvalidRequestError
from service.http.bodies import ScoreBodies
from service.http.info import describe
from service.tasks.sampling import MAX_SEED, ModelCapabilities
from service.tasks.score import CHUNKS, PreparedScore, ScoreRequest, prepare_score
from tests.service.fakes import SIZE, fake_info, tiny_model
from tests.service.live import settings
from tests.service.tasks.test_sampling import capabilities

T = 100


def scoring(known: ModelCapabilities) -> Any:
    """What `/info` says about scoring."""
    return describe(known, settings(), fake_info())["scoring"]


def picture(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)


def uploaded(pixels: np.ndarray) -> str:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def prepare(known: ModelCapabilities | None = None, count: int = 2, **request: Any) -> PreparedScore:
    body = {"images": [uploaded(picture(seed)) for seed in range(count)], **request}
    return prepare_score(ScoreRequest(**body), known or capabilities())


# ── The request ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", []),
        ("images", ["x"] * 9),
        ("images", "x"),
        ("images", [1]),
        ("images", None),
        ("terms", FEWEST_TERMS - 1),
        ("terms", 2.0),
        ("terms", "10"),
        ("seed", -1),
        ("class_label", True),
        ("preview", "all"),
        ("n", 1),
        ("sampler", "ddim"),
        ("num_inference_steps", 5),
    ],
)
def test_a_bad_value_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        ScoreRequest(**{"images": ["x"], field: value})  # type: ignore[arg-type]
    assert {found["loc"][0] for found in refused.value.errors()} == {field}


def test_the_only_file_of_a_form_is_a_list_of_one() -> None:
    assert ScoreRequest(images=b"x").images == [b"x"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"terms": T + 1}, "terms"),
        ({"seed": MAX_SEED}, "seed"),
        ({"class_label": "horse"}, "class_label"),
        ({"images": ["no base64!"]}, "images"),
        ({"images": [base64.b64encode(b"no picture").decode()]}, "images"),
    ],
)
def test_what_this_model_cannot_do_is_refused(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        prepare(**request_)
    assert refused.value.field == field


def test_no_more_images_than_a_request_may_have() -> None:
    with pytest.raises(InvalidRequestError, match="At most 1 images"):
        prepare(capabilities(max_images=1))
    assert len(prepare(capabilities(max_images=2)).spec.stages[0].chains) == 2


def test_a_model_without_an_unconditional_branch_needs_a_class() -> None:
    known = capabilities(tiny_model(guided=False))
    with pytest.raises(InvalidRequestError, match="a class is needed"):
        prepare(known)
    assert prepare(known, class_label="dog").parameters["class_label"] == "dog"


# ── The job ────────────────────────────────────────────────────────────────────────────────────


def test_an_image_is_cut_into_chunks_that_share_no_noise() -> None:
    made = prepare(count=3, seed=5, terms=40)
    assert made.chunks == CHUNKS
    assert len(made.spec.stages[0].chains) == 3 * CHUNKS
    for index in range(3):
        chains = made.spec.stages[0].chains[8 * index : 8 * index + 8]
        timesteps = [t for chain in chains for t in chain.plan.timesteps]
        assert timesteps == choose_timesteps(T, 40, 5 + index).tolist()
        assert {len(chain.plan) for chain in chains} == {5}
        assert {chain.seed % (MAX_SEED + 1) for chain in chains} == {5 + index}
    assert len({chain.seed for chain in made.spec.stages[0].chains}) == 24
    assert made.spec.stages[0].kind == "measure"


def test_the_chains_start_from_the_picture_and_know_it() -> None:
    chain = prepare(terms=40).spec.stages[0].chains[8]
    expected = picture(1).astype(np.float32) / 127.5 - 1
    assert chain.known is not None
    assert chain.start is not None
    np.testing.assert_allclose(chain.known.image[0], expected, atol=1e-6)
    assert chain.known.mask.all()
    ((weight, image),) = chain.start.images
    assert weight == chain.plan.start
    np.testing.assert_array_equal(image, chain.known.image)


@pytest.mark.parametrize(
    ("limit", "terms", "expected"), [(64, 100, 8), (64, 3, 3), (20, 100, 2), (8, 100, 1), (3, 50, 1)]
)
def test_as_many_chunks_as_the_largest_request_has_slots_for(limit: int, terms: int, expected: int) -> None:
    known = capabilities(max_images=limit)
    made = prepare(known, count=1, terms=terms)
    assert len(made.spec.stages[0].chains) == made.chunks == expected
    most = min(8, limit)
    assert len(prepare(known, count=most, terms=terms).spec.stages[0].chains) <= limit


def test_an_image_alone_is_measured_as_among_others() -> None:
    def seeds_and_timesteps(made: PreparedScore, index: int) -> list[tuple[int, tuple[int, ...]]]:
        part = made.spec.stages[0].chains[index * made.chunks : (index + 1) * made.chunks]
        return [(chain.seed, chain.plan.timesteps) for chain in part]

    together = prepare(count=3, seed=5)
    alone = prepare(count=1, seed=7)
    assert seeds_and_timesteps(together, 2) == seeds_and_timesteps(alone, 0)
    assert seeds_and_timesteps(together, 1) != seeds_and_timesteps(together, 2)


def test_defaults_are_reported() -> None:
    made = prepare()
    assert made.parameters.keys() == {"n", "seed", "terms", "class_label", "output_format"}
    assert (made.parameters["n"], made.parameters["terms"]) == (2, T)
    assert (made.spec.preview, made.spec.sampler) == ("x0", "measure")
    assert prepare(preview_every=3).spec.preview_every == 3
    assert scoring(capabilities()) == {"max_images": 8, "terms": T, "typicality": False}
    assert scoring(capabilities(max_images=4))["max_images"] == 4


# ── Answers ────────────────────────────────────────────────────────────────────────────────────


def finished(made: PreparedScore) -> Finished:
    """As the engine would: of each sample its measurements, and the prediction of the last one."""
    measurements = [
        tuple(Measurement(t, 1 / (t + 1 + index), ((t + 1) / T) ** 2) for t in chain.plan.timesteps)
        for index, chain in enumerate(made.spec.stages[0].chains)
    ]
    pictures = [
        Picture(i, chain.seed, "x0", np.full((SIZE, SIZE, 1), i, np.uint8), found[-1])
        for i, (chain, found) in enumerate(zip(made.spec.stages[0].chains, measurements, strict=True))
    ]
    return Finished(made.spec.id, tuple(pictures), 0.5, 1.25, tuple(measurements))


def test_an_answer_adds_up_what_each_chunk_has_found() -> None:
    made = prepare(seed=5, terms=40)
    event = finished(made)
    body = ScoreBodies(made).completed(event, "tiny")
    assert body.keys() == {"id", "model", "scores", "parameters", "timings"}
    assert body["timings"] == {"queue_s": 0.5, "run_s": 1.25, "total_s": 1.75}
    for index, score in enumerate(body["scores"]):
        found = [each for chunk in event.measurements[8 * index : 8 * index + 8] for each in chunk]
        prior = prior_bits(tiny_model().schedule, picture(index) / 127.5 - 1)
        bound = estimate(T, prior, [each.timestep for each in found], [each.bits for each in found])
        assert (score["index"], score["seed"]) == (index, 5 + index)
        assert score["bits_per_dim"] == pytest.approx(bound.bits_per_dim, rel=1e-5)
        assert score["standard_error"] == pytest.approx(bound.standard_error, rel=1e-5)
        assert score["standard_error"] > 0
        assert score["prior"] == pytest.approx(prior, rel=1e-5)
        assert [term["timestep"] for term in score["terms"]] == [each.timestep for each in found]
        assert [term["bits"] for term in score["terms"]] == pytest.approx(
            [each.bits for each in found], rel=1e-6
        )
        assert [term["mse"] for term in score["terms"]] == pytest.approx(
            [each.mse for each in found], rel=1e-6
        )
        rates = [point["rate"] for point in score["rate_distortion"]]
        assert rates == sorted(rates)
        for point, measure in zip(score["rate_distortion"], found, strict=True):
            assert point["rate"] == pytest.approx(bound.rates[measure.timestep], rel=1e-5)
            assert point["rmse"] == pytest.approx(float(rmse(measure.mse)), rel=1e-5)
        assert score["typicality"] is None


def test_predictions_are_the_points_where_chunks_end() -> None:
    made = prepare(seed=5, terms=40)
    score = ScoreBodies(made).completed(finished(made), "tiny")["scores"][1]
    assert len(score["guesses"]) == 8
    by_timestep = {point["timestep"]: point for point in score["rate_distortion"]}
    for place, point in enumerate(score["guesses"]):
        assert (point["index"], point["seed"], point["media_type"]) == (1, 6, "image/png")
        assert {key: point[key] for key in ("timestep", "rate", "rmse")} == by_timestep[point["timestep"]]
        image = np.asarray(Image.open(BytesIO(base64.b64decode(point["b64_json"]))))
        assert (image == 8 + place).all()
    assert score["guesses"][-1]["timestep"] == 0


def test_all_terms_have_no_error() -> None:
    made = prepare(terms=T)
    for score in ScoreBodies(made).completed(finished(made), "tiny")["scores"]:
        assert score["standard_error"] == 0
        total = score["prior"] + sum(term["bits"] for term in score["terms"])
        assert score["bits_per_dim"] == pytest.approx(total, rel=1e-5)


def test_a_sheet_has_a_row_for_each_image_and_ends_with_it() -> None:
    made = prepare(terms=40)
    tiles = ScoreBodies(made).tiles(finished(made))
    sheet, parameters = contact_sheet(tiles.pictures, columns=tiles.columns), tiles.parameters
    assert sheet.shape == (2 * SIZE + 2, 9 * SIZE + 8 * 2, 1)
    for index in range(2):
        row = sheet[index * (SIZE + 2) :][:SIZE]
        for place in range(8):
            assert (row[:, place * (SIZE + 2) :][:, :SIZE] == 8 * index + place).all()
        np.testing.assert_array_equal(row[:, -SIZE:, 0], picture(index))
    assert len(parameters["scores"]) == 2
    assert [point["timestep"] for point in parameters["scores"][0]["guesses"]][-1] == 0
    assert json.loads(json.dumps(parameters)) == parameters


def test_a_preview_says_what_each_snapshot_measured() -> None:
    made = prepare(seed=5, terms=40)
    shown: list[tuple[int, SnapshotKind, int]] = [(3, "x0", 50), (9, "xt", 90)]
    snapshots = tuple(
        Picture(
            i,
            made.spec.stages[0].chains[i].seed,
            kind,
            np.zeros((SIZE, SIZE, 1), np.uint8),
            Measurement(t, 0.125, 0.25),
        )
        for i, kind, t in shown
    )
    body = ScoreBodies(made).preview(Preview(made.spec.id, 2, 5, 99, 1.5, snapshots))
    assert body.keys() == {"step", "steps", "eta_s", "images"}
    assert [(image["index"], image["seed"], image["kind"]) for image in body["images"]] == [
        (0, 5, "x0"),
        (1, 6, "xt"),
    ]
    assert [image["measure"] for image in body["images"]] == [
        {"timestep": 50, "bits": 0.125, "mse": 0.25},
        {"timestep": 90, "bits": 0.125, "mse": 0.25},
    ]


# ── Typicality ─────────────────────────────────────────────────────────────────────────────────


def usual() -> Checkpoint:
    """A model with statistics of errors around ((t + 1) / T)², as `finished` makes them."""
    random = np.random.default_rng(0)
    chosen = np.stack([choose_timesteps(T, 40, seed) for seed in range(300)])
    mse = ((chosen + 1) / T) ** 2 * np.exp(
        random.normal(0, 0.3, chosen.shape) + random.normal(0, 0.3, (300, 1))
    )
    return replace(tiny_model(), typicality=fit(T, chosen, mse, "of nothing"))


def test_how_unusual_an_image_is_where_that_is_known() -> None:
    known = capabilities(usual())
    assert scoring(known)["typicality"]
    made = prepare(known, terms=40)
    event = finished(made)
    (first, _) = ScoreBodies(made).completed(event, "tiny")["scores"]
    assert first["typicality"].keys() == {"score", "percentile"}
    assert 0 <= first["typicality"]["percentile"] <= 100
    # Ten times the error is not usual at any noise level.
    worse = tuple(
        tuple(replace_fields(m, mse=10 * m.mse + 0.1) for m in chunk) for chunk in event.measurements
    )
    odd = ScoreBodies(made).completed(replace_fields(event, measurements=worse), "tiny")["scores"][0][
        "typicality"
    ]
    assert odd["score"] > 10 * first["typicality"]["score"]
    assert odd["percentile"] == 100


def test_a_class_or_too_few_terms_leave_it_unknown() -> None:
    for made in (prepare(capabilities(usual()), class_label="dog"), prepare(capabilities(usual()), terms=3)):
        assert ScoreBodies(made).completed(finished(made), "tiny")["scores"][0]["typicality"] is None
