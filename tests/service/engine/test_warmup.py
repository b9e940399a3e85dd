"""From a checkpoint to a warm engine: how wide, how fast, and how far mates change a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from service.events import Failed, Finished
from service.schemas import GenerateRequest, to_job
from service.warmup import Invariance, Warm, measure_invariance, warm_up

from model import runtimes
from model.checkpoint import Checkpoint
from model.denoiser import Chain, Denoiser, Latent
from model.encoder import NoiseClassifier
from service import warmup
from service.app import describe, describe_model
from service.errors import ComputeError
from tests.service.fakes import FakeDenoiser, job_of, tiny_classifier, tiny_model
from tests.service.live import settings


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at every width: how long steps take is no concern of most tests. And four cores."""
    monkeypatch.setattr(warmup, "TIMING_S", 0.0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def warm(**values: Any) -> Warm:
    return warm_up(tiny_model(), settings(runtime="torch", device="cpu", **values))


def runtime_of(warm: Warm) -> runtimes.Runtime:
    assert isinstance(warm.engine.denoiser, Denoiser)
    return warm.engine.denoiser.runtime


def test_torch_is_padded_to_its_widest_step_and_invariant() -> None:
    found = warm(max_batch=4)
    assert (found.runtime, found.device, found.dtype) == ("torch", "cpu", "float32")
    assert found.engine.scheduler.max_rows == 4
    assert runtime_of(found).batch_sizes == (4,)
    assert [rows for rows, _ in found.step_times] == [4]
    assert found.invariance == Invariance((2, 3, 4), 0.0)
    assert found.invariance.holds


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


def test_or_not_padded_when_nobody_asks_for_it() -> None:
    found = warm(max_batch=4, batch_invariant=False)
    assert runtime_of(found).batch_sizes == ()
    assert [rows for rows, _ in found.step_times] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in found.step_times)


def test_the_width_follows_the_times_of_steps_that_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, tuple[int, ...]]] = []

    def timed(denoiser: Denoiser, chains: Sequence[Chain]) -> float:
        shapes.append((len(chains), denoiser.runtime.batch_sizes))
        return {1: 1.0, 2: 1.1, 4: 1.2}.get(len(chains), float(len(chains)))

    monkeypatch.setattr(warmup, "_time_step", timed)
    found = warm()
    assert found.engine.scheduler.max_rows == 4
    assert shapes == [(1, ()), (2, ()), (4, ()), (8, ()), (16, ()), (4, (4,))]


@pytest.mark.parametrize(("cores", "widest"), [(None, 8), (1, 8), (2, 8), (8, 32), (64, 64)])
def test_more_cores_are_offered_wider_steps(
    cores: int | None, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(warmup, "_time_step", lambda *_: 1.0)  # every width takes as long
    assert warm(batch_invariant=False).engine.scheduler.max_rows == widest


def test_a_disturbed_first_look_does_not_decide_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def timed(_denoiser: Denoiser, chains: Sequence[Chain], repeats: int = 2) -> float:
        looks.append(repeats)
        rows = len(chains)
        disturbed = rows in (4, 8) and looks.count(0) < 4  # until every width has had another look
        return (1.0 if rows == 1 else 1.2) * (20 if disturbed else 1) * (2 if rows == 8 else 1)

    monkeypatch.setattr(warmup, "_time_step", timed)
    monkeypatch.setattr(warmup, "TIMING_S", 0.02)
    found = warm(batch_invariant=False)
    assert found.engine.scheduler.max_rows == 4
    assert dict(found.step_times) == {1: 1.0, 2: 1.2, 4: 1.2, 8: 2.4}


def test_a_warm_engine_runs() -> None:
    engine = warm(max_batch=2).engine
    job = job_of("a", [1], steps=2, guidance_scale=2.0)
    engine.scheduler.add(job, job.created)
    engine.step()
    report = engine.step()
    assert report is not None
    assert [type(event) for event in report.events] == [Finished]


def test_out_of_memory_narrows_the_padding_too(monkeypatch: pytest.MonkeyPatch) -> None:
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
    found.engine.scheduler.add(job, job.created)
    events = []
    while (report := found.engine.step()) is not None:
        events += report.events
    assert [type(event) for event in events] == [Finished], events
    assert found.engine.scheduler.max_rows in (1, 2)
    assert runtime.batch_sizes == (found.engine.scheduler.max_rows,)


def test_a_class_model_without_a_null_class_warms_up() -> None:
    found = warm_up(tiny_model(guided=False), settings(runtime="torch", device="cpu", max_batch=1))
    assert found.engine.scheduler.max_rows == 1
    job = job_of("a", [1], steps=1)
    found.engine.scheduler.add(job, job.created)
    report = found.engine.step()
    assert report is not None
    (event,) = report.events
    assert isinstance(event, Failed)  # it has no unconditional branch; the door refuses such a request
    assert isinstance(event.error, ComputeError)


def test_an_unconditional_model_warms_up() -> None:
    model = tiny_model(guided=False, classes=0)
    chosen = settings(runtime="torch", device="cpu", max_batch=2)
    found = warm_up(model, chosen)
    facts = describe(describe_model(model, chosen), chosen, found)
    assert facts["model"]["classes"] == []
    assert facts["model"]["guidance"] is False
    assert facts["limits"]["max_batch"] == 2
    assert facts["batch_invariance"] == {"invariant": True, "max_abs_difference": 0.0, "batch_sizes": [2]}


def test_openvino_is_invariant_at_any_width() -> None:
    pytest.importorskip("openvino")
    found = warm_up(tiny_model(), settings(runtime="openvino", max_batch=4))
    assert found.runtime == "openvino"
    assert runtime_of(found).batch_sizes == ()
    assert found.invariance.holds


# ── Networks that say more, and networks that are led ─────────────────────────────────────────


def finished(found: Warm, model: Checkpoint, **requests: dict[str, Any]) -> dict[str, list[bytes]]:
    """Each request's pixels, all of them run side by side."""
    known = describe_model(model, settings())
    orders = {name: to_job(GenerateRequest(**body), known, streamed=False) for name, body in requests.items()}
    for order in orders.values():
        found.engine.scheduler.add(order.job, order.job.created)
    results: dict[str, Any] = {}
    while (report := found.engine.step()) is not None:
        assert not [event for event in report.events if isinstance(event, Failed)]
        results |= {event.job_id: event.pictures for event in report.events if isinstance(event, Finished)}
    return {name: [p.pixels.tobytes() for p in results[order.job.id]] for name, order in orders.items()}


DDPM = {"sampler": "ddpm", "num_inference_steps": 5, "seed": 1, "n": 2, "class_label": 1}


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_network_that_learned_its_variance_is_served(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = tiny_model(learned=True)
    found = warm_up(model, settings(runtime=runtime, device="cpu", max_batch=4))
    assert found.invariance.holds
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
def test_a_classifier_leads_what_asks_for_it_and_nothing_else(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = replace(tiny_model(), classifier=tiny_classifier())
    chosen = settings(runtime=runtime, device="cpu", max_batch=4)
    found = warm_up(model, chosen)
    assert found.invariance.holds
    assert describe(describe_model(model, chosen), chosen, found)["model"]["classifier"] is True
    led = {**DDPM, "guidance_scale": 1.0, "classifier_scale": 20.0}
    plain = {**led, "classifier_scale": 0.0}
    together = finished(found, model, led=led, plain=plain, other={**led, "sampler": "dpmpp_2m", "n": 3})
    assert together["led"] != together["plain"]
    # The same bytes alone, and one by one.
    assert finished(found, model, led=led)["led"] == together["led"]
    assert finished(found, model, second={**led, "seed": 2, "n": 1})["second"] == together["led"][1:]
    without = replace(model, classifier=None)
    found = warm_up(without, chosen)
    assert finished(found, without, plain=plain)["plain"] == together["plain"]


def test_the_gradients_are_part_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: NoiseClassifier, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True).expand_as(x)

    monkeypatch.setattr(NoiseClassifier, "gradient", leaky)
    model = replace(tiny_model(), classifier=tiny_classifier())
    found = warm_up(model, settings(runtime="torch", device="cpu", max_batch=4))
    assert not found.invariance.holds


# ── The measurement can fail ───────────────────────────────────────────────────────────────────


class Leaky(FakeDenoiser):
    """What the first of two or more gets depends on its mates."""

    leak = 1e-6

    def step(
        self, chains: Sequence[Chain], latents: Sequence[Latent], rows: Sequence[int]
    ) -> Sequence[Latent]:
        out = super().step(chains, latents, rows)
        if len(chains) > 2:
            out[0].x.add_(self.leak)
        return out


@pytest.mark.parametrize(("leak", "difference"), [(1e-6, 1e-6), (float("nan"), float("nan"))])
def test_a_difference_is_found(leak: float, difference: float) -> None:
    denoiser = Leaky()
    denoiser.leak = leak
    chains: list[Any] = [sample.chain for sample in job_of("a", range(4)).samples]
    found = measure_invariance(denoiser, chains, 4)  # type: ignore[arg-type]  # a fake in its place
    assert found.max_abs_difference == pytest.approx(difference, rel=0.3, nan_ok=True)
    assert not found.holds
    assert measure_invariance(FakeDenoiser(), chains, 4).holds  # type: ignore[arg-type]  # the same


def test_widths_that_bring_nothing_are_not_timed_but_the_asked_for_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []

    def in_proportion(_: Any, chains: Sequence[Any]) -> float:
        timed.append(len(chains))
        return 0.01 * len(chains)

    monkeypatch.setattr(warmup, "_time_step", in_proportion)
    made = warm_up(tiny_model(), settings(max_batch=64, runtime="openvino"))
    assert timed == [1, 2, 4, 64]
    assert made.engine.scheduler.max_rows == 64
