"""The U-Nets of denoising-diffusion-pytorch (P. Wang) from its version 2 on, as its `Trainer` saves them.

The network stays the package's (model/denoising_diffusion.py), so the weights keep their names. The noise
schedule is among the buffers of its `GaussianDiffusion`, and so is the weight of each timestep in the loss,
which tells what the network predicts. A file of the network alone has neither.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.convert.conversion import Choices, Conversion, ConversionError, State, indices
from model.convert.source import weights_at
from model.denoising_diffusion import PACKAGE, DenoisingDiffusionConfig
from model.schedule import Array, cosine_betas, linear_betas
from model.unet_config import ConfigError

FAMILY = f"{PACKAGE}'s Unet"
DEFAULT = "the package's default"
NETWORK = ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight")
"""Anchors of the network alone."""
ANCHORS = tuple(f"model.{name}" for name in NETWORK)
"""Anchors of the `GaussianDiffusion` around it."""
BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "loss_weight",
    "p2_loss_weight",
}
"""What its `GaussianDiffusion` keeps beside the network."""


def convert(state: State, choices: Choices) -> Conversion:
    """A state dict of `GaussianDiffusion` or `LearnedGaussianDiffusion`, or of their network below `model.`.

    Raises ConversionError for the package's other networks and processes, and for those before version 2.
    """
    network = weights_at(state, "model.")
    for name in state.keys() - {f"model.{own}" for own in network} - BUFFERS:
        raise ConversionError(f"{FAMILY}: {name} is nothing that its GaussianDiffusion is known to have")
    config = _config(network, choices)
    learned, conditional = config.learned_variance, config.num_classes is not None
    betas = state["betas"].double().numpy() if "betas" in state else _betas(choices, conditional=conditional)
    if learned:  # its mean is that of an ε prediction, whatever the objective
        prediction_type = "epsilon"
    elif "loss_weight" in state:
        prediction_type = _predicted(state["loss_weight"], betas, choices)
    else:
        prediction_type = choices.choose(
            "prediction_type", "epsilon" if conditional else "v_prediction", DEFAULT
        )
    scheduler: dict[str, Any] = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": prediction_type,
        "variance_type": "learned_range" if learned else "fixed_small",
        "clip_sample": True,
        "timestep_spacing": "trailing",  # its DDIM begins at the last timestep
    }
    if (data_range := choices.given("data_range")) is not None:  # it was trained with auto_normalize=False
        scheduler["data_range"] = list(data_range)
    weights = {f"model.{name}": tensor for name, tensor in network.items()}
    if config.num_classes is None:
        return Conversion(FAMILY, config.to_diffusers(), weights, scheduler)
    null_class = weights.pop("model.null_classes_emb")
    weights["model.classes_emb.weight"] = torch.cat((weights["model.classes_emb.weight"], null_class[None]))
    labels = {str(i): str(i) for i in range(config.num_classes)}
    return Conversion(FAMILY, config.to_diffusers(), weights, scheduler, labels)


def convert_network(state: State, choices: Choices) -> Conversion:
    """A state dict of the network alone. Raises ConversionError as `convert` does."""
    return convert({f"model.{name}": tensor for name, tensor in state.items()}, choices)


def _config(state: State, choices: Choices) -> DenoisingDiffusionConfig:
    """The options of the network, from the shapes of its weights."""
    first = state["init_conv.weight"]
    if first.ndim != 4:
        raise ConversionError(f"{FAMILY}: a network of {first.ndim - 2} dimensions, not of pictures")
    if "time_mlp.0.weights" in state:
        raise ConversionError(
            f"{FAMILY}: learned_sinusoidal_cond or random_fourier_features: it takes noise levels (as of "
            "ElucidatedDiffusion), where this service has timesteps"
        )
    if "downs.0.0.block1.norm.g" not in state:
        raise ConversionError(f"{FAMILY}: of a version before 2.0, which is another network under this name")
    inputs, outputs = first.shape[1], len(state["final_conv.weight"])
    if inputs == 2 * outputs:
        raise ConversionError(
            f"{FAMILY}: self_condition=True: that it takes its last prediction beside the picture is not "
            "supported"
        )
    if outputs not in (inputs, 2 * inputs):
        raise ConversionError(f"{FAMILY}: {outputs} channels come out where {inputs} go in")
    dim = state["time_mlp.1.weight"].shape[1]
    widths = [_width(state, level) for level in indices(state, r"downs\.(\d+)\.")]
    if any(width % dim for width in widths):
        raise ConversionError(f"{FAMILY}: widths of {widths} are no multiples of dim={dim}")
    size = choices.need("sample_size", f"{FAMILY}: the size of its images is not in the file")
    try:
        return DenoisingDiffusionConfig(
            dim=dim,
            sample_size=size,
            init_dim=len(first),
            dim_mults=tuple(width // dim for width in widths),
            channels=inputs,
            learned_variance=outputs == 2 * inputs,
            **_attention(state, len(widths), choices),
        )
    except ConfigError as error:
        raise ConversionError(f"{FAMILY}: {error}") from error


def _width(state: State, level: int) -> int:
    """Of the level's last convolution, behind a rearrangement or not."""
    last = f"downs.{level}.3"
    return len(state[f"{last}.1.weight" if f"{last}.1.weight" in state else f"{last}.weight"])


def _attention(state: State, levels: int, choices: Choices) -> dict[str, Any]:
    """The options in which the two networks differ."""
    if "classes_emb.weight" in state:
        inner = len(state["mid_attn.fn.fn.to_qkv.weight"]) // 3
        heads = choices.choose("num_heads", 4, f"{DEFAULT}; only heads times their size show in the file")
        if inner % heads:
            raise ConversionError(f"{FAMILY}: --num-heads {heads} does not divide {inner}, heads times size")
        return {
            "num_classes": len(state["classes_emb.weight"]),
            "attn_heads": heads,
            "attn_dim_head": inner // heads,
        }
    full = tuple(f"downs.{level}.2.to_out.weight" in state for level in range(levels))
    shapes = [state[f"downs.{level}.2.mem_kv"].shape for level in range(levels)]
    return {
        "full_attn": full,
        "attn_heads": tuple(shape[1] for shape in shapes),
        # Keys and values in memory, [2, heads, number, size] where attention is full, else turned.
        "attn_dim_head": tuple(shape[3 if whole else 2] for shape, whole in zip(shapes, full, strict=True)),
        "sinusoidal_pos_emb_theta": choices.choose("sinusoidal_pos_emb_theta", 10_000, DEFAULT),
    }


def _betas(choices: Choices, *, conditional: bool) -> Array:
    """The noise schedule that the command line says, by the package's own formulas."""
    timesteps = choices.choose("num_train_timesteps", 1000, DEFAULT)
    match choices.choose("beta_schedule", "squaredcos_cap_v2" if conditional else "sigmoid", DEFAULT):
        case "squaredcos_cap_v2":
            return cosine_betas(timesteps)
        case "linear":
            return linear_betas(timesteps, 0.1 / timesteps, 20 / timesteps)
        case "sigmoid":
            return sigmoid_betas(timesteps)
        case other:
            raise ConversionError(f"{FAMILY}: it has no schedule {other}")


def sigmoid_betas(timesteps: int) -> Array:
    """β from an ᾱ that falls as a sigmoid from −3 to 3 does (Jabri et al. 2022, figure 8). Returns [T]."""
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    falling = 1 / (1 + np.exp(np.linspace(-3, 3, timesteps + 1)))
    alphas_cumprod = (falling - low) / (high - low)
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def _predicted(weight: Tensor, betas: Array, choices: Choices) -> str:
    """What the network predicts: as its loss is weighted, or where that does not tell, as is given."""
    given, found = choices.given("prediction_type"), _weighted_as(weight.double().numpy(), betas)
    if found is None:
        why = f"{FAMILY}: the weights of its loss do not tell what it predicts, its objective"
        return str(choices.need("prediction_type", why))
    if given not in (None, found):
        raise ConversionError(f"{FAMILY}: --prediction-type {given}: by its loss it was trained for {found}")
    return found


def _weighted_as(weight: Array, betas: Array) -> str | None:
    """The prediction whose loss has these weights, [T]: min(SNR, γ) over a factor (Hang et al. 2023)."""
    alphas_cumprod = np.cumprod(1 - betas)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    for kind, factor in (("epsilon", snr), ("sample", np.ones_like(snr)), ("v_prediction", snr + 1)):
        clipped = weight * factor
        if np.allclose(clipped, np.minimum(snr, clipped.max()), rtol=1e-3, atol=0):
            return kind
    return None
