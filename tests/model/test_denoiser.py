from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import denoiser as module
from model import noise
from model.chain import Chain, InitialLatent, KnownPixels, SphericalMix, from_pixels, measuring, noised
from model.checkpoint import Checkpoint
from model.denoiser import ALL, Denoiser, Latent, _Parts, generate, render, to_pixels, trajectory
from model.diffusion import vlb_terms
from model.interpolation import angle_between, spherical
from model.noise import NoiseStream
from model.runtimes import DtypeName, OpenVinoRuntime, SkippedError, ThreadQueue, TorchRuntime
from model.samplers import (
    Guidance,
    build_inversion,
    build_measurement,
    build_plan,
    build_repaint,
)
from model.schedule import NoiseSchedule, linear_betas
from model.state import Row, pack
from tests.model.conftest import randomise, tiny_checkpoint, tiny_classifier

SHAPE = (1, 8, 8)
SCHEDULE = NoiseSchedule(linear_betas(1000), timestep_spacing="trailing")


class FakeRuntime:
    """Batch-invariant by being elementwise; remembers what it was called with."""

    name = "fake"
    dtype: DtypeName = "float32"
    device = torch.device("cpu")
    batch_sizes: tuple[int, ...] = ()
    recorder = None

    def __init__(self) -> None:
        self.queue = ThreadQueue()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def prepare(self, batch_sizes: Iterable[int]) -> None:
        """Nothing to prepare."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls.append((x.clone(), t, y))
        label = 0 if y is None else y.view(-1, 1, 1, 1) / 4
        return torch.sin(2 * x + label) + t.view(-1, 1, 1, 1) / 1000


def fake(conditional: bool = True, null_class: int | None = 3) -> Denoiser:
    return Denoiser(FakeRuntime(), SHAPE, conditional=conditional, null_class=null_class)


def chain(sampler: str = "ddim", steps: int = 5, seed: int = 0, **options: Any) -> Chain:
    chosen = {name: options.pop(name) for name in ("label", "start", "known") if name in options}
    if "guidance_scale" in options:
        options["guidance"] = Guidance(options.pop("guidance_scale"), rescale=options.pop("rescale", 0.0))
    return Chain(build_plan(SCHEDULE, sampler, steps, **options), seed, **chosen)


IMAGE = np.linspace(-1, 1, 64, dtype=np.float32).reshape(SHAPE)
HALF = np.arange(8)[:, None] < np.full(8, 4)[None]
EDIT = build_plan(SCHEDULE, "ddim", 6, strength=0.5)
LEARNED = NoiseSchedule(linear_betas(1000), variance_type="learned_range", timestep_spacing="trailing")
THRESHOLDED = replace(SCHEDULE, dynamic_thresholding_ratio=0.8, clip=1.7)
MIXED = (
    chain("ddpm", 6, seed=1, label=0),
    chain("ddim", 3, seed=2, label=1, guidance_scale=3.0),
    chain("dpmpp_2m", 5, seed=3),
    chain("ddim", 4, seed=4, eta=0.7, label=2),
    chain("ddpm", 2, seed=5, label=2, guidance_scale=0.0, variance="fixed_large"),
    chain("dpmpp_2m", 1, seed=6, label=1),
    chain("ddpm", 7, seed=7, label=1, guidance_scale=1.5),
    chain("sde_dpmpp_2m", 4, seed=8, label=0),
    chain("ddim", 8, seed=9, label=0, guidance=Guidance(2.0, sigmas=(0.5, 20.0))),
    Chain(EDIT, 10, start=noised(EDIT, IMAGE, 10)),
    Chain(build_inversion(SCHEDULE, 5), 11, start=InitialLatent(((1.0, IMAGE),))),
    Chain(
        build_repaint(SCHEDULE, "ddpm", 6, jump_length=2, jump_n_sample=2),
        12,
        label=1,
        known=KnownPixels(IMAGE, HALF[None]),
    ),
    Chain(
        measurement := build_measurement(SCHEDULE, [999, 10, 500, 0]),
        13,
        start=noised(measurement, IMAGE, 13),
        known=KnownPixels(IMAGE, np.ones((1, 1, 1), bool)),
    ),
    chain("dpmpp_2m", 3, seed=14, start=InitialLatent(noises=((0.6, 1), (0.8, 2)))),
    Chain(build_plan(THRESHOLDED, "ddim", 4), 15),
    chain("ddim", 4, seed=16, label=1, guidance_scale=4.0, rescale=0.7),
    Chain(build_plan(THRESHOLDED, "dpmpp_2m", 5, guidance=Guidance(4.0)), 16, label=1),
)


def run_alone(denoiser: Denoiser, one: Chain) -> list[Latent]:
    return [latents[0] for latents in trajectory(denoiser, [one])]


def run_staggered(denoiser: Denoiser, chains: Sequence[Chain]) -> list[list[Latent]]:
    """As the engine does: chain i joins at step i, each leaves when done, and the order keeps changing."""
    histories: list[list[Latent]] = [[] for _ in chains]
    for now in range(100):
        running = [i for i, one in enumerate(chains) if now >= i and len(histories[i]) < len(one.plan)]
        if not running and now >= len(chains):
            return histories
        if now % 2:
            running.reverse()
        denoiser.launch([Row(chains[i], i, len(histories[i])) for i in running]).read()
        for i in running:
            histories[i].append(denoiser.latent(i))
    raise AssertionError("never done")


def assert_bitwise_alone(denoiser: Denoiser) -> None:
    for one, history in zip(MIXED, run_staggered(denoiser, MIXED), strict=True):
        alone = run_alone(denoiser, one)
        assert len(alone) == len(history) == len(one.plan)
        for mine, expected in zip(history, alone, strict=True):
            assert torch.equal(mine.x, expected.x)
            assert torch.equal(mine.x0, expected.x0)


def by_hand(runtime: Any, one: Chain, null: int | None) -> Tensor:
    """The whole chain of one sample, step by step, without the denoiser."""
    plan = one.plan
    x = torch.from_numpy(noise.normal(one.seed, noise.START, SHAPE))[None]
    if one.start is not None:
        x = torch.zeros_like(x)
        for weight, image in one.start.images:
            x = x + weight * torch.from_numpy(image)
        for weight, seed in one.start.noises:
            x = x + weight * torch.from_numpy(noise.normal(seed, noise.START, SHAPE))
    previous = torch.zeros_like(x)
    for step, row in enumerate(plan.table):
        t, w, r, clip = int(row["t"]), float(row["w"]), float(row["r"]), float(row["clip"])
        names = ("a_x", "a_o", "q", "c_x", "c_0", "c_u", "c_p", "c_n", "c_v")
        a_x, a_o, q, c_x, c_0, c_u, c_p, c_n, c_v = (float(row[name]) for name in names)

        def call(y: int | None, x: Tensor = x, t: int = t) -> Tensor:
            out: Tensor = runtime.forward(x, torch.tensor([t]), None if y is None else torch.tensor([y]))
            return out

        out = call(null if one.label is None else one.label)
        variance_frac = (out[:, 1:] + 1) / 2
        if w != 1:
            unconditional = call(null)[:, :1]
            given, out = out[:, :1], unconditional + w * (out[:, :1] - unconditional)
            out = out * (r * given.std() / out.std() + 1 - r)
        unclipped = a_x * x + a_o * out[:, :1]
        x0 = unclipped.clamp(-clip, clip)
        if q:
            most = float(torch.quantile(unclipped.abs(), q).clamp(1, clip))
            x0 = unclipped.clamp(-most, most) / most
        z = torch.from_numpy(noise.normal(one.seed, step, SHAPE))
        scale = torch.exp(c_v * variance_frac) if variance_frac.numel() else 1.0
        x = c_x * x + c_0 * x0 + c_u * unclipped + c_p * previous + c_n * scale * z
        if one.known is not None:
            other = torch.from_numpy(noise.normal(one.seed, step, SHAPE, NoiseStream.KNOWN_PIXELS))
            known = float(row["k_0"]) * torch.from_numpy(one.known.image) + float(row["k_n"]) * other
            x = torch.where(torch.from_numpy(one.known.mask), known, x)
        previous = x0
    return x


@pytest.mark.parametrize("one", MIXED)
def test_generate_is_the_loop_by_hand(one: Chain) -> None:
    torch.testing.assert_close(
        generate(fake(), [one]), by_hand(FakeRuntime(), one, null=3), rtol=1e-4, atol=1e-4
    )


def test_an_unconditional_network_gets_no_labels() -> None:
    denoiser = fake(conditional=False, null_class=None)
    generate(denoiser, [chain()])
    assert isinstance(denoiser.runtime, FakeRuntime)
    assert all(y is None for _, _, y in denoiser.runtime.calls)


def test_start_is_the_starting_noise() -> None:
    np.testing.assert_array_equal(fake().start(chain(seed=9)), noise.normal(9, -1, SHAPE))


def test_a_sample_begins_with_its_chain_whatever_its_slot_held() -> None:
    denoiser = fake()
    denoiser.reserve(1)
    alone = run_alone(denoiser, chain("dpmpp_2m", seed=3))
    denoiser.slots.x.fill_(torch.nan)
    denoiser.slots.x0.fill_(torch.nan)
    for before, after in zip(alone, run_alone(denoiser, chain("dpmpp_2m", seed=3)), strict=True):
        assert torch.equal(before.x, after.x)


def test_a_guided_step_combines_two_plain_calls() -> None:
    denoiser = fake()
    guided = chain(seed=1, steps=1, label=2, guidance_scale=2.5)
    denoiser.launch([Row(guided, 0, 0)]).read()
    x0 = denoiser.latent(0).x0

    x = torch.from_numpy(denoiser.start(guided))
    runtime, t = FakeRuntime(), torch.tensor([999])
    y_out = runtime.forward(x[None], t, torch.tensor([2]))[0]
    null_out = runtime.forward(x[None], t, torch.tensor([3]))[0]
    out = null_out + 2.5 * (y_out - null_out)
    ac = SCHEDULE.alphas_cumprod[999]
    expected = (x - (1 - ac) ** 0.5 * out) / ac**0.5
    torch.testing.assert_close(x0, expected.float().clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_one_call_per_step_with_a_row_more_for_each_guided_sample() -> None:
    denoiser = fake()
    chains = [
        chain(label=0),
        chain(label=1, guidance_scale=2.0, steps=7),
        chain(),
        chain(label=2, guidance_scale=0.5),
    ]
    assert [one.plan.evaluations[0] for one in chains] == [1, 2, 1, 2]
    denoiser.launch(
        [Row(one, i, step) for i, (one, step) in enumerate(zip(chains, [0, 3, 1, 0], strict=True))]
    ).read()
    assert isinstance(denoiser.runtime, FakeRuntime)
    ((x, t, y),) = denoiser.runtime.calls
    assert len(x) == sum(one.plan.evaluations[0] for one in chains)
    assert y is not None
    assert y.tolist() == [0, 1, 3, 2, 3, 3]
    assert torch.equal(x[[1, 3]], x[[4, 5]])
    timesteps = [one.plan.timesteps[row] for one, row in zip(chains, [0, 3, 1, 0], strict=True)]
    assert t.tolist() == [*timesteps, timesteps[1], timesteps[3]]


class Failing(FakeRuntime):
    """Raises as often as it is told to."""

    failures = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if self.failures:
            self.failures -= 1
            raise ValueError("broken")
        return super().forward(x, t, y)


def test_a_step_that_fails_changes_nothing_and_is_not_built_on() -> None:
    runtime = Failing()
    denoiser = Denoiser(runtime, SHAPE, conditional=True, null_class=3)
    rows = [Row(one, i, 1) for i, one in enumerate(MIXED) if len(one.plan) > 1]
    for row in rows:
        denoiser.launch([replace(row, step=0)]).read()
    kept = [denoiser.latent(row.slot) for row in rows]
    runtime.failures = 1
    failed, behind = denoiser.launch(rows), denoiser.launch(rows)
    with pytest.raises(ValueError, match="broken"):
        failed.read()
    denoiser.recover()
    again = denoiser.launch(rows)
    with pytest.raises(SkippedError):
        behind.read()
    again.read()
    for row, before in zip(rows, kept, strict=True):
        assert not torch.equal(denoiser.latent(row.slot).x, before.x)
        expected = run_alone(fake(), row.chain)[1]  # one step further, not two
        assert torch.equal(denoiser.latent(row.slot).x, expected.x)


def test_a_step_whose_results_are_lost_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples have moved on: a second time would move them twice."""

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no room for pictures")

    denoiser = fake()
    monkeypatch.setattr(module, "render", full)
    with pytest.raises(torch.AcceleratorError, match="no room for pictures"):
        denoiser.launch([Row(chain(), 0, 0, pictures=("x0",))]).read()


def test_a_step_gives_what_is_asked_for_of_each_row() -> None:
    denoiser = fake()
    rows = [
        Row(chain("ddpm", seed=1), 0, 0, pictures=("x0", "xt")),
        Row(chain("ddim", seed=2, label=1, guidance_scale=2.0), 5, 0),
        Row(chain("ddpm", seed=3), 2, 0, pictures=("before",), arrays=("x0", "xt")),
    ]
    first, second, third = denoiser.launch(rows).read()
    after = [denoiser.latent(row.slot) for row in rows]
    assert (second.pictures, second.arrays) == ({}, {})
    assert list(first.pictures) == ["x0", "xt"]
    np.testing.assert_array_equal(first.pictures["x0"], render(after[0].x0[None])[0])
    np.testing.assert_array_equal(first.pictures["xt"], render(after[0].x[None])[0])
    begun = torch.from_numpy(denoiser.start(rows[2].chain))
    np.testing.assert_array_equal(third.pictures["before"], render(begun[None])[0])
    np.testing.assert_array_equal(third.arrays["x0"], after[2].x0)
    np.testing.assert_array_equal(third.arrays["xt"], after[2].x)


NON_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def finite_with(
    value: float, chains: Sequence[Chain], channel: int = 0, channels: int = 1, **options: Any
) -> list[bool]:
    """Which rows are finite where the network puts a value among those of its row 1."""

    class OneRow(FakeRuntime):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            out = super().forward(x, t, y).repeat(1, channels, 1, 1)
            out[1, channel, 3, 4] = value
            return out

    denoiser = Denoiser(OneRow(), SHAPE, conditional=True, null_class=3, **options)
    read = denoiser.launch([Row(each, slot, 0) for slot, each in enumerate(chains)]).read()
    return [stepped.finite for stepped in read]


@NON_FINITE
@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("ratio", [0.0, 0.8])
def test_rows_that_are_not_finite_are_found(value: float, clip: float, sampler: str, ratio: float) -> None:
    """Though bounding x₀ makes a picture of an infinity."""
    schedule = NoiseSchedule(linear_betas(1000), clip=clip, dynamic_thresholding_ratio=ratio)
    chains = [Chain(build_plan(schedule, sampler, 3), seed) for seed in range(3)]
    assert finite_with(value, chains) == [True, False, True]


@NON_FINITE
def test_an_output_of_either_branch_of_guidance_that_is_not_finite_is_found(value: float) -> None:
    guided = [chain("ddim", 3, seed=seed, label=1, guidance_scale=2.0) for seed in range(3)]
    assert finite_with(value, guided) == [True, False, True]
    # Row 1 of the call is then the unconditional row of the only sample.
    assert finite_with(value, guided[:1]) == [False]


@NON_FINITE
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_predicted_variance_that_is_not_finite_is_found(value: float, sampler: str) -> None:
    """Even one of -∞, which would mean no noise, and one that the sampler does not look at."""
    chains = [Chain(build_plan(LEARNED, sampler, 3), seed) for seed in range(3)]
    assert finite_with(value, chains, 1, 2, schedule=LEARNED) == [True, False, True]


@NON_FINITE
def test_a_measurement_of_what_is_not_finite_is_found(value: float) -> None:
    chains = [measuring(build_measurement(SCHEDULE, [90, 0]), IMAGE, seed) for seed in range(3)]
    assert finite_with(value, chains, schedule=SCHEDULE) == [True, False, True]


@NON_FINITE
def test_a_gradient_of_the_classifier_that_is_not_finite_is_found(value: float) -> None:
    class Gradient:
        def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            found = torch.zeros_like(x)
            found[1, 0, 3, 4] = value
            return found

    guidance = Guidance(classifier_scale=1.0)
    plan = build_plan(SCHEDULE, "ddpm", 3, guidance=guidance)
    chains = [Chain(plan, seed, 1) for seed in range(3)]
    assert finite_with(0.0, chains, classifier=Gradient()) == [True, False, True]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_probe_calls_the_network_for_no_sample(conditional: bool) -> None:
    denoiser = fake(conditional)
    denoiser.launch([Row(chain(seed=1), 0, 0)]).read()
    before = denoiser.latent(0)
    denoiser.probe()
    _, t, y = denoiser.runtime.calls[-1]  # type: ignore[attr-defined]
    assert len(denoiser.runtime.calls) == 2  # type: ignore[attr-defined]
    assert (len(t), y is not None) == (1, conditional)
    assert torch.equal(denoiser.latent(0).x, before.x)


def test_a_probe_of_a_broken_device_raises() -> None:
    class Lost(FakeRuntime):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            raise RuntimeError("CUDA error: unspecified launch failure")

    denoiser = Denoiser(Lost(), SHAPE, conditional=False, null_class=None)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        denoiser.probe()


def test_rows_beyond_the_samples_are_written_where_nobody_looks() -> None:
    """The layout of a recorded step: padding, and the unconditional rows, among the rows it updates."""
    chains = [
        chain(label=1, guidance_scale=2.0, seed=1),
        chain("ddpm", seed=2),
        chain("ddim", seed=3, label=0),
    ]
    rows = [Row(one, slot, 0) for slot, one in enumerate(chains)]
    loose, fixed = fake(), fake()
    for denoiser in (loose, fixed):
        denoiser.reserve(4)
        denoiser.slots.x[4] = 7.0
        denoiser._begin(rows)
    coefficients = np.array([np.frombuffer(one.plan.coefficients[0], np.float32) for one in chains])
    parts = _Parts(8, True, ALL, ALL, [], [], ALL)
    with torch.inference_mode():
        fixed._update(torch.from_numpy(pack(rows, coefficients, [0], 3, 8)), parts)
    loose.launch(rows).read()
    for slot in range(3):
        assert torch.equal(fixed.latent(slot).x, loose.latent(slot).x)
        assert torch.equal(fixed.latent(slot).x0, loose.latent(slot).x0)
    assert (fixed.latent(3).x == 7.0).all()


def test_batch_neighbours_and_moment_of_joining_do_not_matter() -> None:
    assert_bitwise_alone(fake())


def test_batch_neighbours_do_not_matter_with_openvino(openvino: OpenVinoRuntime) -> None:
    assert_bitwise_alone(Denoiser(openvino, SHAPE, conditional=True, null_class=3))


def test_batch_neighbours_do_not_matter_with_torch_at_a_fixed_shape(tiny: Checkpoint) -> None:
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


def test_the_x0_prediction_is_clipped_where_the_schedule_says_so() -> None:
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
        fake(conditional, null_class).launch([Row(chain(**options), 0, 0)]).read()


# ── Where chains begin, and what is known ──────────────────────────────────────────────────────


def test_known_pixels_come_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    plan = build_repaint(SCHEDULE, "ddpm", 5, jump_length=2, jump_n_sample=2)
    (image,) = to_pixels(
        generate(fake(), [Chain(plan, 3, known=KnownPixels(from_pixels(pixels), HALF[None]))])
    )
    assert (image[0][HALF] == pixels[..., 0][HALF]).all()
    assert (image[0][~HALF] != pixels[..., 0][~HALF]).any()


def test_a_measurement_shows_the_network_the_image_under_fresh_noise() -> None:
    denoiser = fake()
    timesteps = [999, 10, 500, 0]
    plan = build_measurement(SCHEDULE, timesteps)
    one = Chain(plan, 5, start=noised(plan, IMAGE, 5), known=KnownPixels(IMAGE, np.ones((1, 1, 1), bool)))
    final = generate(denoiser, [one])
    np.testing.assert_array_equal(final[0].numpy(), IMAGE)
    assert isinstance(denoiser.runtime, FakeRuntime)
    for row, (x, t, _) in enumerate(denoiser.runtime.calls):
        assert t.tolist() == [timesteps[row]]
        ac = SCHEDULE.alphas_cumprod[timesteps[row]]
        z = (x[0].numpy() - ac**0.5 * IMAGE) / (1 - ac) ** 0.5
        stream = (noise.START, NoiseStream.STEP) if row == 0 else (row - 1, NoiseStream.KNOWN_PIXELS)
        np.testing.assert_allclose(z, noise.normal(5, stream[0], SHAPE, stream[1]), atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_chain_begins_between_what_the_stage_before_it_left(share: float) -> None:
    carried = [noise.normal(seed, 3, SHAPE) for seed in (5, 6, 7)]
    start = InitialLatent(carried=SphericalMix(2, 0, share))
    x = fake().start(chain(start=start), carried)
    u, v = spherical(share, angle_between(carried[2], carried[0]))
    np.testing.assert_allclose(x, u * carried[2] + v * carried[0], rtol=1e-6, atol=1e-6)
    if share in (0.0, 1.0):
        np.testing.assert_array_equal(x, carried[0 if share else 2])


def test_measurements_compare_with_their_image() -> None:
    denoiser = Denoiser.of(tiny_checkpoint(), FakeRuntime())
    schedule = denoiser.schedule
    assert schedule is not None
    levels = from_pixels(np.random.default_rng(1).integers(0, 256, (8, 8, 1), np.uint8))
    chains = [
        measuring(build_measurement(schedule, timesteps), levels, 5) for timesteps in ([700, 0], [3, 40])
    ]
    for row, latents in enumerate(trajectory(denoiser, chains)):
        found = denoiser.measure(chains, [row, row], [latent.x0.numpy() for latent in latents])
        for chain, latent, (bits, error) in zip(chains, latents, found, strict=True):
            t = torch.tensor([chain.plan.timesteps[row]])
            x0, x0_pred = torch.from_numpy(levels)[None], latent.x0[None]
            assert bits == vlb_terms(schedule, x0, x0_pred, t, schedule.variance_type).item()
            assert error == (x0 - x0_pred).double().square().mean().item()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pictures_need_not_be_square_and_have_any_number_of_channels(channels: int) -> None:
    """They are generated, edited and measured."""
    shape = channels, 8, 16
    model = tiny_checkpoint(sample_size=(8, 16), in_channels=channels, out_channels=channels)
    denoiser = Denoiser.of(model, TorchRuntime(model, batch_sizes=(4,)))
    levels = from_pixels(np.random.default_rng(0).integers(0, 256, (8, 16, channels), np.uint8))
    left = np.broadcast_to(np.arange(16) < 4, (1, 8, 16))
    assert denoiser.schedule is not None
    chains = [
        chain(steps=3, label=1),
        Chain(EDIT, 1, 1, start=noised(EDIT, levels, 1), known=KnownPixels(levels, left)),
        measuring(build_measurement(denoiser.schedule, [700, 300, 0]), levels, 2, 1),
    ]
    made, edited, measured = (generate(denoiser, [each])[0] for each in chains)
    assert made.shape == edited.shape == shape
    assert torch.equal(edited[:, :, :4], torch.from_numpy(levels[:, :, :4]))
    assert not torch.isclose(edited[:, :, 4:], torch.from_numpy(levels[:, :, 4:])).any(dim=-1).all()
    assert torch.equal(measured, torch.from_numpy(levels))
    assert to_pixels(made[None])[0].shape == shape


def test_a_chain_may_start_from_an_image_that_is_read_only() -> None:
    """As those of a job that came as bytes are; torch would warn of it, once in a process."""
    image = IMAGE.copy()
    image.flags.writeable = False
    mask = HALF[None].copy()
    mask.flags.writeable = False
    one = chain(start=InitialLatent(((1.0, image),)), known=KnownPixels(image, mask))
    generate(fake(), [one])
    np.testing.assert_array_equal(image, IMAGE)


def test_an_edit_begins_with_the_image_under_noise() -> None:
    x = fake().start(Chain(EDIT, 7, start=noised(EDIT, IMAGE, 7)))
    ac = SCHEDULE.alphas_cumprod[EDIT.timesteps[0]]
    z = noise.normal(7, noise.START, SHAPE)
    np.testing.assert_allclose(x, ac**0.5 * IMAGE + (1 - ac) ** 0.5 * z, rtol=1e-5, atol=1e-6)


class VarianceRuntime(FakeRuntime):
    """A network that also predicts its variance: larger on the right."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out = super().forward(x, t, y)
        return torch.cat((out, torch.linspace(-1, 1, 8).expand_as(out)), dim=1)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(3.0)], ids=["plain", "guided"])
def test_a_learned_variance_lies_between_its_ends(guidance: Guidance) -> None:
    plan = build_plan(LEARNED, "ddpm", 5, guidance=guidance)
    one = Chain(plan, 1, label=2)
    denoiser = Denoiser(VarianceRuntime(), SHAPE, conditional=True, null_class=3)
    torch.testing.assert_close(
        generate(denoiser, [one]), by_hand(VarianceRuntime(), one, null=3), rtol=1e-5, atol=1e-6
    )
    # One step, left and right edges: the noise is the small variance's and the large one's.
    ends = {}
    for variance in ("fixed_small", "fixed_large", "learned_range"):
        plan = build_plan(LEARNED, "ddpm", 5, variance=variance, guidance=guidance)
        denoiser.launch([Row(Chain(plan, 1, label=2), 0, 0)]).read()
        ends[variance] = denoiser.latent(0).x[0]
    torch.testing.assert_close(ends["learned_range"][:, 0], ends["fixed_small"][:, 0])
    torch.testing.assert_close(ends["learned_range"][:, -1], ends["fixed_large"][:, -1])
    assert not torch.allclose(ends["fixed_small"], ends["fixed_large"])


class Towards:
    """A classifier whose gradient is the same everywhere."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], list[int]]] = []

    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t.tolist(), y.tolist()))
        return torch.full_like(x, 0.25)


def test_classifier_guidance_moves_the_x0_prediction_by_the_gradient() -> None:
    classifier = Towards()
    denoiser = Denoiser(FakeRuntime(), SHAPE, conditional=True, null_class=3, classifier=classifier)
    loose = NoiseSchedule(linear_betas(1000), clip=float("inf"))
    plans = [
        build_plan(loose, "ddim", 1, timesteps=[300], guidance=Guidance(classifier_scale=s)) for s in (0, 2)
    ]
    chains = [Chain(plans[0], 1, label=1), Chain(plans[1], 1, label=1)]
    denoiser.launch([Row(one, slot, 0) for slot, one in enumerate(chains)]).read()
    plain, guided = denoiser.latent(0), denoiser.latent(1)
    ac = loose.alphas_cumprod[300]
    expected = 2 * 0.25 * (1 - ac) / ac**0.5
    torch.testing.assert_close(guided.x0 - plain.x0, torch.full(SHAPE, float(expected)), rtol=1e-4, atol=1e-4)
    assert classifier.calls == [([300], [1])]  # only for the guided one


@pytest.mark.parametrize("label", [None, 1])
def test_classifier_guidance_needs_a_classifier_and_a_label(label: int | None) -> None:
    one = chain(label=label, guidance=Guidance(classifier_scale=1.0))
    with pytest.raises(ValueError, match="a classifier and a label"):
        fake().launch([Row(one, 0, 0)]).read()


def test_guidance_without_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a label"):
        fake().launch([Row(chain(guidance_scale=2.0), 0, 0)]).read()


# ── A trained classifier ───────────────────────────────────────────────────────────────────────


def test_the_denoiser_of_a_checkpoint_has_its_classifier(tiny: Checkpoint) -> None:
    assert Denoiser.of(tiny, FakeRuntime()).classifier is None
    classifier = tiny_classifier()
    denoiser = Denoiser.of(replace(tiny, classifier=classifier), FakeRuntime())
    assert denoiser.classifier is not None
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 2])
    before = denoiser.classifier.gradient(x, t, y)
    torch.testing.assert_close(before, classifier.gradient(x, t, y))
    randomise(classifier, seed=9)  # the caller's: the denoiser has its own
    assert torch.equal(denoiser.classifier.gradient(x, t, y), before)


GUIDED = tuple(
    chain(sampler, 6, seed=20 + i, label=i % 3, guidance=Guidance(scale, sigmas, classifier_scale=4.0))
    for i, (sampler, scale, sigmas) in enumerate(
        [
            ("ddim", 1.0, (0.0, 1e9)),
            ("ddpm", 2.0, (0.2, 5.0)),
            ("dpmpp_2m", 1.0, (0.0, 1e9)),
            ("sde_dpmpp_2m", 1.0, (1.0, 1e9)),
            ("ddim", 3.0, (0.0, 1e9)),
            ("ddpm", 1.0, (0.0, 1e9)),
        ]
    )
)


def test_batch_neighbours_do_not_matter_to_classifier_guided_chains(tiny: Checkpoint) -> None:
    denoiser = Denoiser.of(replace(tiny, classifier=tiny_classifier()), FakeRuntime())
    chains = [*GUIDED, *MIXED[:4]]
    for one, history in zip(chains, run_staggered(denoiser, chains), strict=True):
        for mine, expected in zip(history, run_alone(denoiser, one), strict=True):
            assert torch.equal(mine.x, expected.x)
            assert torch.equal(mine.x0, expected.x0)
    unguided = replace(GUIDED[0], plan=build_plan(SCHEDULE, "ddim", 6))
    assert not torch.equal(run_alone(denoiser, GUIDED[0])[-1].x, run_alone(denoiser, unguided)[-1].x)


def test_a_classifier_guides_towards_its_class(tiny: Checkpoint) -> None:
    classifier = tiny_classifier()
    denoiser = Denoiser.of(replace(tiny, classifier=classifier), FakeRuntime())

    def log_p(scale: float) -> float:
        """How sure it is of class 1 at the end."""
        guidance = Guidance(classifier_scale=scale)
        plan = build_plan(SCHEDULE, "ddim", 20, guidance=guidance, use_clipped_model_output=True)
        x = generate(denoiser, [Chain(plan, seed, 1) for seed in range(8)])
        found = torch.log_softmax(classifier(x, torch.zeros(8, dtype=torch.int64)), dim=1)
        return float(found[:, 1].mean())

    assert log_p(0) < log_p(5) < log_p(50)


# ── What pixels and timesteps are to the network ───────────────────────────────────────────────


def test_the_network_is_given_scaled_timesteps() -> None:
    schedule = NoiseSchedule(linear_betas(4000), timestep_scale=0.25)
    denoiser = Denoiser(FakeRuntime(), SHAPE, conditional=False, null_class=None, schedule=schedule)
    generate(denoiser, [Chain(build_plan(schedule, "ddim", 3, timesteps=[3999, 1001, 2]), 0)])
    assert isinstance(denoiser.runtime, FakeRuntime)
    given = [t for _, t, _ in denoiser.runtime.calls]
    assert torch.cat(given).tolist() == [999.75, 250.25, 0.5]


@pytest.mark.parametrize("kind", [TorchRuntime, OpenVinoRuntime])
def test_fractions_of_timesteps_reach_the_network(kind: Any) -> None:
    if kind is OpenVinoRuntime:
        pytest.importorskip("openvino")
    model = tiny_checkpoint(num_class_embeds=None)
    randomise(model.unet)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 7.75])
    with torch.no_grad():
        torch.testing.assert_close(kind(model).forward(x, t, None), model.unet(x, t), rtol=1e-3, atol=1e-4)
        assert (model.unet(x, t) - model.unet(x, t.long())).abs().max() > 1e-3


def test_pixels_are_in_the_data_range() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    image = from_pixels(pixels, (0.0, 1.0))
    assert (image.min(), image.max()) == (0, 1)
    np.testing.assert_array_equal(to_pixels(torch.from_numpy(image), (0.0, 1.0)).transpose(1, 2, 0), pixels)
    np.testing.assert_array_equal(render(torch.from_numpy(image)[None], (0.0, 1.0))[0], pixels)
    for values, expected in ((image - 2, 0), (image + 2, 255)):
        assert (to_pixels(torch.from_numpy(values), (0.0, 1.0)) == expected).all()


def test_errors_are_measured_in_levels_whatever_the_data_range() -> None:
    """A network of the same images in [0, 1] has half the noise, and predicts the same pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    off = pixels // 2
    found = {}
    for data_range in ((-1.0, 1.0), (0.0, 1.0), (-3.0, 1.0)):
        schedule = NoiseSchedule(linear_betas(1000), data_range=data_range, clip=math.inf)
        denoiser = Denoiser(FakeRuntime(), SHAPE, conditional=False, null_class=None, schedule=schedule)
        chains = [measuring(build_measurement(schedule, [500]), from_pixels(pixels, data_range), 0)]
        ((_, found[data_range]),) = denoiser.measure(chains, [0], [from_pixels(off, data_range)])
    error = np.square((pixels.astype(float) - off) / 127.5).mean()
    assert list(found.values()) == pytest.approx([error] * 3, rel=1e-5)


@pytest.mark.parametrize("total", [1, 2])
def test_the_fewest_timesteps_can_be_measured(total: int) -> None:
    schedule = NoiseSchedule(linear_betas(total, 0.5, 0.9))
    denoiser = Denoiser(FakeRuntime(), SHAPE, conditional=False, null_class=None, schedule=schedule)
    chosen = list(range(total))[::-1]
    chains = [measuring(build_measurement(schedule, chosen), IMAGE, 0)]
    for step in range(total):
        ((bits, error),) = denoiser.measure(chains, [step], [IMAGE])
        assert math.isfinite(bits)
        assert error == 0
        denoiser.launch([Row(chains[0], 0, step)]).read()


def test_dynamic_thresholding_brings_an_image_back_into_its_range() -> None:
    schedule = replace(THRESHOLDED, clip=1e4)
    for sampler in ("ddim", "dpmpp_2m"):
        plan = build_plan(schedule, sampler, 4)
        denoiser = fake()
        for step in range(4):
            row = Row(Chain(plan, 3), 0, step, arrays=("x0",))
            x0 = np.abs(denoiser.launch([row]).read()[0].arrays["x0"])
            assert x0.max() <= 1
            if step == 0:  # where the prediction is far outside, a fifth of it is at the bound
                assert (x0 > 0.999).mean() == pytest.approx(0.2, abs=0.02)
