"""What a student is: a network with a schedule of its own, of as many timesteps as it needs.

A student is only ever evaluated at N noise levels. So its folder has T = N, and the ᾱ of these levels as
`trained_betas`: N steps of DDIM on that schedule visit each of them, in diffusers as here, and fewer steps
visit some of them (with N = 4, two steps the first and the third). It predicts v, since ε says nothing of x₀
at the highest level, where √ᾱ is 1/150 or so, and x₀ little of the noise at the lowest.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoint import Checkpoint
from model.denoising_diffusion import DenoisingDiffusionUnet
from model.network import Network
from model.schedule import Array, NoiseSchedule
from model.unet import ConfigError, UNet

POWER = 1.5
"""Levels lie evenly in t^(1/POWER): closer together towards the image, where its shapes are decided."""


def default_timesteps(total: int, steps: int) -> tuple[int, ...]:
    """`steps` of the teacher's `total` timesteps, falling from the highest: the student's levels.

    Raises ConfigError where there are not as many.
    """
    if not 1 <= steps <= total:
        raise ConfigError(f"a teacher of {total} timesteps has no student of {steps}")
    shares = (np.arange(steps, 0, -1) / steps) ** POWER
    apart = np.maximum(np.round(total * shares).astype(int), np.arange(steps, 0, -1))
    return tuple(int(t) - 1 for t in apart)


def scheduler_config(
    schedule: NoiseSchedule, timesteps: Sequence[int], guidance_scale: float
) -> dict[str, Any]:
    """A student's `scheduler_config.json`: the levels of a teacher's falling timesteps, and DDIM.

    guidance_scale: what is folded in, as `distilled_guidance`, by which a student is known. It is ours, like
    `data_range`; diffusers ignores both. Raises ConfigError for timesteps that do not fall within [0, T).
    """
    levels = np.asarray(timesteps, np.int64)
    if not len(levels) or (np.diff(levels) >= 0).any() or levels[-1] < 0 or levels[0] >= schedule.timesteps:
        raise ConfigError(
            f"levels must fall strictly within [0, {schedule.timesteps}), and are {list(timesteps)}"
        )
    ac = schedule.alphas_cumprod[levels[::-1]]
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(levels),
        "trained_betas": [float(beta) for beta in 1 - ac / np.append(1.0, ac[:-1])],
        "prediction_type": "v_prediction",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "distilled_guidance": guidance_scale,
    }
    if schedule.data_range != (-1.0, 1.0):
        config["data_range"] = list(schedule.data_range)
    return config


def begin(teacher: Checkpoint, timesteps: Sequence[int], guidance_scale: float) -> Checkpoint:
    """A student that has learned nothing yet: the teacher's network, told its levels as 0 … N − 1.

    Raises ConfigError for a teacher that cannot have one.
    """
    if teacher.condition:
        raise ConfigError(
            f"a network that takes {' and '.join(teacher.condition)} beside x cannot be distilled here"
        )
    config = scheduler_config(teacher.schedule, timesteps, guidance_scale)
    schedule = NoiseSchedule.from_diffusers(config)
    unet = _without_variance(teacher)
    scaled = torch.tensor(timesteps[::-1], dtype=torch.float32) * teacher.schedule.timestep_scale
    renumber(unet, scaled)
    try:
        unet.config.check_timesteps(schedule.timesteps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return replace(
        teacher,
        unet=unet,
        schedule=schedule,
        scheduler_config=config,
        typicality=None,
        classifier=None,
        self_test=None,
        checksum="",
    )


def with_weights(student: Checkpoint, other: Checkpoint) -> Checkpoint:
    """The student with another's weights. Raises ConfigError where that has other levels or another shape."""
    same = student.schedule.timesteps == other.schedule.timesteps
    if not same or not np.allclose(student.schedule.alphas_cumprod, other.schedule.alphas_cumprod):
        raise ConfigError(f"{other.name}: not a student of the same levels")
    try:
        student.unet.load_state_dict(other.unet.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"{other.name}: another network than the teacher's") from error
    return student


@torch.no_grad()
def renumber(net: Network, timesteps: Tensor) -> None:
    """Have a network see `timesteps` [N] where it is given 0 … N − 1, by the layer behind their features.

    Of all weights that do so, those nearest to what is there: W ← W + W (F − F′) F′⁺ with F, F′ [D, N] the
    features of both. Raises ConfigError for a network that has no features of 0, or too few of them.
    """
    if getattr(net.config, "time_embedding_type", None) == "fourier":
        raise ConfigError("a network with Fourier features has no value at timestep 0")
    layer = _first_layer(net)
    features = net.split().features
    y = torch.zeros(len(timesteps), dtype=torch.int64) if net.config.conditional else None
    wanted, given = (
        features(t, y)[0].double().T for t in (timesteps, torch.arange(len(timesteps)).to(timesteps))
    )
    if torch.linalg.matrix_rank(given) < len(timesteps):
        raise ConfigError(f"{len(timesteps)} levels are more than its {len(given)} features can tell apart")
    weight = layer.weight.double()
    layer.weight.copy_(weight + weight @ (wanted - given) @ torch.linalg.pinv(given))


def _first_layer(net: Network) -> nn.Linear:
    if isinstance(net, UNet):
        return net.time_embedding.linear_1
    assert isinstance(net, DenoisingDiffusionUnet)
    return cast("nn.Linear", cast("nn.Sequential", net.model.time_mlp)[1])


def _without_variance(teacher: Checkpoint) -> Network:
    """A copy of the teacher's network with as many outputs as inputs: DDIM needs no variance."""
    net, channels = teacher.unet, teacher.shape[0]
    if net.config.out_channels == channels:
        return deepcopy(net)
    if not isinstance(net, UNet):
        raise ConfigError("a network of this family that predicts a variance cannot be distilled")
    unet = UNet(replace(net.config, out_channels=channels)).eval()
    state = net.state_dict()
    unet.load_state_dict(
        {name: value[:channels] if name.startswith("conv_out.") else value for name, value in state.items()}
    )
    return unet


def v_target(schedule: NoiseSchedule, x: Tensor, level: Tensor, end: Tensor) -> Tensor:
    """The v for which one step of DDIM from x at `level` lands on `end` at the level below.

    x′ = √ᾱ′ x₀ + √(1 − ᾱ′) (x − √ᾱ x₀) / √(1 − ᾱ), solved for x₀ (Salimans & Ho 2022, algorithm 2), and
    v = (√ᾱ x − x₀) / √(1 − ᾱ). x, end: [B, C, H, W]; level: [B] int64 in [0, N), below 0 the image itself.
    """
    a_x, a_end = target_coefficients(schedule)
    shape = (-1, 1, 1, 1)
    of_x, of_end = (torch.as_tensor(a)[level].view(shape) for a in (a_x, a_end))
    return (of_x * x.double() + of_end * end.double()).to(x.dtype)


def landing_weights(schedule: NoiseSchedule) -> Array:
    """What a squared error of v is worth at each level, 1 on average: [N].

    In proportion to the squared error of where the step lands, which is that of v times `a_end`^-2. At the
    highest level hardly anything of x₀ is in x′, and to be exact about it would cost most of the effort.
    """
    _, a_end = target_coefficients(schedule)
    weights = np.square(1 / a_end)
    return np.asarray(weights / weights.mean())


def target_coefficients(schedule: NoiseSchedule) -> tuple[Array, Array]:
    """(a_x, a_end), each [N]: v = a_x·x + a_end·end of `v_target`."""
    ac, after = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    alpha, sigma, alpha_end, sigma_end = np.sqrt(ac), np.sqrt(1 - ac), np.sqrt(after), np.sqrt(1 - after)
    ratio = sigma_end / sigma
    scale = alpha_end - ratio * alpha  # x₀ = (end − ratio·x) / scale
    return (alpha + ratio / scale) / sigma, -1 / (scale * sigma)
