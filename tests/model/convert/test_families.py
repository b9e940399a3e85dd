from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from model.convert.conversion import Choices, ConversionError
from model.convert.families import FAMILIES, REFUSED, Refused, recognise
from model.unet import UNet, UNetConfig
from tests.matrix import monai
from tests.model import denoising_diffusion as package
from tests.model.conftest import TINY
from tests.model.convert.references import HoNet, OpenAIEncoder, OpenAINet
from tests.model.convert.test_monai_classifier import reference as monai_classifier

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


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "OpenAI": (lambda: OpenAINet(heads=4), {}),
    "OpenAI's classifier": (
        lambda: OpenAIEncoder(8, 5, head_channels=32, resblock_updown=True),
        {"num_head_channels": 32},
    ),
    "DDPM": (HoNet, {}),
    "MONAI": (monai(), {"num_head_channels": 8, "norm_num_groups": 4}),
    "MONAI's classifier": (monai_classifier, {"num_head_channels": 8, "norm_num_groups": 4}),
    "denoising-diffusion-pytorch": (lambda: package.diffusion(package.network()), {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_incomplete_or_of_other_shapes_is_refused(name: str) -> None:
    """Or made anyway, where that tensor does not matter here: what does not load is not written."""
    make, given = NETWORKS[name]
    state = dict(make().state_dict())
    family, _ = recognise(state)
    choices = {"sample_size": (8, 8), **given}
    family.convert(state, Choices(choices))
    reasons = []
    for key in state:
        for changed in (None, torch.tensor(1.0), torch.zeros(0), state[key].unsqueeze(-1)):
            others = {other: tensor for other, tensor in state.items() if other != key}
            try:
                family.convert(others if changed is None else {**others, key: changed}, Choices(choices))
            except ConversionError as error:
                reasons.append(str(error))
    assert len(reasons) > 20
    assert not any("\n" in reason for reason in reasons)
