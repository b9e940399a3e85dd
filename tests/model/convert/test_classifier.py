from __future__ import annotations

from typing import Any

import pytest
import torch

from model.convert import classifier
from model.convert.conversion import Choices, ConversionError
from model.encoder import EncoderConfig, NoiseClassifier
from tests.model.convert.conftest import T, noisy, randomised
from tests.model.convert.references import OpenAIEncoder


def reference(**options: Any) -> OpenAIEncoder:
    defaults: dict[str, Any] = {
        "head_channels": 32,
        "resblock_updown": True,
        "layers": 2,
        "multiples": (1, 2),
    }
    net = OpenAIEncoder(8, 5, **(defaults | options)).eval()
    randomised(net, net.input_blocks[0])
    return net


def convert(net: OpenAIEncoder, **given: Any) -> NoiseClassifier:
    choices = Choices({"num_head_channels": 32} | given)
    found = classifier.convert(dict(net.state_dict()), choices)
    choices.check_all_used(found.family)
    ours = NoiseClassifier(EncoderConfig.from_dict(found.config)).eval().requires_grad_(False)
    ours.load_state_dict(found.weights)
    return ours


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        ({"multiples": (1, 2, 2), "attention": (1, 2), "layers": 4}, {}),
        ({"resblock_updown": False, "scale_shift": False}, {}),
        ({"attention": (), "multiples": (1, 2, 3)}, {}),
        ({"pool": "adaptive", "layers": 3}, {"sample_size": (8, 8)}),
    ],
)
def test_the_classifier_computes_the_same(options: dict[str, Any], given: dict[str, Any]) -> None:
    net = reference(**options)
    ours, x = convert(net, **given), noisy(3)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, T), net(x, T), atol=1e-4, rtol=0)
    y = torch.tensor([0, 3, 4])
    x.requires_grad_()
    log_p = torch.log_softmax(net(x, T), dim=1).gather(1, y[:, None]).sum()
    (expected,) = torch.autograd.grad(log_p, x)
    torch.testing.assert_close(ours.gradient(x.detach(), T, y), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("size", "multiples", "layers", "attention"),
    [
        (64, (1, 2, 3, 4), 4, (1, 2, 3)),
        (128, (1, 1, 2, 3, 4), 2, (2, 3, 4)),
        (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5)),
    ],
)
def test_published_classifiers_need_no_options(
    size: int, multiples: tuple[int, ...], layers: int, attention: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        net = OpenAIEncoder(
            size,
            1000,
            width=128,
            multiples=multiples,
            layers=layers,
            attention=attention,
            head_channels=64,
            resblock_updown=True,
        )
    found = classifier.convert(dict(net.state_dict()), Choices()).config
    assert (found["sample_size"], found["layers_per_block"], found["attention_head_dim"]) == (
        size,
        layers,
        64,
    )
    kinds = found["down_block_types"]
    assert [level for level, kind in enumerate(kinds) if kind == "AttnDownBlock2D"] == list(attention)
    assert found["block_out_channels"] == [128 * multiple for multiple in multiples]


def test_it_is_for_images_of_the_size_that_its_positions_make() -> None:
    assert convert(reference(multiples=(1, 2, 2))).config.sample_size == (8, 8)
    with pytest.raises(ConversionError, match="give --sample-size"):
        convert(reference(pool="adaptive"))


def test_what_cannot_be_represented_is_refused() -> None:
    state = dict(reference().state_dict())
    without = {name: tensor for name, tensor in state.items() if not name.startswith("out.")}
    for changed, reason in (
        (without | {"out.2.weight": torch.zeros(5, 2048)}, "classifier_pool=spatial"),
        (state | {"input_blocks.2.1.qkv.weight": torch.zeros(96, 32, 1)}, "no number of residual blocks"),
        (state | {"other": torch.zeros(1)}, "other is a weight that"),
        (state | {"time_embed.0.weight": torch.zeros(128, 64)}, "differ in width"),
    ):
        with pytest.raises(ConversionError, match=reason):
            classifier.convert(changed, Choices({"num_head_channels": 32}))


def test_a_depth_that_nothing_tells_is_not_guessed() -> None:
    net = reference(multiples=(1, 1, 1, 1), attention=(), layers=2, pool="adaptive")
    with pytest.raises(
        ConversionError, match=r"1, 2, 3, 5, 11 residual blocks per level are possible: give --lay"
    ):
        convert(net, sample_size=(8, 8))
    ours = convert(net, sample_size=(8, 8), layers_per_block=2)
    with torch.inference_mode():
        torch.testing.assert_close(ours(noisy(3), T), net(noisy(3), T), atol=1e-4, rtol=0)
    with pytest.raises(ConversionError, match="no number of residual blocks"):
        convert(net, sample_size=(8, 8), layers_per_block=4)
