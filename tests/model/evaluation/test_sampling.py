import numpy as np
import pytest
import torch

from model.chain import Chain
from model.denoiser import generate, to_pixels
from model.evaluation.sampling import denoiser_of, sample
from model.samplers import Guidance, build_plan
from tests.model.evaluation.test_evaluate import tiny_model


def test_samples_are_those_of_their_seeds_whatever_the_batch():
    model = tiny_model()
    denoiser = denoiser_of(model, "torch")
    plan = build_plan(model.schedule, "ddpm", 3, guidance=Guidance(2.0))
    ticks: list[int] = []
    labels = [0, 1, 2, 0, 1]
    some = sample(denoiser, plan, labels, seed=7, batch=2, tick=ticks.append)
    assert ticks == [4, 4, 4, 4, 4, 4, 2, 2, 2]  # guided: two rows per image
    assert some.shape == (5, 1, 8, 8)
    alone = generate(denoiser, [Chain(plan, 7 + 4, 1)])
    assert np.abs(some[4].astype(int) - to_pixels(alone)[0]).max() <= 1


def test_samples_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.unet.conv_out.weight.fill_(float("nan"))
    plan = build_plan(model.schedule, "ddim", 2)
    with pytest.raises(FloatingPointError, match="samples 0 to 1"):
        sample(
            denoiser_of(model, "torch"), plan, [None] * 4, seed=0, batch=2,
            tick=int,
        )  # fmt: skip


def test_a_denoiser_keeps_the_weights_of_its_time():
    model = tiny_model()
    model.unet.train()
    denoiser = denoiser_of(model)  # with the best runtime there is, which may share memory
    assert model.unet.training
    arguments = (torch.ones(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0]))
    before = denoiser.runtime.forward(*arguments)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.mul_(1.5)
    assert torch.equal(denoiser.runtime.forward(*arguments), before)
    now = denoiser_of(model, "torch").runtime.forward(*arguments)
    assert not torch.allclose(now, before, rtol=0.01)
