"""From a checkpoint to a warm engine: batch size, step times, and what batch neighbours change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model import runtimes
from model.chain import Chain
from model.checkpoint import CheckpointError, save
from model.denoiser import Denoiser, Stepped
from model.encoder import NoiseClassifier
from model.runtimes import RuntimeUnavailableError
from model.state import Row
from service.engine import warmup
from service.engine.messages import AddJob, EngineConfig, Event, Failed, Finished, Invariance
from service.engine.warmup import Warm, load, measure_invariance, model_info, warm_up
from service.errors import ComputeError
from service.http.info import describe
from service.http.state import capabilities_of
from service.tasks.generate import GenerateRequest, prepare_generate
from tests.service.fakes import FakeDenoiser, job_of, tiny_classifier, tiny_model
from tests.service.live import settings


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time every batch size once: how long steps take does not matter to most tests. And four cores."""
    monkeypatch.setattr(warmup, "TIMING_S", 0.0)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def config(**values: Any) -> EngineConfig:
    return EngineConfig(**{"model": "tiny", "device": "cpu", "runtime": "torch", **values})


def warm(**values: Any) -> Warm:
    return warm_up(tiny_model(), config(**values))


def drain(warm: Warm) -> list[Event]:
    events: list[Event] = []
    while (report := warm.engine.step()) is not None:
        events += report.events
    return events


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
        warm(runtime=runtime, max_batch=1)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_torch_is_not_padded_where_invariance_is_not_asked_for() -> None:
    found = warm(max_batch=4, batch_invariant=False)
    assert runtime_of(found).batch_sizes == ()
    assert [size for size, _ in found.info.step_times] == [1, 2, 4]
    assert all(seconds > 0 for _, seconds in found.info.step_times)


@pytest.mark.parametrize("invariant", [True, False])
def test_tf32_is_allowed_only_where_invariance_is_not_asked_for(
    invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[bool] = []
    load_runtime: Any = runtimes.load_runtime

    def loaded(*given: Any, tf32: bool, **options: Any) -> Any:
        allowed.append(tf32)
        return load_runtime(*given, tf32=tf32, **options)

    monkeypatch.setattr(warmup, "load_runtime", loaded)
    warm(max_batch=1, batch_invariant=invariant)
    assert allowed == [not invariant]


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
    found = warm(max_batch=2)
    found.engine.handle(AddJob(job_of("a", [1], steps=2, guidance_scale=2.0)))
    assert [type(event) for event in drain(found)] == [Finished]


def test_a_warm_engine_has_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none of them is made while steps are on their way."""
    found = warm(max_batch=2, slots=7)
    denoiser = found.engine.denoiser
    assert isinstance(denoiser, Denoiser)
    assert len(denoiser.slots) == 7
    monkeypatch.setattr(denoiser.slots, "_grown", None)
    found.engine.handle(AddJob(job_of("a", range(7), steps=2)))
    assert [type(event) for event in drain(found)] == [Finished]


def test_a_network_that_fails_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise ValueError("not today")

    monkeypatch.setattr(runtimes.TorchRuntime, "forward", broken)
    with pytest.raises(RuntimeError, match="the network fails on 1 rows"):
        warm(max_batch=1)


def test_a_timed_step_is_one_of_the_engine_with_a_preview_of_each_sample() -> None:
    denoiser = FakeDenoiser()
    chains = job_of("a", range(3), steps=4).stages[0].chains
    assert warmup._time_step(denoiser, chains) > 0  # type: ignore[arg-type]  # a fake in its place
    assert denoiser.widths == [3, 3, 3]
    assert [[row.step for row in rows] for rows in denoiser.launched] == [[0] * 3, [1] * 3, [2] * 3]
    assert {(row.slot, row.pictures) for row in denoiser.launched[0]} == {(i, ("x0",)) for i in range(3)}
    warmup._time_step(denoiser, chains[:2], repeats=0)  # type: ignore[arg-type]
    assert denoiser.widths == [3, 3, 3, 2]


def test_a_short_plan_is_timed_as_far_as_it_goes() -> None:
    denoiser = FakeDenoiser()
    warmup._time_step(denoiser, job_of("a", [1], steps=1).stages[0].chains)  # type: ignore[arg-type]
    assert denoiser.widths == [1]


@pytest.mark.parametrize("seeds", [[1, 2, 3], [1]], ids=["three", "a single one, which is padded"])
def test_out_of_memory_lowers_the_padding_too(monkeypatch: pytest.MonkeyPatch, seeds: list[int]) -> None:
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
    job = job_of("a", seeds, steps=1)
    found.engine.handle(AddJob(job))
    events = drain(found)
    assert [type(event) for event in events] == [Finished], events
    assert found.engine.scheduler.max_batch_size in (1, 2)
    assert runtime.batch_sizes == (found.engine.scheduler.max_batch_size,)


def test_another_batch_limit_leaves_the_smaller_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU has them where invariance is not asked for: small batches are not padded to the limit."""
    monkeypatch.setattr(warmup, "_recorded", lambda _runtime, sizes: tuple(sizes))
    found = warm(max_batch=8, batch_invariant=False)
    runtime: Any = runtime_of(found)
    assert runtime.batch_sizes == (1, 2, 4, 8)
    found.engine.on_batch_limit(3)
    assert runtime.batch_sizes == (1, 2, 3)
    found.engine.on_batch_limit(6)
    assert runtime.batch_sizes == (1, 2, 4, 6)


def test_the_one_shape_of_all_calls_comes_back_with_the_batch_limit() -> None:
    found = warm(max_batch=8)
    runtime: Any = runtime_of(found)
    for limit in (4, 8):
        found.engine.on_batch_limit(limit)
        assert runtime.batch_sizes == (limit,)


@pytest.mark.parametrize(
    ("options", "grows"),
    [({"runtime": "openvino"}, True), ({"runtime": "openvino", "max_batch": 2}, False), ({}, False)],
    ids=["measured", "set", "one shape"],
)
def test_a_limit_that_was_measured_may_grow(
    options: dict[str, Any], grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that is busy at the start small batches look best. No result may depend on it, though."""
    monkeypatch.setattr(warmup, "_time_step", lambda _denoiser, chains, **_: max(0.001, len(chains) - 1.5))
    found = warm(**options)
    assert found.engine.scheduler.max_batch_size in (1, 2)
    assert found.engine.widest == (max(warmup.cpu_batch_sizes()) if grows else found.info.max_batch_size)


def test_a_batch_that_does_not_fit_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    real, widths = runtimes.TorchRuntime.forward, []

    def cramped(
        runtime: runtimes.TorchRuntime, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None
    ) -> torch.Tensor:
        widths.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("too wide")
        return real(runtime, x, t, y)

    monkeypatch.setattr(runtimes.TorchRuntime, "forward", cramped)
    found = warm()
    assert found.engine.scheduler.max_batch_size in (1, 2)
    assert max(widths) == 4
    found.engine.handle(AddJob(job_of("a", [1, 2, 3], steps=2)))
    assert [type(event) for event in drain(found)] == [Finished]
    with pytest.raises(RuntimeError, match="the network fails on 4 rows"):
        warm(max_batch=4)


@pytest.mark.parametrize(
    ("name", "invariant", "expected"),
    [("torch", True, (8,)), ("torch", False, (1, 2, 4, 8)), ("torch-compile", False, (8,))],
)
def test_the_shapes_of_a_gpu(name: str, invariant: bool, expected: tuple[int, ...]) -> None:
    gpu: Any = SimpleNamespace(name=name, device=torch.device("cuda"), recorder=object())
    assert warmup._shapes(gpu, (1, 2, 4, 8, 16, 32), 8, invariant=invariant) == expected
    assert warmup._recorded(gpu, (1, 2, 4)) == (1, 2, 4), "timed as they will be served"


def test_slots_are_reserved_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded steps are forgotten when there are more: what was timed would have to be recorded anew."""
    found: list[int] = []

    def timed(denoiser: Denoiser, *_: Any) -> float:
        found.append(len(denoiser.slots))
        return 1.0

    monkeypatch.setattr(warmup, "_time_step", timed)
    warm(max_batch=4, slots=300)
    assert set(found) == {300}


@pytest.mark.gpu
def test_a_warm_gpu_has_recorded_what_it_serves() -> None:
    found = warm(device="cuda", max_batch=4, batch_invariant=False, slots=300)
    denoiser = found.engine.denoiser
    assert isinstance(denoiser, Denoiser)
    assert {width for width, *_ in denoiser._recordings} == {1, 2, 4}
    kept = dict(denoiser._recordings)
    found.engine.handle(AddJob(job_of("a", [1, 2, 3], steps=3)))
    assert [type(event) for event in drain(found)] == [Finished]
    assert denoiser._recordings == kept


def test_a_class_model_without_a_null_class_warms_up() -> None:
    found = warm_up(tiny_model(guided=False), config(max_batch=1))
    assert found.engine.scheduler.max_batch_size == 1
    found.engine.handle(AddJob(job_of("a", [1], steps=1)))
    (event,) = drain(found)
    assert isinstance(event, Failed)  # it has no unconditional branch; such a request is refused on admission
    assert isinstance(event.error, ComputeError)


def test_an_unconditional_model_warms_up() -> None:
    found = warm_up(tiny_model(guided=False, classes=0), config(max_batch=2))
    info = describe(capabilities_of(found.model, settings()), settings(), found.info)
    assert info["model"]["classes"] == []
    assert info["model"]["guidance"] is False
    assert info["limits"]["max_batch"] == 2
    assert info["batch_invariance"] == {"invariant": True, "max_abs_difference": 0.0, "batch_sizes": [2]}


def test_openvino_is_invariant_at_any_batch_size() -> None:
    pytest.importorskip("openvino")
    found = warm(runtime="openvino", max_batch=4)
    assert found.info.runtime == "openvino"
    assert runtime_of(found).batch_sizes == ()
    assert found.info.invariance.holds


# ── Learned variances and guidance by a classifier ────────────────────────────────────────────


def finished(found: Warm, **requests: dict[str, Any]) -> dict[str, list[bytes]]:
    """Each request's pixels, all of them run side by side."""
    known = capabilities_of(found.model, settings())
    specs = {
        name: replace(prepare_generate(GenerateRequest(**body), known).spec, preview="none")
        for name, body in requests.items()
    }
    for spec in specs.values():
        found.engine.handle(AddJob(spec))
    events = drain(found)
    assert not [event for event in events if isinstance(event, Failed)]
    results = {event.job_id: event.pictures for event in events if isinstance(event, Finished)}
    return {name: [p.pixels.tobytes() for p in results[spec.id]] for name, spec in specs.items()}


DDPM = {"sampler": "ddpm", "num_inference_steps": 5, "seed": 1, "n": 2, "class_label": 1}


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_network_that_learned_its_variance_is_served(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = tiny_model(learned=True)
    found = warm_up(model, config(runtime=runtime, max_batch=4))
    assert found.info.invariance.holds
    guided = {**DDPM, "guidance_scale": 3.0}
    together = finished(found, plain=DDPM, guided=guided, ddim={**DDPM, "sampler": "ddim"})
    assert len({image for images in together.values() for image in images}) == 6
    assert finished(found, plain=DDPM)["plain"] == together["plain"]
    # Its variance is what it says: the same network without it gives other images.
    fixed = replace(model, schedule=replace(model.schedule, variance_type="fixed_small"))
    found = warm_up(fixed, config(runtime=runtime, max_batch=4))
    assert finished(found, plain=DDPM)["plain"] != together["plain"]
    assert finished(found, ddim={**DDPM, "sampler": "ddim"})["ddim"] == together["ddim"]


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_classifier_guides_what_asks_for_it_and_nothing_else(runtime: str) -> None:
    pytest.importorskip("openvino")
    model = replace(tiny_model(), classifier=tiny_classifier())
    chosen = config(runtime=runtime, max_batch=4)
    found = warm_up(model, chosen)
    assert found.info.invariance.holds
    assert (
        describe(capabilities_of(found.model, settings()), settings(), found.info)["model"]["classifier"]
        is True
    )
    guided = {**DDPM, "guidance_scale": 1.0, "classifier_scale": 20.0}
    plain = {**guided, "classifier_scale": 0.0}
    together = finished(found, guided=guided, plain=plain, other={**guided, "sampler": "dpmpp_2m", "n": 3})
    assert together["guided"] != together["plain"]
    # The same bytes alone, and one by one.
    assert finished(found, guided=guided)["guided"] == together["guided"]
    assert finished(found, second={**guided, "seed": 2, "n": 1})["second"] == together["guided"][1:]
    without = replace(model, classifier=None)
    found = warm_up(without, chosen)
    assert finished(found, plain=plain)["plain"] == together["plain"]


def test_the_gradients_are_part_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: NoiseClassifier, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x.mean(0, keepdim=True).expand_as(x)

    monkeypatch.setattr(NoiseClassifier, "gradient", leaky)
    model = replace(tiny_model(), classifier=tiny_classifier())
    found = warm_up(model, config(max_batch=4))
    assert not found.info.invariance.holds


# ── The measurement can fail ───────────────────────────────────────────────────────────────────


class Leaky(FakeDenoiser):
    """What the first of two or more gets depends on its batch neighbours."""

    leak = 1e-6

    def step(self, rows: Sequence[Row]) -> list[Stepped]:
        done = super().step(rows)
        if len(rows) > 2 and rows[0].arrays:
            xt = done[0].arrays["xt"]
            xt += np.float32(self.leak)
        return done


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
    made = warm(max_batch=64, runtime="openvino")
    assert timed == [1, 2, 4, 64]
    assert made.engine.scheduler.max_batch_size == 64


# ── What is loaded, and what is said of it ─────────────────────────────────────────────────────


@pytest.mark.parametrize(("classes", "guided"), [(3, True), (3, False), (0, False)])
@pytest.mark.parametrize("classified", [False, True])
def test_what_the_service_has_to_know_of_a_model(classes: int, guided: bool, classified: bool) -> None:
    model = tiny_model(guided=guided, classes=classes)
    if classified:
        model = replace(model, classifier=tiny_classifier())
    found = model_info(model)
    assert (found.name, found.shape) == ("tiny", (1, 8, 8))
    assert found.class_names == ("cat", "dog", "Ankle Boot")[:classes]
    assert (found.conditional, found.guided, found.classified) == (classes > 0, guided, classified)
    assert found.schedule is model.schedule
    assert found.typicality is None
    assert found.parameters == sum(weights.numel() for weights in model.unet.state_dict().values())


def folder(at: Path) -> str:
    save(at, tiny_model())
    return str(at)


def test_a_folder_is_loaded_and_warmed_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = config(model=folder(tmp_path / "mini"), max_batch=2)
    with caplog.at_level("INFO"):
        found = warm_up(load(wanted), wanted)
    assert "DDPMScheduler: the sampler is dpmpp_2m where a request names none" in caplog.text
    assert found.model.sampler == "dpmpp_2m"
    assert (found.model.name, found.info.model, found.devices) == ("mini", "mini", 1)
    known, original = found.model, model_info(tiny_model())
    assert (known.class_names, known.parameters) == (original.class_names, original.parameters)
    assert known.schedule.betas.tobytes() == original.schedule.betas.tobytes()
    made = warm(max_batch=2)
    assert finished(found, ddpm=DDPM) == finished(made, ddpm=DDPM)


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(config(model=str(tmp_path)))


@pytest.mark.parametrize(
    "values",
    [
        {"device": "cuda:99"},
        {"device": "meta", "runtime": "openvino"},
        {"runtime": "openvino", "dtype": "float16"},
    ],
)
def test_what_the_machine_cannot_do_is_said_before_anything_is_loaded(values: dict[str, str]) -> None:
    with pytest.raises(RuntimeUnavailableError):
        load(config(model="nowhere", **values))
