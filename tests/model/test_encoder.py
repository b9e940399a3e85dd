from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import checkpoint
from model.encoder import ROWS, EncoderConfig, NoiseClassifier
from model.unet import ConfigError
from tests.model.conftest import randomise, tiny_classifier

SHIPPED = Path(__file__).parents[2] / "weights" / "fashion-mnist"


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    x = 2 * torch.randn(rows, 1, 8, 8, generator=rng)
    return x, torch.randint(0, 1000, (rows,), generator=rng), torch.randint(0, 3, (rows,), generator=rng)


def log_p(net: NoiseClassifier, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.log_softmax(net(x, t), dim=1)[torch.arange(len(x)), y]


def test_the_gradient_is_how_log_p_changes() -> None:
    net, (x, t, y) = tiny_classifier(), batch(5)
    gradient = net.gradient(x, t, y)
    assert (gradient.shape, gradient.dtype, gradient.requires_grad) == (x.shape, torch.float32, False)
    rng = torch.Generator().manual_seed(0)
    for direction in (gradient, torch.randn(x.shape, generator=rng)):
        step = 0.03 * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        change = (log_p(net, x + step, t, y) - log_p(net, x - step, t, y)) / 2
        expected = (gradient * step).flatten(1).sum(1)
        torch.testing.assert_close(change, expected, rtol=0.03, atol=2e-5)
    assert not torch.allclose(net.gradient(x, t, (y + 1) % 3), gradient, rtol=0.1)


def test_the_timestep_matters() -> None:
    net, (x, t, _) = tiny_classifier(), batch(5)
    assert (net(x, t) - net(x, (t + 500) % 1000)).abs().max() > 1e-3


def test_a_rows_bits_depend_on_that_row_alone() -> None:
    net = tiny_classifier()
    shapes: list[int] = []
    net.register_forward_pre_hook(lambda _, given: shapes.append(len(given[0])))
    for rows in (1, 2, ROWS, ROWS + 1, 3 * ROWS - 1):
        x, t, y = batch(rows)
        together = net.gradient(x, t, y)
        assert len(together) == rows
        for i in range(rows):
            assert torch.equal(net.gradient(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i])
        assert torch.equal(net.gradient(x.flip(0), t.flip(0), y.flip(0)).flip(0), together)
    assert set(shapes) == {ROWS}, "torch promises the same bits at the same shape only"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_whatever_mode_it_is_called_in(mode: Any) -> None:
    net, (x, t, y) = tiny_classifier(), batch(3)
    expected = net.gradient(x, t, y)
    with mode():
        inputs = [values.clone() for values in (x, t, y)]  # inference tensors, in that mode
        found = net.gradient(*inputs)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert torch.equal(inputs[0], x)
    assert not inputs[0].requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_its_gradient_costs_a_small_part_of_the_network_it_guides() -> None:
    unet = checkpoint.load(SHIPPED).unet
    net = NoiseClassifier(EncoderConfig((32, 32), 1, 10)).requires_grad_(False)
    assert sum(parameter.numel() for parameter in net.parameters()) < 400_000
    x, t, y = torch.randn(8, 1, 32, 32), torch.arange(8), torch.arange(8)
    counts = []
    for call in (lambda: unet(x, t, y), lambda: net(x, t)):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    # The way back to the image costs as much again, and half as much as the network is what may be spent.
    assert 0.01 < 2 * counts[1] / counts[0] < 0.1


def test_its_pictures_need_not_be_square() -> None:
    config = EncoderConfig((8, 16), 4, 3, (8, 16, 16), norm_num_groups=4)
    assert EncoderConfig.from_dict(config.to_dict() | {"sample_size": [8, 16]}) == config
    x, y = torch.randn(2, 4, 8, 16), torch.tensor([0, 2])
    assert NoiseClassifier(config).gradient(x, torch.tensor([5, 900]), y).shape == x.shape
    assert (
        EncoderConfig.from_dict({"sample_size": 8, "in_channels": 1, "classes": 2}).to_dict()["sample_size"]
        == 8
    )


def test_its_configuration_comes_back() -> None:
    config = EncoderConfig((16, 16), 3, 7, (8, 16), layers_per_block=2, norm_num_groups=4)
    assert EncoderConfig.from_dict(config.to_dict()) == config
    net = NoiseClassifier(config)
    randomise(net)
    assert net(torch.randn(2, 3, 16, 16), torch.tensor([0, 9])).shape == (2, 7)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"classes": 0}, "classes=0"),
        ({"classes": "ten"}, "classes='ten'"),
        ({"in_channels": None}, "in_channels=None"),
        ({"sample_size": 36}, "sample_size=36"),
        ({"block_out_channels": [16]}, "at least one level"),
        ({"block_out_channels": [16, 30]}, "does not divide width 30"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"pool": "spatial"}, "pool='spatial' is not supported"),
        ({"pool": "dense"}, "hidden_width=None"),
        ({"pool": "dense", "hidden_width": 8, "sample_size": 24}, "sample_size=.* can be halved 4 times"),
        ({"attention_head_dim": 64}, "attention_head_dim=64 does not divide"),
        ({"down_block_types": ["AttnDownBlock2D"]}, "differ in length"),
        ({"depth": 2}, "depth is not an option"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        EncoderConfig.from_dict({"sample_size": 32, "in_channels": 1, "classes": 10} | options)
