from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from model import typicality
from model.likelihood import choose_timesteps
from model.typicality import BANDS, FEWEST_IMAGES, Typicality, TypicalityError, fit, roc_auc

T = 1000


def errors(count: int, seed: int = 0, terms: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """(timesteps, mse): images that are harder or easier at low and at high noise levels, and noise."""
    random = np.random.default_rng(seed)
    chosen = np.stack([choose_timesteps(T, terms, seed * 10_000 + i) for i in range(count)])
    low, high = random.normal(0, 0.5, (2, count, 1))
    share = chosen / T
    log = 2 * np.log1p(chosen) - 12 + low * (1 - share) + high * share + random.normal(0, 0.2, chosen.shape)
    return chosen, np.exp(log)


@pytest.fixture(scope="module")
def fitted() -> Typicality:
    return fit(T, *errors(600), "abc")


def scores(of: Typicality, chosen: np.ndarray, mse: np.ndarray) -> np.ndarray:
    found = [of.score(*each) for each in zip(chosen, mse, strict=True)]
    return np.array([score for score in found if score is not None])


def test_others_of_the_set_are_as_usual_as_those_it_was_fitted_to(fitted: Typicality) -> None:
    found = scores(fitted, *errors(400, seed=1))
    assert found.mean() == pytest.approx(1, abs=0.12)
    percent = np.array([fitted.percentile(score) for score in found])
    assert percent.mean() == pytest.approx(50, abs=5)
    for share in (25, 75):
        assert (percent < share).mean() * 100 == pytest.approx(share, abs=8)


def test_the_choice_of_timesteps_hardly_matters(fitted: Typicality) -> None:
    found = scores(fitted, *errors(400, seed=2, terms=100))
    assert 0.5 < found.mean() < 1.1


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_better_than_usual_is_as_unusual_as_worse(fitted: Typicality, factor: float) -> None:
    chosen, mse = errors(60, seed=3)
    assert scores(fitted, chosen, factor * mse).min() > fitted.quantiles[95]


def test_one_noise_level_is_enough(fitted: Typicality) -> None:
    chosen, mse = errors(60, seed=3)
    middle = (chosen > 60) & (chosen < 200)
    assert np.median(scores(fitted, chosen, np.where(middle, 4 * mse, mse))) > fitted.quantiles[99]


def test_an_image_without_any_error_has_a_score(fitted: Typicality) -> None:
    score = fitted.score(range(T), np.zeros(T))
    assert score is not None
    assert np.isfinite(score)
    assert fitted.percentile(score) == 100


def test_a_band_without_a_timestep_leaves_it_open(fitted: Typicality) -> None:
    assert fitted.score([0, 900], [1e-4, 0.1]) is None
    with pytest.raises(TypicalityError, match="bands without any"):
        fit(T, *errors(100, terms=3), "abc")


def test_too_few_images_are_refused() -> None:
    with pytest.raises(TypicalityError, match="too few"):
        fit(T, *errors(FEWEST_IMAGES - 1), "abc")


def test_it_comes_back_from_its_file(fitted: Typicality, tmp_path: Path) -> None:
    path = tmp_path / typicality.FILE
    typicality.save(path, fitted)
    loaded = typicality.load(path)
    chosen, mse = errors(5, seed=4)
    assert scores(loaded, chosen, mse).tolist() == scores(fitted, chosen, mse).tolist()
    assert (loaded.images, loaded.weights_sha256, len(loaded.mean)) == (600, "abc", BANDS)
    assert [each.name for each in tmp_path.iterdir()] == [typicality.FILE]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("mean"),
        lambda content: content.update(mean=[0.0]),
        lambda content: content.update(quantiles=[0.0, 1.0]),
        lambda content: content.update(curve="flat"),
        lambda content: content["mean"].__setitem__(0, float("nan")),
        lambda content: content.update(more=1),
        lambda content: content["knots"].pop(),
    ],
)
def test_a_file_that_is_off_is_refused(fitted: Typicality, tmp_path: Path, change) -> None:
    path = tmp_path / typicality.FILE
    typicality.save(path, fitted)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TypicalityError):
        typicality.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(TypicalityError):
        typicality.load(tmp_path / "x")


def test_the_area_is_the_chance_of_the_right_order() -> None:
    random = np.random.default_rng(0)
    low, high = random.integers(0, 9, 40).astype(float), random.integers(3, 12, 30).astype(float)
    chance = np.mean([(b > a) + 0.5 * (b == a) for a in low for b in high])
    area, error = roc_auc(low, high)
    assert area == pytest.approx(chance)
    assert roc_auc(high, low)[0] == pytest.approx(1 - chance)
    assert 0 < error < 0.1
    assert roc_auc([1.0, 2.0], [3.0, 4.0]) == (1.0, 0.0)


@pytest.mark.parametrize("values", [2, 5, 50, 10**9], ids=lambda values: f"{values} values")
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 40), (30, 30), (500, 90)])
def test_the_area_is_that_of_scikit_learn(n: int, m: int, values: int) -> None:
    """Of few values most are ties."""
    random = np.random.default_rng(n + m)
    low, high = random.integers(0, values, n), random.integers(0, values, m) + values // 10
    outlier = np.repeat([0, 1], [n, m])
    assert roc_auc(low, high)[0] == pytest.approx(roc_auc_score(outlier, np.concatenate([low, high])))


def test_its_error_is_its_spread() -> None:
    random = np.random.default_rng(1)
    drawn = [roc_auc(random.normal(0, 1, 100), random.normal(1, 1, 60)) for _ in range(800)]
    areas, told = np.array(drawn).T
    assert told.mean() == pytest.approx(areas.std(), rel=0.1)
