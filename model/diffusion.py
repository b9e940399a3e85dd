"""The forward process, its posterior, and the training objectives of Ho et al. 2020.

Everything takes one timestep per row. Coefficients are looked up in float64 and cast to the
dtype of x at the end.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.schedule import DATA_RANGE, Array, DataRange, NoiseSchedule, VarianceType

Objective = Literal["simple", "min_snr", "debiased", "vlb"]
OBJECTIVES: tuple[Objective, ...] = ("simple", "min_snr", "debiased", "vlb")
MIN_SNR_GAMMA = 5.0
"""The signal-to-noise ratio above which timesteps count no more (Hang et al. 2023, §3.4)."""
VLB_WEIGHT = 0.001
"""Of L_vlb in L_hybrid (Nichol & Dhariwal 2021, §3.1)."""


def _at(values: Array, t: Tensor, x: Tensor) -> Tensor:
    """values[t] shaped to multiply x: [B, 1, 1, 1]."""
    picked = torch.as_tensor(values, device=t.device)[t].to(x.dtype)
    return picked.view(-1, *[1] * (x.ndim - 1))


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4).

    x0, eps: [B, C, H, W], x0 in the schedule's data range; t: [B] int64 in [0, T). Returns [B, C, H, W].
    """
    ac = schedule.alphas_cumprod
    return _at(ac**0.5, t, x0) * x0 + _at((1 - ac) ** 0.5, t, x0) * eps


def predict_x0(schedule: NoiseSchedule, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """The x₀ prediction that the output implies, unclipped: eq. 15 for ε, 7 for μ̃; Salimans & Ho 2022 for v.

    x, out: [B, C, H, W]; t: [B] int64. Returns [B, C, H, W].
    """
    a_x, a_o = schedule.x0_coefficients
    return _at(a_x, t, x) * x + _at(a_o, t, x) * out


def network_timesteps(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """What the network is given for timesteps t, both [B]: t itself, or its multiple as float32."""
    return t if schedule.timestep_scale == 1 else t * schedule.timestep_scale


def bounded_x0(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """An x₀ prediction as in sampling: clipped, or thresholded dynamically. [B, C, H, W] → the same."""
    bound = torch.as_tensor(schedule.clip, dtype=x0.dtype, device=x0.device)
    if not schedule.dynamic_thresholding_ratio:
        return x0.clamp(-bound, bound)
    bound = dynamic_threshold(
        x0, torch.full_like(x0[:, :1, :1, :1], schedule.dynamic_thresholding_ratio), bound
    )
    return x0.clamp(-bound, bound) / bound


def guided_output(given: Tensor, unconditional: Tensor, scale: Tensor, rescale: Tensor | None) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022), and its rescaling (Lin et al. 2024, §3.4, eq. 14 to 16).

    given: [B, C, H, W] with the class. scale: 1 is none. rescale: how far each gets the deviation of `given`,
    which guidance raises and so exaggerates colours; None for all 0. Both [B, 1, 1, 1].
    """
    out = unconditional + scale * (given - unconditional)
    if rescale is None:
        return out
    ratio = given.std((1, 2, 3), keepdim=True) / out.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
    return out * (rescale * ratio + (1 - rescale))


def dynamic_threshold(x0: Tensor, ratio: Tensor, most: Tensor) -> Tensor:
    """What bounds each sample's x₀ prediction: its `ratio`-quantile of |x₀|, at least 1 and at most `most`.

    Saharia et al. 2022, §2.3; the sample is divided by it afterwards. Where the ratio is 0, it is `most`. No
    row depends on another, and no shape on a value. x0: [B, C, H, W]; ratio: [B, 1, 1, 1]; most: the same, or
    of one element. Returns [B, 1, 1, 1].
    """
    ordered = x0.abs().flatten(1).sort(dim=1).values
    place = ratio.flatten() * (ordered.shape[1] - 1)
    below, above = (ordered.gather(1, end.long()[:, None]) for end in (place.floor(), place.ceil()))
    quantile = torch.lerp(below, above, (place - place.floor())[:, None])[..., None, None]
    return torch.where(ratio > 0, torch.minimum(quantile.clamp(min=1), most), most)


def training_target(schedule: NoiseSchedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the network should output at x_t: ε, √ᾱ ε − √(1 − ᾱ) x₀, x₀, or the mean μ̃. [B, C, H, W]."""
    ac = schedule.alphas_cumprod
    match schedule.prediction_type:
        case "epsilon":
            return eps
        case "v_prediction":
            return _at(ac**0.5, t, x0) * eps - _at((1 - ac) ** 0.5, t, x0) * x0
        case "sample":
            return x0
        case "posterior_mean":
            return q_posterior(schedule, x0, q_sample(schedule, x0, t, eps), t)[0]


def stratified_timesteps(batch: int, timesteps: int, rng: torch.Generator) -> Tensor:
    """Uniform timesteps, one in each of `batch` equal strata: the same mean, with less variance.

    Kingma et al. 2021, §I.1. Returns [batch] int64 in [0, timesteps), in random order.
    """
    device = rng.device
    offset = torch.rand(1, generator=rng, device=device)
    strata = torch.randperm(batch, generator=rng, device=device)
    return ((strata + offset) / batch * timesteps).long().clamp(max=timesteps - 1)


def objective(
    schedule: NoiseSchedule,
    kind: Objective,
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    out: Tensor,
) -> Tensor:
    """The loss of each row: [B] float32.

    *min_snr* weights the squared error of the x₀ prediction by min(ᾱ/(1 − ᾱ), 5) (Hang et al. 2023,
    eq. 8), whatever the network predicts: with ε that is L_simple with less weight on the least noisy steps.
    *debiased* weights it by √(ᾱ/(1 − ᾱ)) (Yu et al. 2024): with ε, L_simple by √((1 − ᾱ)/ᾱ), so that the
    noisy steps, at which shapes and classes are decided, count for more.
    *simple* is L_simple, and for a network that learns its variance L_hybrid = L_simple + 0.001 L_vlb, where
    the bound moves the variance alone, the mean being detached (Nichol & Dhariwal 2021, eq. 16). *vlb* is the
    bound's own term at t, in bits per dimension: its weight of the squared error is β²/(2σ²α(1 − ᾱ)) for ε
    (Ho et al. 2020, eq. 12). Nothing is clipped there, because a clipped x₀ prediction has no gradient.
    x0, x, eps: [B, C, H, W], x being `q_sample`'s; out: [B, C or 2C, H, W], the network's at (x, t).
    """
    mean, *rest = torch.split(out.float(), x0.shape[1], dim=1)
    log_variance = learned_log_variance(schedule, t, rest[0]) if schedule.learned_variance else None
    if kind == "vlb":
        x0_pred = predict_x0(schedule, x, t, mean)
        return vlb_terms(schedule, x0, x0_pred, t, schedule.variance_type, log_variance).float()
    simple = l_simple(training_target(schedule, x0, t, eps), mean)
    if kind in ("min_snr", "debiased"):
        simple = simple * snr_weight(schedule, kind, t).to(simple)
    if log_variance is None:
        return simple
    x0_pred = bounded_x0(schedule, predict_x0(schedule, x, t, mean.detach()))
    terms = vlb_terms(schedule, x0, x0_pred, t, schedule.variance_type, log_variance)
    return simple + VLB_WEIGHT * schedule.timesteps * terms.float()


def snr_weight(schedule: NoiseSchedule, kind: Objective, t: Tensor) -> Tensor:
    """What *min_snr* or *debiased* weights the network's squared error by: [B] int64 → [B] float64."""
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    _, a_o = schedule.x0_coefficients  # an error e of the output is one of a_o·e of the x₀ prediction
    of_x0 = np.minimum(snr, MIN_SNR_GAMMA) if kind == "min_snr" else np.sqrt(snr)
    return torch.as_tensor(of_x0 * a_o**2, device=t.device)[t]


def l_simple(target: Tensor, out: Tensor) -> Tensor:
    """‖target − out‖² averaged per row (Ho et al. 2020, eq. 14). [B, C, H, W] twice → [B] float32."""
    return (target.float() - out.float()).square().flatten(1).mean(1)


def q_posterior(schedule: NoiseSchedule, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t−1} | x_t, x_0) (Ho et al. 2020, eq. 6 and 7).

    x0, x: [B, C, H, W]; t: [B] int64. Returns the mean [B, C, H, W] and the variance [B, 1, 1, 1].
    """
    c_0, c_x = schedule.posterior_weights
    mean = _at(c_0, t, x) * x0 + _at(c_x, t, x) * x
    return mean, _at(schedule.posterior_variance("fixed_small"), t, x)


def learned_log_variance(schedule: NoiseSchedule, t: Tensor, values: Tensor) -> Tensor:
    """Log σ² of p(x_{t−1} | x_t) of a network that learns it (Nichol & Dhariwal 2021, eq. 15).

    values: [B, C, H, W], the second half of the output: −1 for the small variance, 1 for the large one, or
    the logarithm itself where it is learned without a range. Returns [B, C, H, W] float64. At t = 0, where
    the small one is zero, the decoder's takes its place.
    """
    if schedule.variance_type == "learned":
        return values.double()
    small = schedule.posterior_variance("fixed_small").copy()
    small[0] = schedule.decoder_variance
    variance_frac = (values.double() + 1) / 2
    large = _at(np.log(schedule.betas), t, variance_frac)
    return variance_frac * large + (1 - variance_frac) * _at(np.log(small), t, variance_frac)


def vlb_terms(
    schedule: NoiseSchedule,
    x0: Tensor,
    x0_pred: Tensor,
    t: Tensor,
    variance: VarianceType,
    log_variance: Tensor | None = None,
) -> Tensor:
    """L_{t} of the variational bound in bits per dimension (Ho et al. 2020, eq. 5).

    For t > 0 the divergence of p(x_{t−1} | x_t) from the posterior; for t = 0 the discretised
    decoder's −log p(x_0 | x_1), eq. 13. Both depend on x_t through the x₀ prediction alone, since the
    two means share its term. x0: [B, C, H, W] exactly on the 256 levels of the data range; x0_pred: the
    network's x₀ at x_t, clipped as in sampling; t: [B] int64; log_variance: of each pixel, instead of the
    schedule's `variance`; a learned one without it is taken at its smallest. Returns [B] float64.
    """
    x0, x0_pred = x0.double(), x0_pred.double()
    off = _at(schedule.posterior_weights[0], t, x0) * (x0 - x0_pred)  # the difference of the means
    true_variance = _at(schedule.posterior_variance("fixed_small"), t, x0)
    # The decoder at t = 0 has one variance for both choices, as in the original code.
    variances = schedule.posterior_variance(variance).copy()
    variances[0] = schedule.decoder_variance
    model_variance = _at(variances, t, x0) if log_variance is None else log_variance.exp()

    ratio = true_variance / model_variance
    # where() keeps log(0) at t = 0 out of the result; that row takes the decoder's term.
    divergence = 0.5 * (torch.where(ratio > 0, ratio, 1.0).log().neg() + ratio - 1 + off**2 / model_variance)
    std = model_variance.sqrt()
    decoder = -discretised_gaussian_log_likelihood(x0, x0_pred, std, schedule.data_range)
    nats = torch.where(t.view(-1, *[1] * (x0.ndim - 1)) == 0, decoder, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def discretised_gaussian_log_likelihood(
    x: Tensor, mean: Tensor, std: Tensor, data_range: DataRange = DATA_RANGE
) -> Tensor:
    """Log p of 8-bit pixels scaled to data_range under a Gaussian integrated over each pixel's bin (eq. 13).

    x, mean: [B, C, H, W]; std broadcastable. The lowest and highest levels take the whole tail.
    Returns nats, [B, C, H, W].
    """
    low, high = data_range
    half = (high - low) / 2 / 255  # of a bin
    upper = torch.special.ndtr((x - mean + half) / std)
    lower = torch.special.ndtr((x - mean - half) / std)
    # Where the difference of two CDFs near 1 cancels, it is below the clamp.
    upper_tail = torch.special.ndtr(-(x - mean - half) / std)
    first, last = x < low + half / 4, x > high - half / 4
    probability = torch.where(first, upper, torch.where(last, upper_tail, upper - lower))
    return probability.clamp(min=1e-12).log()
