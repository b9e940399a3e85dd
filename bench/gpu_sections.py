"""What `bench.gpu` checks and measures: a function for each section, which yields (name, figure) as it goes.

Names are paths, such as "tf32/recorded/64". What was yielded before a section fails or is stopped is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.http import metric, saturate
from bench.roofline import CIFAR10_32, inputs
from model import checkpoint, device_noise, noise
from model.chain import Chain
from model.checkpoint import Checkpoint
from model.denoiser import Denoiser, generate
from model.noise import NoiseStream
from model.runtimes import TORCH_DTYPES, DtypeName, Recorded, TorchRuntime
from model.samplers import Guidance, build_plan
from model.unet import UNet, UNetConfig

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "weights" / "fashion-mnist"
Figures = Iterator[tuple[str, Any]]
Network = Literal["ours", "cifar10-32", "celebahq-256"]
PRECISIONS: dict[str, tuple[DtypeName, bool]] = {
    "float32": ("float32", False),
    "tf32": ("float32", True),
    "bfloat16": ("bfloat16", False),
    "float16": ("float16", False),
}
"""The runtime's dtype, and whether TF32 is allowed."""
CELEBAHQ_256 = replace(
    CIFAR10_32,
    sample_size=(256, 256),
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
)
TESTS_S = 110.0
SAMPLERS = {"dpmpp_2m": 20, "ddpm": 50}


@dataclass(frozen=True)
class Scale:
    """How much is done. A simulation does a little of everything on the CPU."""

    device: str = "cuda"
    seconds: float = 0.15  # of each rate of a network
    http_s: float = 3.0
    rows: dict[Network, tuple[int, ...]] = field(
        default_factory=lambda: {
            "ours": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "cifar10-32": (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "celebahq-256": (1, 2, 4, 8, 16, 32),
        }
    )
    product: int = 8192  # rows and columns of the matrices whose product is the card's limit
    clients: int = 96
    images: tuple[int, ...] = (1, 64)  # of a call of a pipeline
    steps: int = 50  # of its images
    long: int = 1000  # steps of a request whose engine is killed
    width: int = 64  # rows of what is compiled
    tests: tuple[str, ...] = ("-m", "gpu", "tests/model", "tests/service/engine")
    start_s: float = 60.0
    precisions: tuple[str, ...] = tuple(PRECISIONS)

    @property
    def simulated(self) -> bool:
        """Whether there is no GPU in it."""
        return self.device == "cpu"

    def configs(self) -> dict[Network, UNetConfig]:
        """The shapes that have random weights."""
        if not self.simulated:
            return {"cifar10-32": CIFAR10_32, "celebahq-256": CELEBAHQ_256}
        return {
            "cifar10-32": replace(CIFAR10_32, sample_size=(16, 16), block_out_channels=(32,) * 4),
            "celebahq-256": replace(CELEBAHQ_256, block_out_channels=(32,) * 6, sample_size=(64, 64)),
        }

    def model(self, name: Network) -> Checkpoint:
        """The shipped network, or one of random weights."""
        shipped = checkpoint.load(SHIPPED)
        if name == "ours":
            return shipped
        torch.manual_seed(0)
        unet = UNet(self.configs()[name]).eval()
        return replace(shipped, name=name, unet=unet, null_class=None, classifier=None, class_names=())

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.simulated:
            torch.cuda.synchronize()


REAL = Scale()
SIMULATED = Scale(
    device="cpu",
    seconds=0.01,
    http_s=0.5,
    rows={"ours": (1, 2), "cifar10-32": (1,), "celebahq-256": (1,)},
    product=256,
    clients=2,
    images=(1,),
    steps=2,
    long=10,
    width=2,
    tests=("-k", "cpu and 5-fixed-float32", "tests/model/test_recorded.py"),
    precisions=("float32",),
)


# ── The machine ────────────────────────────────────────────────────────────────────────────────


def machine(scale: Scale) -> Figures:
    """What it ran on."""
    yield "torch", torch.__version__
    yield "python", sys.version.split()[0]
    with suppress(ImportError):
        from bench.machine import describe  # psutil

        yield "host", describe()
    if scale.simulated:
        yield "card", "none: simulated"
        return
    yield "card", torch.cuda.get_device_name()
    yield "memory_gib", round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    yield "cuda", torch.version.cuda
    yield "cudnn", torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    with suppress(OSError):  # nvidia-smi is not always there
        yield "driver", Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    with suppress(OSError, subprocess.SubprocessError):
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
        yield "driver", done.stdout.strip()
    with suppress(ImportError):
        import triton

        yield "triton", triton.__version__


# ── Checks ─────────────────────────────────────────────────────────────────────────────────────


def gpu_tests(scale: Scale) -> Figures:
    """The tests that need a GPU: how many had which outcome, and what those that failed say."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    command.append("--continue-on-collection-errors")
    popen = subprocess.Popen(
        [*command, *scale.tests], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with ThreadPoolExecutor(1) as pool:  # reads while this waits
        reading = pool.submit(popen.communicate)
        try:
            text, _ = reading.result(TESTS_S)
        except TimeoutError:
            popen.kill()
            text, _ = reading.result()
            yield "error", f"not done after {TESTS_S:.0f} s"
    found = re.findall(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)", text, re.MULTILINE)
    for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        yield outcome.lower(), sum(kind == outcome for _, kind in found)
    yield "failures", [name for name, kind in found if kind in ("FAILED", "ERROR")]
    if popen.returncode:
        yield "log", text[-12_000:]
    yield "holds", popen.returncode == 0


def bits(scale: Scale) -> Figures:
    """Noise on the device against the host's; recorded steps against eager ones; images against the CPU's."""
    yield "kernel", device_noise.HAS_KERNEL
    seeds, shape = [*range(60), 2**32 - 1, 2**32, 2**63, 2**64 - 1], (3, 64, 64)
    steps = [noise.START, *range(len(seeds) - 1)]
    drawn = device_noise.normals(
        device_noise.as_int64(seeds).to(scale.device),
        torch.tensor(steps, device=scale.device),
        shape,
        NoiseStream.STEP,
        device_noise.table(scale.device),
    )
    yield "noise is the host's", bool(np.array_equal(drawn.cpu().numpy(), noise.normals(seeds, steps, shape)))
    model = scale.model("ours")
    chains = [
        Chain(build_plan(model.schedule, sampler, 4, guidance=Guidance(scale_)), seed, seed % 10)
        for seed, (sampler, scale_) in enumerate(
            [("ddim", 1.0), ("ddpm", 3.0), ("dpmpp_2m", 1.0), ("sde_dpmpp_2m", 2.0), ("ddpm", 1.0)]
        )
    ]
    reference = generate(Denoiser.of(model, TorchRuntime(model)), chains)
    for precision in scale.precisions:
        dtype, tf32 = PRECISIONS[precision]
        images: list[torch.Tensor] = []
        for sizes in ((8,), (8,)):  # recorded, then the same shape eagerly
            denoiser = Denoiser.of(model, TorchRuntime(model, scale.device, dtype, sizes, tf32=tf32))
            if images:
                setattr(denoiser, "_width", lambda _used: 0)  # noqa: B010 (for a type checker it is a method)
            images.append(generate(denoiser, chains).cpu())
        yield f"{precision}: recorded is eager", bool(torch.equal(*images))
        yield f"{precision}: largest difference from the CPU", float((images[0] - reference).abs().max())


@contextmanager
def _served(scale: Scale, **settings: object) -> Iterator[tuple[str, int]]:
    """The service on the device: its address, and its process."""
    from bench.servers import SERVICE, Model, running  # httpx, and the service's settings

    environment = Model(SHIPPED, "torch").environment("ours") | {"DDPM_DEVICE": scale.device}
    environment |= {"DDPM_STREAM_GRACE_S": "0", "DDPM_MAX_QUEUE": "512"}
    if scale.simulated:
        settings = {"max_batch": 2, **settings}
    environment |= {f"DDPM_{name.upper()}": str(value) for name, value in settings.items()}
    with running(SERVICE, environment, scale.start_s) as server:
        yield server.endpoint.url.removesuffix("/generate"), server.popen.pid


def service(scale: Scale) -> Figures:
    """Over HTTP: the same bytes twice, a stream, and the same bytes though the engine is killed."""
    import httpx
    import psutil

    with _served(scale) as (url, pid), httpx.Client(base_url=url, timeout=120, trust_env=False) as client:

        def images(**body: object) -> list[str]:
            answer = client.post("/generate", json=body)
            answer.raise_for_status()
            return [image["b64_json"] for image in answer.json()["images"]]

        info = client.get("/info").json()
        yield (
            "info",
            {name: info.get(name) for name in ("runtime", "batch_invariance")},
        )
        asked = {"n": 3, "seed": 5, "sampler": "ddpm", "num_inference_steps": 8, "class_label": 3}
        first = images(**asked)
        yield "the same bytes twice", images(**asked) == first
        yield "an image alone is as in a batch", images(**asked | {"n": 1, "seed": 6}) == first[1:2]
        stream = client.post("/generate", json=asked, headers={"Accept": "text/event-stream"}).text
        ended = stream.rpartition("event: completed")[2]
        data = next(line[5:] for line in ended.splitlines() if line.startswith("data:"))
        yield "a stream ends with them", [image["b64_json"] for image in json.loads(data)["images"]] == first
        long = asked | {"num_inference_steps": scale.long}
        expected = images(**long)
        (engine,) = [
            child
            for child in psutil.Process(pid).children(recursive=True)
            if "service.engine.process" in child.cmdline()
        ]
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(images, **long)
            begun = time.monotonic()
            while not metric(url, "ddpm_samples_running") and time.monotonic() - begun < 10:
                time.sleep(0.005)
            yield "it was running", not again.done()
            engine.kill()
            killed = time.monotonic()
            yield "killed and run again", again.result() == expected
            yield "seconds until then", time.monotonic() - killed


# ── Rates ──────────────────────────────────────────────────────────────────────────────────────


def per_call(action: Callable[[], object], scale: Scale) -> float:
    """Seconds of a call, of as many as take the wanted time, without waiting between them."""
    action()
    scale.synchronize()
    calls = 1
    while True:
        begun = time.perf_counter()
        for _ in range(calls):
            action()
        scale.synchronize()
        taken = time.perf_counter() - begun
        if taken >= scale.seconds:
            return taken / calls
        calls = max(2 * calls, int(1.1 * calls * scale.seconds / taken))


def product_limit(precision: str, scale: Scale) -> float:
    """Operations per second of a product of two large square matrices."""
    dtype, tf32 = PRECISIONS[precision]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    a = torch.randn(scale.product, scale.product, device=scale.device).to(TORCH_DTYPES[dtype])
    out = torch.empty_like(a)
    return 2 * scale.product**3 / per_call(lambda: torch.mm(a, a, out=out), scale)


def operations(config: UNetConfig) -> int:
    """Operations of one row: two per multiply-add of convolutions, linear layers and attention."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        t = torch.zeros(1, dtype=torch.int64)
        x = torch.zeros(1, *config.shape)
        UNet(config).eval()(x, t, t if config.conditional else None)
    return int(counter.get_total_flops())


def call(
    runtime: TorchRuntime, model: Checkpoint, rows: int, scale: Scale, *, recorded: bool
) -> Callable[[], object]:
    """A call of the network at a batch size; recorded where there is a GPU to record for."""
    x, t, y = (None if values is None else values.to(scale.device) for values in inputs(model, rows))
    assert x is not None
    assert t is not None

    @torch.inference_mode()
    def forward(x: torch.Tensor = x) -> torch.Tensor:
        return runtime.forward(x, t, y)

    if not recorded or scale.simulated:
        return forward
    with torch.inference_mode():
        kept = Recorded(forward, x.cpu())
    return lambda: kept._graph.replay()


def rates(scale: Scale, name: Network) -> Figures:
    """Rows per second of a network by precision, way of calling and batch size, beside matrix products."""
    model = scale.model(name)
    yield "operations", operations(cast("UNetConfig", model.unet.config))
    for precision in scale.precisions:
        dtype, tf32 = PRECISIONS[precision]
        try:
            yield f"{precision}/product", product_limit(precision, scale)
            runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
            for way in ("recorded", "eager"):
                for rows in scale.rows[name]:
                    action = call(runtime, model, rows, scale, recorded=way == "recorded")
                    yield f"{precision}/{way}/{rows}", rows / per_call(action, scale)
                    del action
        except Exception as error:  # noqa: BLE001 (out of memory, say; the next precision may still work)
            yield f"{precision}/error", f"{type(error).__name__}: {str(error)[:500]}"
        _empty(scale)
    rows = scale.rows[name][-1]
    for precision in scale.precisions[1:3]:  # whether another layout, or a search for kernels, would pay
        dtype, tf32 = PRECISIONS[precision]
        runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
        torch.backends.cudnn.benchmark = True
        action = call(runtime, model, rows, scale, recorded=True)
        yield f"{precision}/recorded, cudnn.benchmark/{rows}", rows / per_call(action, scale)
        torch.backends.cudnn.benchmark = False
        runtime.unet = runtime.unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        runtime._network = runtime.unet
        action = call(runtime, model, rows, scale, recorded=True)
        yield f"{precision}/recorded, channels first/{rows}", rows / per_call(action, scale)


def compiled(scale: Scale) -> Figures:
    """The shipped network by torch.compile, at one batch size."""
    model, rows = scale.model("ours"), scale.width
    backend = "eager" if scale.simulated else "inductor"  # a simulation needs no compiler
    for precision in scale.precisions[2:0:-1] or scale.precisions:
        dtype, tf32 = PRECISIONS[precision]
        runtime = TorchRuntime(model, scale.device, dtype, tf32=tf32)
        runtime._network = torch.compile(runtime.unet, dynamic=False, backend=backend)
        begun = time.perf_counter()
        action = call(runtime, model, rows, scale, recorded=False)
        action()
        scale.synchronize()
        yield f"{precision}/seconds to compile", time.perf_counter() - begun
        yield f"{precision}/compiled/{rows}", rows / per_call(action, scale)
        action = call(runtime, model, rows, scale, recorded=True)
        yield f"{precision}/compiled and recorded/{rows}", rows / per_call(action, scale)


def engine(scale: Scale) -> Figures:
    """`Denoiser.launch` and `Engine.step` over the network as the service warms it up, and it alone."""
    from bench.simulated import build, denoiser_rate, engine_rate, model_of
    from service.engine.messages import EngineConfig
    from service.engine.warmup import warm_up

    kinds: dict[str, dict[str, Any]] = {
        "by default": {},
        "not invariant": {"batch_invariant": False},
        "256 rows": {"max_batch": 256},
        "bfloat16, 256 rows": {"max_batch": 256, "dtype": "bfloat16"},
    }
    seconds = 10 * scale.seconds
    for kind, options in kinds.items():
        config = EngineConfig(str(SHIPPED), scale.device, "torch", slots=512, **options)
        begun = time.perf_counter()
        if scale.simulated:
            engine = build(model_of(8), 4, 0.004, config).engine
        else:
            warm = warm_up(scale.model("ours"), config)
            engine = warm.engine
            yield f"{kind}/step times", warm.info.step_times
            yield f"{kind}/invariance", warm.info.invariance.max_abs_difference
        rows = engine.scheduler.max_batch_size
        yield f"{kind}/seconds to warm up", time.perf_counter() - begun
        yield f"{kind}/rows", rows
        denoiser = engine.denoiser
        if isinstance(denoiser, Denoiser) and isinstance(runtime := denoiser.runtime, TorchRuntime):
            action = call(runtime, scale.model("ours"), rows, scale, recorded=True)
            yield f"{kind}/network", rows / per_call(action, scale)
            del action
        for sampler, steps in SAMPLERS.items():
            yield f"{kind}/denoiser/{sampler}", denoiser_rate(engine, sampler, steps, seconds)
            yield f"{kind}/engine/{sampler}", engine_rate(engine, sampler, steps, "none", seconds)
            yield f"{kind}/engine, previews/{sampler}", engine_rate(engine, sampler, steps, "x0", seconds)
        _empty(scale)
        if scale.simulated:
            return


def http(scale: Scale) -> Figures:
    """Rows per second of the service, kept busy by clients that want JSON, or that stream."""
    kinds = {"by default": {}, "256 rows": {"max_batch": 256}} if not scale.simulated else {"by default": {}}
    for kind, settings in kinds.items():
        with _served(scale, **settings) as (url, _):
            for layer, accept in (("json", "application/json"), ("streams", "text/event-stream")):
                for sampler, steps in SAMPLERS.items():
                    body = {"sampler": sampler, "num_inference_steps": steps}
                    rate = saturate(url, accept, body, scale.http_s, scale.clients * (4 if settings else 1))
                    yield f"{kind}/{layer}/{sampler}", rate
                    if scale.simulated:
                        break


def diffusers(scale: Scale) -> Figures:
    """Images per second of a batch from noise to the end: UNet2DModel in diffusers' loop, and ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import DDIMScheduler, UNet2DModel

    names: tuple[Network, ...] = ("ours", "cifar10-32")
    for name in names[: 1 if scale.simulated else 2]:
        model = scale.model(name)
        unet: Any = UNet2DModel.from_config(model.unet.config.to_diffusers())
        unet.load_state_dict(model.unet.state_dict())
        unet.to(scale.device).eval()
        scheduler: Any = DDIMScheduler.from_config(dict(model.scheduler_config))
        scheduler.set_timesteps(scale.steps, device=scale.device)
        # As torch has it: its convolutions may round to TF32, its matrix products may not.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        labelled = model.unet.config.conditional
        for count in scale.images:
            yield (
                f"{name}/diffusers/{count}",
                count / per_call(partial(_pipeline, unet, scheduler, count), scale),
            )
        plan = build_plan(model.schedule, "ddim", scale.steps)
        for precision in scale.precisions:
            dtype, tf32 = PRECISIONS[precision]
            for count in scale.images:
                sizes = (count,)  # as the service has it: one shape, recorded
                denoiser = Denoiser.of(model, TorchRuntime(model, scale.device, dtype, sizes, tf32=tf32))
                chains = [Chain(plan, seed, 0 if labelled else None) for seed in range(count)]
                yield (
                    f"{name}/ours, {precision}/{count}",
                    count / per_call(partial(_generated, denoiser, chains), scale),
                )


def _generated(denoiser: Denoiser, chains: Sequence[Chain]) -> torch.Tensor:
    return generate(denoiser, chains).cpu()


@torch.no_grad()
def _pipeline(unet: Any, scheduler: Any, count: int) -> torch.Tensor:
    """The loop of diffusers' documentation."""
    config = unet.config
    x = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, device=unet.device)
    classes = config.num_class_embeds
    labels = None if classes is None else torch.zeros(count, dtype=torch.int64, device=unet.device)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    return x.cpu()


def _empty(scale: Scale) -> None:
    if not scale.simulated:
        torch.cuda.empty_cache()


SECTIONS: dict[str, tuple[Callable[[Scale], Figures], float]] = {
    "machine": (machine, 40.0),
    "bits": (bits, 60.0),
    "rates, ours": (partial(rates, name="ours"), 75.0),
    "service": (service, 90.0),
    "engine": (engine, 75.0),
    "rates, cifar10-32": (partial(rates, name="cifar10-32"), 75.0),
    "tests": (gpu_tests, TESTS_S + 10),
    "http": (http, 100.0),
    "diffusers": (diffusers, 60.0),
    "rates, celebahq-256": (partial(rates, name="celebahq-256"), 90.0),
    "compiled": (compiled, 90.0),
}
"""In order of what would be missed most, with the seconds that each may take."""
