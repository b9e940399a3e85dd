from __future__ import annotations

from typing import Any

import pytest
import torch

from model.convert import ddpm
from model.convert.conversion import Choices, ConversionError
from tests.model.convert.conftest import T, converted, diffusers_net, noisy, randomised
from tests.model.convert.references import HoNet


def reference(**options: Any) -> HoNet:
    net = HoNet(**options).eval()
    randomised(net, net.conv_in)
    return net


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"multiples": (1, 2, 2), "attention": (1,), "layers": 2},
        {"multiples": (1, 1, 2), "attention": (), "channels": 1},
        {"downsample": "op"},
    ],
)
def test_the_network_computes_the_same(options: dict[str, Any]) -> None:
    net = reference(**options)
    found = converted(ddpm.convert, net)
    x = noisy(options.get("channels", 3))
    with torch.inference_mode():
        torch.testing.assert_close(diffusers_net(found)(x, T).sample, net(x, T), atol=1e-4, rtol=0)


def test_its_schedule_is_that_of_the_paper() -> None:
    choices = Choices()
    found = ddpm.convert(dict(reference(multiples=(1, 2, 2, 2)).state_dict()), choices)
    assert found.unet["sample_size"] == 32
    assert found.scheduler["variance_type"] == "fixed_large"  # as for CIFAR-10
    assert (found.scheduler["beta_start"], found.scheduler["beta_end"]) == (1e-4, 0.02)
    assert {"sample_size", "beta_schedule", "variance_type"} <= choices.assumed.keys()
    large = ddpm.convert(
        dict(reference(multiples=(1, 1, 2, 2, 4, 4), attention=(4,)).state_dict()), Choices()
    )
    assert (large.unet["sample_size"], large.scheduler["variance_type"]) == (256, "fixed_small")


def test_an_option_that_means_nothing_here_is_refused() -> None:
    with pytest.raises(ConversionError, match="--num-heads means nothing for a checkpoint of DDPM"):
        converted(ddpm.convert, reference(), num_heads=4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {n: t for n, t in s.items() if "downsample" not in n}, "resamp_with_conv=False"),
        (lambda s: s | {"logvar": torch.zeros(1000)}, "logvar is a weight that"),
        (lambda s: s | {"conv_in.weight": torch.zeros(64, 3, 3, 3)}, "64 channels, its first level 32"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: Any, reason: str) -> None:
    with pytest.raises(ConversionError, match=reason):
        ddpm.convert(change(dict(reference().state_dict())), Choices({"sample_size": (8, 8)}))
