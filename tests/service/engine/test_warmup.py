"""From a checkpoint to a warm engine: batch size, step times, and what batch neighbours change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import runtimes
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, Latent
from model.encoder import NoiseClassifier
from service.app import model_capabilities
from service.engine import warmup
from service.engine.messages import AddJob, Failed, Finished, Invariance
from service.engine.warmup import Warm, measure_invariance, warm_up
from service.errors import ComputeError
from service.http.info import describe
from service.tasks.generate import GenerateRequest, prepare_generate
from tests.service.fakes import FakeDenoiser, job_of, tiny_classifier, tiny_model
from tests.service.live import settings


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time every batch size once: how long steps take does not matter to most tests. And four cores."""
    monkeypatch.setattr(warmup, "TIMING_S", 0.0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def warm(**values: Any) -> Warm:
    return warm_up(tiny_model(), settings(runtime="torch", device="cpu", **values))


def runtime_of(warm: Warm) -> runtimes.Runtime:
    assert isinstance(warm.engine.denoiser, Denoiser)
    return warm.engine.denoiser.runtime


def test_torch_is_padded_to_its_largest_batch_and_invariant() -> None:
    found = warm(max_batch=4)
    assert (found.info.runtime, found.info.device, found.info.dtype) == ("torch", "cpu", "float32")
    assert found.engine.scheduler.max_batch_size == 4
    assert runtime_of(found).batch_sizes == (4,)
    assert [size for size, _ in found.info.step_times] == [4]
    assert found.info.invariance == Invariance((2, 3, 4), 0.0)
    assert found.info.invariance.holds


@pytest.mark.parametrize("policy", ["remaining", "fifo", "sharing"])
def test_the_policy_is_the_one_that_was_asked_for(policy: str) -> None:
    assert warm(max_batch=1, policy=policy).engine.scheduler.policy == policy


@pytest.mark.parametrize(("runtime", "threads"), [("openvino", 1), ("torch", 2)])
def test_torch_has_one_thread_beside_openvino(runtime: str, threads: int) -> None:
    pytest.importorskip("openvino")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        warm_up(tiny_model(), settings(runtime=runtime, device="cpu", max_batch=1))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_torch_is_not_padded_where_invariance_is_not_asked_for() -> None:
    found = warm(max_batch=4, batch_invariant=False)
    assert runtime_of(found).batch_sizes == ()
    assert [size for size, _ in found.info.step_times] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in found.info.step_times)


def test_the_batch_size_follows_the_times_of_unpadded_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[tuple[int, tuple[int, ...]]] = []

    def timed(denoiser: Denoiser, chains: Sequence[Chain]) -> float:
        shapes.append((len(chains), denoiser.runtime.batch_sizes))
        return {1: 1.0, 2: 1.1, 4: 1.2}.get(len(chains), float(len(chains)))

    monkeypatch.setattr(warmup, "_time_step", timed)
    found = warm()
    assert found.engine.scheduler.max_batch_size == 4
    assert shapes == [(1, ()), (2, ()), (4, ()), (8, ()), (16, ()), (4, (4,))]


@pytest.mark.parametrize(("cores", "largest"), [(None, 8), (1, 8), (2, 8), (8, 32), (64, 64)])
def test_more_cores_are_offered_larger_batches(
    cores: int | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(warmup, "_time_step", lambda *_: 1.0)  # every batch size takes as long
    assert warm(batch_invariant=False).engine.scheduler.max_batch_size == largest


def test_a_disturbed_first_timing_does_not_decide_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    timings: list[int] = []

    def timed(_denoiser: Denoiser, chains: Sequence[Chain], repeats: int = 2) -> float:
        timings.append(repeats)
        rows = len(chains)
        disturbed = rows in (4, 8) and timings.count(0) < 4  # until every size has been timed again
        return (1.0 if rows == 1 else 1.2) * (20 if disturbed else 1) * (2 if rows == 8 else 1)

    monkeypatch.setattr(warmup, "_time_step", timed)
    monkeypatch.setattr(warmup, "TIMING_S", 0.02)
    found = warm(batch_invariant=False)
    assert found.engine.scheduler.max_batch_size == 4
    assert dict(found.info.step_times) == {1: 1.0, 2: 1.2, 4: 1.2, 8: 2.4}


def test_a_warm_engine_runs() -> None:
    engine = warm(max_batch=2).engine
    job = job_of("a", [1], steps=2, guidance_scale=2.0)
    engine.handle(AddJob(job))
    engine.step()
    report = engine.step()
    assert report is not None
    assert [type(event) for event in report.events] == [Finished]


def test_out_of_memory_lowers_the_padding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = warm(max_batch=4)
    runtime = runtime_of(found)
    real, widths = type(runtime).forward, []

    def cramped(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        width = max([len(x), *runtime.batch_sizes])
        widths.append(width)
        if width > 2:
            raise torch.OutOfMemoryError("too wide")
        return real(runtime, x, t, y)

    monkeypatch.setattr(runtime, "forward", cramped)
    job = job_of("a", [1, 2, 3], steps=1)
    found.engine.handle(AddJob(job))
    events = []
    while (report := found.engine.step()) is not None:
        events += report.events
    assert [type(event) for event in events] == [Finished], events
    assert found.engine.scheduler.max_batch_size in (1, 2)
    assert runtime.batch_sizes == (found.engine.scheduler.max_batch_size,)


def test_a_class_model_without_a_null_class_warms_up() -> None:
    found = warm_up(tiny_model(guided=False), settings(runtime="torch", device="cpu", max_batch=1))
    assert found.engine.scheduler.max_batch_size == 1
    job = job_of("a", [1], steps=1)
    found.engine.handle(AddJob(job))
    report = found.engine.step()
    assert report is not None
    (event,) = report.events
    assert isinstance(event, Failed)  # it has no unconditional branch; such a request is refused on admission
    assert isinstance(event.error, ComputeError)


def test_an_unconditional_model_warms_up() -> None:
    model = tiny_model(guided=False, classes=0)
    chosen = settings(runtime="torch", device="cpu", max_batch=2)
    found = warm_up(model, chosen)
    info = describe(model_capabilities(model, chosen), chosen, found.info)
    assert info["model"]["classes"] == []
    assert info["model"]["guidance"] is False
    assert info["limits"]["max_batch"] == 2
    assert info["batch_invariance"] == {"invariant": True, "max_abs_difference": 0.0, "batch_sizes": [2]}


def test_openvino_is_invariant_at_any_batch_size() -> None:
    pytest.importorskip("openvino")
    found = warm_up(tiny_model(), settings(runtime="openvino", max_batch=4))
    assert found.info.runtime == "openvino"
    assert runtime_of(found).batch_sizes == ()
    assert found.info.invariance.holds


# ── Learned variances and guidance by a classifier ────────────────────────────────────────────


def finished(found: Warm, model: Checkpoint, **requests: dict[str, Any]) -> dict[str, list[bytes]]:
    """Each request's pixels, all of them run side by side."""
    known = model_capabilities(model, settings())
    specs = {
        name: replace(prepare_generate(GenerateRequest(**body), known).spec, preview="none")
        for name, body in requests.items()
    }
    for spec in specs.values():
        found.engine.handle(AddJob(spec))
    results: dict[str, Any] = {}
    while (report := found.engine.step()) is not None:
        assert not [event for event in report.events if isinstance(event, Failed)]
        results |= {event.job_id: event.pictures for event in report.events if isinstance(event, Finished)}
    return {name: [p.pixels.tobytes() for p in results[spec.id]] for name, spec in specs.items()}


DDPM = {"sampler": "ddpm", "num_inference_steps": 5, "seed": 1, "n": 2, "class_label": 1}


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_network_that_learned_its_variance_is_served(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = tiny_model(learned=True)
    found = warm_up(model, settings(runtime=runtime, device="cpu", max_batch=4))
    assert found.info.invariance.holds
    guided = {**DDPM, "guidance_scale": 3.0}
    together = finished(found, model, plain=DDPM, guided=guided, ddim={**DDPM, "sampler": "ddim"})
    assert len({image for images in together.values() for image in images}) == 6
    assert finished(found, model, plain=DDPM)["plain"] == together["plain"]
    # Its variance is what it says: the same network without it gives other images.
    fixed = replace(model, schedule=replace(model.schedule, variance_type="fixed_small"))
    found = warm_up(fixed, settings(runtime=runtime, device="cpu", max_batch=4))
    assert finished(found, fixed, plain=DDPM)["plain"] != together["plain"]
    assert finished(found, fixed, ddim={**DDPM, "sampler": "ddim"})["ddim"] == together["ddim"]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_classifier_guides_what_asks_for_it_and_nothing_else(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = replace(tiny_model(), classifier=tiny_classifier())
    chosen = settings(runtime=runtime, device="cpu", max_batch=4)
    found = warm_up(model, chosen)
    assert found.info.invariance.holds
    assert describe(model_capabilities(model, chosen), chosen, found.info)["model"]["classifier"] is True
    guided = {**DDPM, "guidance_scale": 1.0, "classifier_scale": 20.0}
    plain = {**guided, "classifier_scale": 0.0}
    together = finished(
        found, model, guided=guided, plain=plain, other={**guided, "sampler": "dpmpp_2m", "n": 3}
    )
    assert together["guided"] != together["plain"]
    # The same bytes alone, and one by one.
    assert finished(found, model, guided=guided)["guided"] == together["guided"]
    assert finished(found, model, second={**guided, "seed": 2, "n": 1})["second"] == together["guided"][1:]
    without = replace(model, classifier=None)
    found = warm_up(without, chosen)
    assert finished(found, without, plain=plain)["plain"] == together["plain"]


def test_the_gradients_are_part_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: NoiseClassifier, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True).expand_as(x)

    monkeypatch.setattr(NoiseClassifier, "gradient", leaky)
    model = replace(tiny_model(), classifier=tiny_classifier())
    found = warm_up(model, settings(runtime="torch", device="cpu", max_batch=4))
    assert not found.info.invariance.holds


# ── The measurement can fail ───────────────────────────────────────────────────────────────────


class Leaky(FakeDenoiser):
    """What the first of two or more gets depends on its batch neighbours."""

    leak = 1e-6

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], steps: Sequence[int]
    ) -> Sequence[Latent]:
        out = super().step(chains, latents, steps)
        if len(chains) > 2:
            out[0].x.add_(self.leak)
        return out


@pytest.mark.parametrize(("leak", "difference"), [(1e-6, 1e-6), (float("nan"), float("nan"))])
def test_a_difference_is_found(leak: float, difference: float) -> None:
    denoiser = Leaky()
    denoiser.leak = leak
    chains: list[Any] = list(job_of("a", range(4)).stages[0].chains)
    found = measure_invariance(denoiser, chains, 4)  # type: ignore[arg-type]  # a fake in its place
    assert found.max_abs_difference == pytest.approx(difference, rel=0.3, nan_ok=True)
    assert not found.holds
    assert measure_invariance(FakeDenoiser(), chains, 4).holds  # type: ignore[arg-type]  # the same


def test_sizes_without_gain_are_not_timed_but_the_asked_for_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []

    def in_proportion(_: Any, chains: Sequence[Any]) -> float:
        timed.append(len(chains))
        return 0.01 * len(chains)

    monkeypatch.setattr(warmup, "_time_step", in_proportion)
    made = warm_up(tiny_model(), settings(max_batch=64, runtime="openvino"))
    assert timed == [1, 2, 4, 64]
    assert made.engine.scheduler.max_batch_size == 64
