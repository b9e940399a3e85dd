from __future__ import annotations

import pytest
import torch

from bench.reuse import Reusing, Shallow, Whole, share_of_operations
from bench.roofline import inputs
from model import checkpoint
from model.chain import Chain
from model.denoiser import Denoiser, generate
from model.runtimes import TorchRuntime
from model.samplers import build_plan


@pytest.fixture(scope="module")
def model(tiny_folder):
    return checkpoint.load(tiny_folder)


@pytest.mark.parametrize("blocks", [1, 2])
@torch.no_grad()
def test_a_shallow_step_after_a_whole_one_of_the_same_input_is_the_network(model, blocks):
    given = inputs(model, 3)
    expected = model.unet(*given)
    out, kept = Whole(model.unet, blocks)(*given)
    assert torch.equal(out, expected)
    assert torch.equal(Shallow(model.unet, blocks)(*given, kept), expected)


@torch.no_grad()
def test_a_shallow_step_depends_on_the_time_and_its_own_input(model):
    x, t, y = inputs(model, 2)
    _, kept = Whole(model.unet, 2)(x, t, y)
    shallow = Shallow(model.unet, 2)
    before = shallow(x, t, y, kept)
    assert not torch.equal(shallow(x, t - 100, y, kept), before)
    assert not torch.equal(shallow(x + 1, t, y, kept), before)
    assert not torch.equal(shallow(x, t, y, kept + 1), before)


def test_fewer_blocks_cost_less(model):
    one, two = (share_of_operations(model, blocks) for blocks in (1, 2))
    assert 0 < one < two < 1


def test_every_chain_begins_with_a_whole_step(model):
    plan = build_plan(model.schedule, "ddim", 6)
    whole, every, third = (Denoiser.of(model, runtime) for runtime in (
        TorchRuntime(model), Reusing(model, 1, 1), Reusing(model, 3, 1)
    ))  # fmt: skip
    chains = [Chain(plan, seed, 1) for seed in range(2)]
    torch.testing.assert_close(generate(every, chains), generate(whole, chains))
    first = generate(third, chains)
    assert not torch.equal(first, generate(whole, chains))
    assert torch.equal(generate(third, chains), first)
