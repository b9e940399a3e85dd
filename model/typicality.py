"""Does an image resemble the training images? Its denoising errors, by noise level.

The likelihood alone answers that badly: images simpler than the training set have a higher one (Nalisnick et
al. 2019), because a set lies where its density is typical, not where it is highest. So an image is unusual
when it is denoised *differently* from training images, better or worse, at any noise level: high levels show
coarse structure, low ones texture. That takes several statistics (Morningstar et al. 2021; for a diffusion
model's errors by noise level, Graham et al. 2023). Here they are the errors of the x₀ predictions: their
logarithms, less the training images' mean at the same timestep, averaged over bands of timesteps. The score
is the squared Mahalanobis distance from the training images' mean, divided by the number of bands.

`python -m model.evaluation.anomaly` fits this to a training set and writes it beside the weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model.files import replace_text
from model.folder import read_json

Floats = NDArray[np.float64]

FILE = "typicality.json"
BANDS = 8
KNOTS = 24
"""Points of the curve of mean errors over the timesteps."""
LOG_OFFSET = 1e-8
"""Added to squared errors before their logarithm: an image all black has none at low noise levels."""
FEWEST_IMAGES = 10 * BANDS


class TypicalityError(ValueError):
    """The statistics cannot be used, or not be made; the message says why."""


@dataclass(frozen=True, eq=False)
class Typicality:
    """Statistics of a training set.

    edges: [K + 1] rising, of the bands of timesteps, from 0 to T. knots, curve: [G] each, log(1 + t) and the
    mean logarithm of the squared error there. mean: [K], precision: [K, K], of the bands' averages.
    quantiles: [101], of the training images' own scores, by percent. images: how many there were.
    weights_sha256: of the network. All figures are of the network without a class.
    """

    edges: Floats
    knots: Floats
    curve: Floats
    mean: Floats
    precision: Floats
    quantiles: Floats
    images: int
    weights_sha256: str

    def features(self, timesteps: ArrayLike, mse: ArrayLike) -> Floats | None:
        """An image's averages in the bands, [K]; None when a band has no timestep. Both given: [n]."""
        t = np.asarray(timesteps, np.float64)
        excess = np.log(np.asarray(mse, np.float64) + LOG_OFFSET) - np.interp(
            np.log1p(t), self.knots, self.curve
        )
        band = np.searchsorted(self.edges, t, side="right") - 1
        counts = np.bincount(band, minlength=len(self.mean))
        if not counts.all():
            return None
        return np.asarray(np.bincount(band, excess, minlength=len(self.mean)) / counts)

    def score(self, timesteps: ArrayLike, mse: ArrayLike) -> float | None:
        """How unusual an image is, from 0; training images have 1 on average. None as for `features`."""
        found = self.features(timesteps, mse)
        if found is None:
            return None
        off = found - self.mean
        return float(off @ self.precision @ off) / len(off)

    def percentile(self, score: float) -> float:
        """The percentage of the training images that are less unusual, 0 to 100."""
        return float(np.interp(score, self.quantiles, np.arange(101.0)))


def fit(total: int, timesteps: ArrayLike, mse: ArrayLike, weights_sha256: str) -> Typicality:
    """The statistics of training images, whose errors `mse` [N, n] were found at `timesteps` [N, n].

    total: T. Raises TypicalityError for fewer than FEWEST_IMAGES images or bands without a timestep.
    """
    t, errors = np.asarray(timesteps, np.float64), np.asarray(mse, np.float64)
    if len(t) < FEWEST_IMAGES:
        raise TypicalityError(f"{len(t)} images are too few; there must be at least {FEWEST_IMAGES}")
    knots, curve = _curve(np.log1p(t).ravel(), np.log(errors + LOG_OFFSET).ravel())
    edges = np.expm1(np.linspace(0, math.log1p(total), BANDS + 1))
    edges[-1] = total
    blank = Typicality(
        edges, knots, curve, np.zeros(BANDS), np.eye(BANDS), np.arange(101.0), len(t), weights_sha256
    )
    found = [blank.features(*each) for each in zip(t, errors, strict=True)]
    rows = [row for row in found if row is not None]
    if len(rows) < len(found):
        raise TypicalityError(f"{t.shape[1]} timesteps an image leave one of {BANDS} bands without any")
    features = np.stack(rows)
    off = features - features.mean(0)
    precision = np.linalg.inv(off.T @ off / (len(off) - 1))
    scores = np.einsum("ni,ij,nj->n", off, precision, off) / BANDS
    quantiles = np.quantile(scores, np.linspace(0, 1, 101))
    return Typicality(edges, knots, curve, features.mean(0), precision, quantiles, len(t), weights_sha256)


def _curve(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Means of x and y in KNOTS parts of the range of x, those without a point left out."""
    place = np.minimum((KNOTS * x / x.max()).astype(np.int64), KNOTS - 1)
    counts = np.bincount(place, minlength=KNOTS)
    found = counts > 0
    means = [np.bincount(place, values, minlength=KNOTS)[found] / counts[found] for values in (x, y)]
    return means[0], means[1]


def save(path: Path, typicality: Typicality) -> None:
    """Write it as JSON, completely or not at all."""
    content = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(typicality).items()
    }
    replace_text(path, json.dumps(content, indent=1) + "\n")


def load(path: Path, timesteps: int | None = None) -> Typicality:
    """Read what `save` wrote. timesteps: T of its model. Raises TypicalityError for anything else."""
    try:
        content = read_json(path)
        arrays: dict[str, Any] = {
            name: np.asarray(content.pop(name), np.float64)
            for name in ("edges", "knots", "curve", "mean", "precision", "quantiles")
        }
        found = Typicality(**arrays, **content)
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise TypicalityError(f"not readable as such statistics ({error})") from error
    bands = found.mean.shape
    shapes = (found.edges.shape, found.precision.shape, found.quantiles.shape, found.knots.shape)
    if len(bands) != 1 or shapes != ((bands[0] + 1,), bands * 2, (101,), found.curve.shape):
        raise TypicalityError("its arrays do not belong together")
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise TypicalityError("it has numbers that are not finite")
    if not found.mean.size or found.knots.ndim != 1 or not found.knots.size:
        raise TypicalityError("it has no bands, or no curve")
    for name in ("edges", "knots", "quantiles"):
        if (np.diff(arrays[name]) < 0).any():
            raise TypicalityError(f"its {name} do not rise")
    if found.edges[0] != 0 or (timesteps is not None and found.edges[-1] < timesteps):
        raise TypicalityError("its bands do not cover the timesteps")
    if type(found.images) is not int or not isinstance(found.weights_sha256, str):
        raise TypicalityError("its number of images or its weights_sha256 is of another type")
    return found


def roc_auc(inliers: ArrayLike, outliers: ArrayLike) -> tuple[float, float]:
    """The chance that an outlier's score is above an inlier's, ties by half, and its standard error.

    The area under the receiver operating characteristic; the error is Hanley & McNeil's (1982).
    """
    low, high = np.sort(np.asarray(inliers, np.float64)), np.asarray(outliers, np.float64)
    n, m = len(low), len(high)
    wins = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
    area = float(wins.sum()) / (n * m)
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (m - 1) * (first - area**2) + (n - 1) * (second - area**2)
    return area, math.sqrt(max(0.0, variance) / (n * m))
