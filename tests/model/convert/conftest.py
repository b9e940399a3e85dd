"""Compare a conversion with the network it was made from, on random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from model.convert.conversion import Choices, Conversion, State
from tests.model.conftest import randomise

T = torch.tensor([0, 417, 999])


def randomised(net: nn.Module, first: nn.Module) -> None:
    """Random weights everywhere, so that no part of the network is without effect on the output.

    first: the first convolution. Its output is faint, so a norm's ε shows. Attention is sharp, so heads show.
    """
    randomise(net)
    for parameter in first.parameters():
        parameter.data.mul_(1e-3)
    for name, parameter in net.named_parameters():
        if re.search(r"\.(qkv|to_[qkv]|[qkv])\.", name):
            parameter.data.mul_(4)


def converted(family: Callable[[State, Choices], Conversion], net: nn.Module, **given: Any) -> Conversion:
    """What the family makes of a network's weights; every option given must be one that it asks for."""
    choices = Choices({"sample_size": (8, 8)} | given)
    found = family(dict(net.state_dict()), choices)
    choices.check_all_used(found.family)
    return found


def diffusers_net(found: Conversion) -> UNet2DModel:
    """The converted network, run by diffusers."""
    config = {name: value for name, value in found.unet.items() if not name.startswith("_")}
    net = UNet2DModel(**config).eval()
    net.load_state_dict(dict(found.weights))
    return net


def noisy(channels: int) -> Tensor:
    """Three inputs of 8×8."""
    return torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(5))
