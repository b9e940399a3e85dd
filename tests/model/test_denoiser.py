from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import noise
from model.checkpoint import Checkpoint
from model.denoiser import Chain, Denoiser, Latent, generate, trajectory
from model.runtimes import DtypeName, OpenVinoRuntime, TorchRuntime
from model.samplers import build_plan
from model.schedule import NoiseSchedule, linear_betas

SHAPE = (1, 8, 8)
SCHEDULE = NoiseSchedule(linear_betas(1000), timestep_spacing="trailing")


class FakeRuntime:
    """Batch-invariant by being elementwise; remembers what it was called with."""

    name = "fake"
    dtype: DtypeName = "float32"
    device = torch.device("cpu")
    batch_sizes: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def prepare(self, widths: Iterable[int]) -> None:
        """Nothing to prepare."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls.append((x.clone(), t, y))
        label = 0 if y is None else y.view(-1, 1, 1, 1) / 4
        return torch.sin(2 * x + label) + t.view(-1, 1, 1, 1) / 1000


def fake(conditional: bool = True, null_class: int | None = 3) -> Denoiser:
    return Denoiser(FakeRuntime(), SHAPE, conditional=conditional, null_class=null_class)


def chain(sampler: str = "ddim", steps: int = 5, seed: int = 0, **options: Any) -> Chain:
    chosen = {name: options.pop(name) for name in ("label", "guidance_scale") if name in options}
    return Chain(build_plan(SCHEDULE, sampler, steps, **options), seed, **chosen)


MIXED = (
    chain("ddpm", 6, seed=1, label=0),
    chain("ddim", 3, seed=2, label=1, guidance_scale=3.0),
    chain("dpmpp_2m", 5, seed=3),
    chain("ddim", 4, seed=4, eta=0.7, label=2),
    chain("ddpm", 2, seed=5, label=2, guidance_scale=0.0, variance="fixed_large"),
    chain("dpmpp_2m", 1, seed=6, label=1),
    chain("ddpm", 7, seed=7, label=1, guidance_scale=1.5),
    chain("sde_dpmpp_2m", 4, seed=8, label=0),
)


def run_alone(denoiser: Denoiser, one: Chain) -> list[Latent]:
    return [latents[0] for latents in trajectory(denoiser, [one])]


def run_staggered(denoiser: Denoiser, chains: Sequence[Chain]) -> list[list[Latent]]:
    """As the engine does: chain i joins at step i, each leaves when done, and the order keeps changing."""
    histories: list[list[Latent]] = [[] for _ in chains]
    latents = [denoiser.start(one) for one in chains]
    for now in range(100):
        running = [i for i, one in enumerate(chains) if now >= i and len(histories[i]) < len(one.plan)]
        if not running and now >= len(chains):
            return histories
        if now % 2:
            running.reverse()
        stepped = denoiser.step(
            [chains[i] for i in running], [latents[i] for i in running], [len(histories[i]) for i in running]
        )
        for i, latent in zip(running, stepped, strict=True):
            latents[i] = latent
            histories[i].append(latent)
    raise AssertionError("never done")


def assert_bitwise_alone(denoiser: Denoiser) -> None:
    for one, history in zip(MIXED, run_staggered(denoiser, MIXED), strict=True):
        alone = run_alone(denoiser, one)
        assert len(alone) == len(history) == len(one.plan)
        for mine, expected in zip(history, alone, strict=True):
            assert torch.equal(mine.x, expected.x)
            assert torch.equal(mine.x0, expected.x0)


def by_hand(runtime: Any, one: Chain, null: int | None) -> Tensor:
    """The whole chain of one sample, row by row, without the denoiser."""
    plan = one.plan
    x = torch.from_numpy(noise.normal(one.seed, noise.START, SHAPE))[None]
    previous = torch.zeros_like(x)
    for row, (t, *coefficients) in enumerate(plan.table):
        a_x, a_o, c_x, c_0, c_p, c_n = (float(np.float32(c)) for c in coefficients)

        def call(y: int | None, x: Tensor = x, t: float = t) -> Tensor:
            out: Tensor = runtime.forward(x, torch.tensor([int(t)]), None if y is None else torch.tensor([y]))
            return out

        out = call(null if one.label is None else one.label)
        if one.label is not None:
            unconditional = call(null)
            out = unconditional + one.guidance_scale * (out - unconditional)
        x0 = (a_x * x + a_o * out).clamp(-plan.clip, plan.clip)
        x = c_x * x + c_0 * x0 + c_p * previous + c_n * torch.from_numpy(noise.normal(one.seed, row, SHAPE))
        previous = x0
    return x


@pytest.mark.parametrize("one", MIXED)
def test_generate_is_the_loop_by_hand(one: Chain) -> None:
    torch.testing.assert_close(
        generate(fake(), [one]), by_hand(FakeRuntime(), one, null=3), rtol=1e-5, atol=1e-6
    )


def test_an_unconditional_network_gets_no_labels() -> None:
    denoiser = fake(conditional=False, null_class=None)
    generate(denoiser, [chain()])
    assert isinstance(denoiser.runtime, FakeRuntime)
    assert all(y is None for _, _, y in denoiser.runtime.calls)


def test_start_is_the_noise_of_row_minus_one() -> None:
    latent = fake().start(chain(seed=9))
    np.testing.assert_array_equal(latent.x.numpy(), noise.normal(9, -1, SHAPE))
    assert not latent.x0.any()


def test_a_guided_step_combines_two_plain_calls() -> None:
    denoiser = fake()
    guided = chain(seed=1, steps=1, label=2, guidance_scale=2.5)
    latent = denoiser.start(guided)
    x0 = denoiser.step([guided], [latent], [0])[0].x0

    runtime, t = FakeRuntime(), torch.tensor([999])
    y_out = runtime.forward(latent.x[None], t, torch.tensor([2]))[0]
    null_out = runtime.forward(latent.x[None], t, torch.tensor([3]))[0]
    out = null_out + 2.5 * (y_out - null_out)
    ac = SCHEDULE.alphas_cumprod[999]
    expected = (latent.x - (1 - ac) ** 0.5 * out) / ac**0.5
    torch.testing.assert_close(x0, expected.float().clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_one_call_per_step_with_a_row_more_for_each_guided_sample() -> None:
    denoiser = fake()
    chains = [
        chain(label=0),
        chain(label=1, guidance_scale=2.0, steps=7),
        chain(),
        chain(label=2, guidance_scale=0.5),
    ]
    assert [one.rows for one in chains] == [1, 2, 1, 2]
    denoiser.step(chains, [denoiser.start(one) for one in chains], [0, 3, 1, 0])
    assert isinstance(denoiser.runtime, FakeRuntime)
    ((x, t, y),) = denoiser.runtime.calls
    assert len(x) == sum(one.rows for one in chains)
    assert y is not None
    assert y.tolist() == [0, 1, 3, 2, 3, 3]
    assert torch.equal(x[[1, 3]], x[[4, 5]])
    timesteps = [one.plan.timesteps[row] for one, row in zip(chains, [0, 3, 1, 0], strict=True)]
    assert t.tolist() == [*timesteps, timesteps[1], timesteps[3]]


def test_a_step_leaves_what_it_was_given_alone() -> None:
    denoiser = fake()
    latents = [denoiser.start(one) for one in MIXED]
    kept = [(latent.x.clone(), latent.x0.clone()) for latent in latents]
    first = denoiser.step(MIXED, latents, [0] * len(MIXED))
    again = denoiser.step(MIXED, latents, [0] * len(MIXED))
    for latent, (x, x0), a, b in zip(latents, kept, first, again, strict=True):
        assert torch.equal(latent.x, x)
        assert torch.equal(latent.x0, x0)
        assert torch.equal(a.x, b.x)
        assert not torch.equal(a.x, x)


def test_company_and_moment_of_joining_do_not_matter() -> None:
    assert_bitwise_alone(fake())


def test_company_does_not_matter_with_openvino(openvino: OpenVinoRuntime) -> None:
    assert_bitwise_alone(Denoiser(openvino, SHAPE, conditional=True, null_class=3))


def test_company_does_not_matter_with_torch_at_a_fixed_shape(tiny: Checkpoint) -> None:
    runtime = TorchRuntime(tiny, batch_sizes=(16,))
    assert_bitwise_alone(Denoiser(runtime, SHAPE, conditional=True, null_class=3))


def test_images_of_a_batch_are_those_of_their_seeds() -> None:
    denoiser = fake()
    batch = generate(denoiser, [chain("ddpm", seed=40 + i) for i in range(3)])
    assert batch.shape == (3, *SHAPE)
    assert batch.dtype == torch.float32
    for i, image in enumerate(batch):
        assert torch.equal(image, generate(denoiser, [chain("ddpm", seed=40 + i)])[0])
    assert not torch.equal(batch[0], batch[1])


def test_the_guess_is_clipped_where_the_schedule_says_so() -> None:
    denoiser = fake()
    loose = NoiseSchedule(linear_betas(1000), clip=float("inf"))
    first = next(iter(trajectory(denoiser, [chain(steps=3)])))[0]
    assert first.x0.abs().max() == 1
    unclipped = next(iter(trajectory(denoiser, [Chain(build_plan(loose, "ddim", 3), 0)])))[0]
    assert unclipped.x0.abs().max() > 1


@pytest.mark.parametrize(
    ("conditional", "null_class", "options", "reason"),
    [
        (False, None, {"label": 1}, "takes no class labels"),
        (True, None, {}, "no null class"),
        (True, None, {"label": 1, "guidance_scale": 2.0}, "no null class"),
    ],
)
def test_what_the_network_cannot_do_is_refused_at_the_start(
    conditional: bool, null_class: int | None, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        fake(conditional, null_class).start(chain(**options))
