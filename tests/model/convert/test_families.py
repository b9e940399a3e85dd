from __future__ import annotations

import pytest
import torch
from torch import nn

from model.convert.conversion import ConversionError
from model.convert.families import FAMILIES, REFUSED, Refused, recognise
from model.unet import UNet, UNetConfig
from tests.model.conftest import TINY
from tests.model.convert.references import HoNet, OpenAINet

W = torch.zeros(1)


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (OpenAINet(heads=1), "guided-diffusion or improved-diffusion"),
        (HoNet(), "DDPM (Ho et al. 2020)"),
        (UNet(UNetConfig(**TINY)), "diffusers' UNet2DModel"),
    ],
)
def test_a_family_is_told_by_its_names(net: nn.Module, name: str) -> None:
    state = net.state_dict()
    assert (recognise(state)[0].name, recognise(state)[1]) == (name, [""])
    wrapped = {f"model.module.{key}": tensor for key, tensor in state.items()}
    assert (recognise(wrapped)[0].name, recognise(wrapped)[1]) == (name, ["model.module."])


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_a_family_that_is_not_converted_is_named(refused: Refused) -> None:
    table = {f"ema.ema_model.model.{name}": W for name in refused.anchors}
    with pytest.raises(ConversionError) as caught:
        recognise(table)
    assert str(caught.value) == f"{refused.name}: {refused.reason}"


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(
        ConversionError, match=r"no known network: its weights begin with encoder.0 \(known: "
    ):
        recognise({"encoder.0": W})
    with pytest.raises(ConversionError, match="begin with nothing"):
        recognise({})


def test_no_two_families_are_told_by_the_same_names() -> None:
    for one in FAMILIES:
        for other in FAMILIES:
            assert one is other or not set(one.anchors) <= set(other.anchors)
