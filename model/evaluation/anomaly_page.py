"""The page of model.evaluation.anomaly: likelihood.json as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.evaluation.corruptions import BLUR, NOISE


def markdown(report: Mapping[str, Any]) -> str:
    """likelihood.md from the content of likelihood.json."""
    test, flow = report["test"], report["bound_and_flow"]
    lines = [
        f"# Likelihoods of {report['model']}",
        f"```sh\n{report['command']}\n```",
        f"Weights: sha256 `{report['weights_sha256']}`. Network: {report['runtime']}, without a class. Bits "
        f"are per dimension, of which an image has {math.prod(report['shape'])}, padding included. Errors "
        "after ± are standard errors over images.",
        "## Test images",
        _test_text(report),
        "![rate and distortion](rate-distortion.png)",
        "*Rate and distortion (Ho et al. 2020, Fig. 5): sending x_t costs the rate, and the x₀ prediction "
        "from it has the distortion. Averages over the same test images. They are the rates of a code in "
        "this sense: relative entropy coding sends x_t for as many bits in expectation, up to a logarithmic "
        "overhead. Nothing is encoded here.*",
        _curve_table(report["curve"]),
        "## Outlier detection",
        f"Area under the ROC curve against the same {test['images']} test images: 1 is perfect, 0.5 is "
        "chance, and below that outliers score as more usual than test images. *Bits*: the bound itself; "
        "more bits are more unusual. *Distance*: of the bits from the training images' mean (Nalisnick et "
        "al. 2019). *Typicality*: of the errors by noise level (`model/typicality.py`), fitted to "
        f"{report['train']['images']} training images. The noise has a standard deviation of {NOISE:g} "
        f"levels of 255, the blur a radius of {BLUR:g} pixel.",
        _detection_table(report["detection"]),
        "## The bound and the probability flow",
        _flow_text(flow),
        _flow_table(flow),
    ]
    return "\n\n".join(lines) + "\n"


def _pm(pair: Sequence[float], digits: int = 3) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _test_text(report: Mapping[str, Any]) -> str:
    train, test = report["train"], report["test"]
    bits, prior, decoder = (test[key][0] for key in ("bits_per_dim", "prior", "decoder"))
    return (
        f"**{_pm(test['bits_per_dim'])} bits per dimension** over {test['images']} test images, by the "
        f"variational bound. Of these, {prior:.5f} are for x_T, {bits - prior - decoder:.3f} for the steps "
        f"down to x at timestep 0, and {decoder:.3f} for the step from there to the image. Each image was "
        f"measured at {report['terms']} of {report['timesteps']} terms, which makes an error of "
        f"{test['error_by_subset']:.3f} in one image; the ± above includes it. {train['images']} training "
        f"images have {_pm(train['bits_per_dim'])}."
    )


def _curve_table(curve: Mapping[str, Sequence[float]]) -> str:
    count = len(curve["timestep"])
    shown = sorted({round(i) for i in np.linspace(0, count - 1, min(count, 10)).tolist()})
    rows = [
        f"| {curve['timestep'][i]:.0f} | {curve['rate'][i]:.3f} | {curve['rmse'][i]:.1f} |" for i in shown
    ]
    return "\n".join(["| timestep | rate (bits/dim) | RMSE of 255 |", "|--:|--:|--:|", *rows])


def _detection_table(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        "| outliers | images | bits/dim | AUC by bits | by distance | by typicality |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        areas = " | ".join(_pm(row["auc"][key]) for key in ("bits", "distance", "typicality"))
        table.append(f"| {row['set']} | {row['images']} | {_pm(row['bits_per_dim'])} | {areas} |")
    return "\n".join(table)


def _flow_text(flow: Mapping[str, Any]) -> str:
    twice = "; ".join(f"{kind} {_pm(pair, 4)}" for kind, pair in flow["twice_the_steps"].items())
    every = "in every image" if flow["above_in_every_image"] else "but not in every image"
    return (
        f"{flow['images']} of the test images, the bound by {flow['terms']} terms. Both give the rate of x "
        "at timestep 0. The bound's terms above t = 0 are at least the divergence of the forward process's x "
        "there from the model's; the flow gives that divergence from the log density of Song et al. 2021, "
        f"eq. 39, with the same network and clipping, in {flow['steps']} steps of Heun's method. Bound minus "
        f"flow: {_pm(flow['rate_above_flow'])} on average, above zero {every}. In theory it is above zero as "
        "far as the chain's marginals are the flow's, because each step of a finite chain is priced by the "
        "error at its noisier end. In ever finer steps, the same errors give the second row "
        "(½ ∫ E‖x₀ − x̂₀‖² dSNR, Kingma et al. 2021), and that minus the flow is "
        f"{_pm(flow['finer_above_flow'])}. Uniform dequantisation measures something else: the density at "
        "the noise of timestep 0, which is wider than a grey level, at pixels without that noise, and "
        "without the decoder, which knows where the levels end. So it may lie on either side of the bound. "
        f"Doubling the steps changes the flow's bits by (first {flow['checked']} images) {twice}."
    )


def _flow_table(flow: Mapping[str, Any]) -> str:
    rows = (
        ("x at timestep 0: the bound's terms above it", "rate"),
        ("the same in ever finer steps", "finer"),
        ("the same by the flow", "flow_rate"),
        ("from there to the image: the decoder, L_0", "decoder"),
        ("whole: the bound", "bound"),
        ("whole: the flow, then the decoder", "flow_with_decoder"),
        ("whole: the flow with uniform dequantisation", "flow_uniform"),
    )
    return "\n".join(
        ["| | bits/dim |", "|---|--:|", *(f"| {name} | {_pm(flow[key])} |" for name, key in rows)]
    )
