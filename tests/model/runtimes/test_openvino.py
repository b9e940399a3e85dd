from __future__ import annotations

from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from model.runtimes import DtypeName, OpenVinoRuntime, TorchRuntime
from tests.model.conftest import tiny_checkpoint
from tests.model.runtimes.conftest import batch


def test_openvino_agrees_with_torch(tiny: Checkpoint, openvino: OpenVinoRuntime) -> None:
    torch_runtime = TorchRuntime(tiny)
    for rows in (1, 2, 5):
        expected = torch_runtime.forward(*batch(rows))
        assert (openvino.forward(*batch(rows)) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_openvino_takes_unconditional_networks() -> None:
    model = tiny_checkpoint(num_class_embeds=None, in_channels=3, out_channels=3)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    out = OpenVinoRuntime(model, threads=1).forward(x, t, None)
    torch.testing.assert_close(out, TorchRuntime(model).forward(x, t, None), rtol=1e-4, atol=1e-4)


RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
}


FOURIER = {"time_embedding_type": "fourier", "act_fn": "relu"}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (
            RESNET_BLOCKS
            | {"act_fn": "mish", "sample_size": (8, 16), "resnet_time_scale_shift": "scale_shift"},
            "float32",
        ),
        (
            {"downsample_type": "resnet", "upsample_type": "resnet", "act_fn": "gelu", "in_channels": 4}
            | {"time_embedding_type": "learned", "num_train_timesteps": 1000, "class_embed_type": "timestep"},
            "float32",
        ),
        (FOURIER, "float32"),
        (FOURIER, "bfloat16"),
    ],
    ids=["residual resampling", "learned", "fourier", "fourier in bfloat16"],
)
def test_openvino_takes_every_kind_of_network(options: dict[str, Any], dtype: DtypeName) -> None:
    model = tiny_checkpoint(**options)
    if options.get("time_embedding_type") == "fourier":
        model.unet.get_parameter("time_proj.weight").data.mul_(50)  # as they are drawn
    x = torch.randn(3, *model.unet.config.shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([1, 500, 999]), torch.tensor([0, 1, 3])
    out = OpenVinoRuntime(model, dtype, threads=1).forward(x, t, y)
    expected = TorchRuntime(model).forward(x, t, y)
    allowed = (1e-4 if dtype == "float32" else 0.03) * expected.flatten(1).std(1).view(-1, 1, 1, 1)
    assert ((out - expected).abs().amax((1, 2, 3), keepdim=True) <= 4 * allowed).all()


def test_openvino_takes_timesteps_between_whole_ones(openvino: OpenVinoRuntime, tiny: Checkpoint) -> None:
    x, t, y = batch(3)
    expected = TorchRuntime(tiny).forward(x, t + 0.25, y)
    torch.testing.assert_close(openvino.forward(x, t + 0.25, y), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(openvino.forward(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_openvino_is_bitwise_independent_of_the_batch(openvino: OpenVinoRuntime) -> None:
    x, t, y = batch(7)
    together = openvino.forward(x, t, y)
    for i in range(7):
        assert torch.equal(openvino.forward(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i])
    assert torch.equal(openvino.forward(x.flip(0), t.flip(0), y.flip(0)).flip(0), together)


def test_openvino_compiles_powers_of_two_and_each_once(tiny: Checkpoint) -> None:
    runtime = OpenVinoRuntime(tiny)
    compiled: list[int] = []
    real = runtime._compiled

    def counting(size: int) -> list[Any]:
        compiled.extend([size] * (size not in runtime._requests))
        return real(size)

    runtime._compiled = counting  # type: ignore[method-assign]
    for rows in (1, 2, 3, 7, 5, 8):
        assert len(runtime.forward(*batch(rows))) == rows
    assert compiled == [1, 2, 4]


def test_openvino_works_after_a_failed_call(openvino: OpenVinoRuntime) -> None:
    before = openvino.forward(*batch(4))
    x, t, y = batch(4)
    with pytest.raises(ValueError, match="broadcast"):
        openvino.forward(x[:, :, :4], t, y)
    with pytest.raises(ValueError, match="zip"):
        openvino.forward(x, t[:2], y)
    assert torch.equal(openvino.forward(*batch(4)), before)


def test_openvino_results_are_not_overwritten_by_the_next_call(openvino: OpenVinoRuntime) -> None:
    first = openvino.forward(*batch(2))
    kept = first.clone()
    x, t, y = batch(2)
    openvino.forward(x + 1, t, y)
    assert torch.equal(first, kept)
