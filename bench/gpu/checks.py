"""What `bench.gpu` checks: tests that need a GPU, bits of noise and of steps, the service from end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bench.gpu.scale import PRECISIONS, ROOT, Figures, Scale
from bench.gpu.served import served
from bench.http import metric
from model import device_noise, noise
from model.chain import Chain
from model.denoiser import Denoiser, generate
from model.noise import NoiseStream
from model.runtimes import TorchRuntime
from model.samplers import Guidance, build_plan

TESTS_S = 110.0


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


def service(scale: Scale) -> Figures:
    """Over HTTP: the same bytes twice, a stream, and the same bytes though the engine is killed."""
    import httpx
    import psutil

    with served(scale) as (url, pid), httpx.Client(base_url=url, timeout=120, trust_env=False) as client:

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
