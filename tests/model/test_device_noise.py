from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import device_noise, noise
from model.noise import MAX_SEED, START, NoiseStream

ROOT = Path(__file__).parents[2]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**63 + 12345, MAX_SEED - 1, MAX_SEED]
STEPS = [START, 0, 1, 2, 999, START, 0, 500, 998, 999]
SHAPES = [(3, 32, 32), (1, 28, 28), (1, 3, 3), (4,), (5,), (1,)]


def drawn_on(device: str, shape: tuple[int, ...], stream: int = NoiseStream.STEP) -> torch.Tensor:
    seeds, steps = device_noise.as_int64(SEEDS).to(device), torch.tensor(STEPS, device=device)
    return device_noise.normals(seeds, steps, shape, stream, device_noise.table(device))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", NoiseStream)
def test_tensor_operations_give_the_bits_of_numpy(shape: tuple[int, ...], stream: NoiseStream) -> None:
    drawn = drawn_on("cpu", shape, stream)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (len(SEEDS), *shape)
    assert drawn.numpy().tobytes() == noise.normals(SEEDS, STEPS, shape, stream).tobytes()


def test_one_sample_is_the_same_alone() -> None:
    together, table = drawn_on("cpu", (3, 9, 9)), device_noise.table()
    for i, (seed, step) in enumerate(zip(SEEDS, STEPS, strict=True)):
        seeds, steps = device_noise.as_int64([seed]), torch.tensor([step])
        alone = device_noise.normals(seeds, steps, (3, 9, 9), NoiseStream.STEP, table)
        assert torch.equal(alone[0], together[i])


def from_columns(device: str) -> torch.Tensor:
    """As a step draws it: seeds and steps are columns of its upload, whose elements lie apart."""
    upload = torch.stack((device_noise.as_int64(SEEDS), torch.tensor(STEPS)), dim=1).to(device)
    seeds, steps = upload.unbind(1)
    return device_noise.normals(seeds, steps, (3, 9, 9), NoiseStream.STEP, device_noise.table(device))


def test_seeds_and_steps_may_be_columns() -> None:
    assert torch.equal(from_columns("cpu"), drawn_on("cpu", (3, 9, 9)))


def test_the_kernel_gives_the_bits_of_numpy_where_triton_interprets_it() -> None:
    """Where Triton is installed, in its interpreter: no GPU is needed."""
    pytest.importorskip("triton")
    code = f"""
import numpy as np, torch
from model import device_noise, noise, noise_kernel
seeds, steps = {SEEDS}, {STEPS}
upload = torch.stack((device_noise.as_int64(seeds), torch.tensor(steps)), dim=1)
drawn = noise_kernel.normals(*upload.unbind(1), 1029, 1, device_noise.table()).numpy()
assert np.array_equal(drawn, noise.normals(seeds, steps, (1029,), noise.NoiseStream(1)))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)


def test_nothing_looks_at_a_value() -> None:
    """On the meta device there are no values: `.item()`, or a shape that depends on data, would fail."""
    seeds = torch.empty(5, dtype=torch.int64, device="meta")
    drawn = device_noise.normals(seeds, seeds, (3, 4, 5), 0, torch.empty(2**16, device="meta"))
    assert drawn.shape == (5, 3, 4, 5)


def test_one_graph_holds_all_of_it() -> None:
    """As torch.compile sees it; a look at a value would break the graph, and `fullgraph` raises."""
    compiled = torch.compile(device_noise.normals, backend="eager", fullgraph=True)
    seeds, steps, table = device_noise.as_int64(SEEDS), torch.tensor(STEPS), device_noise.table()
    assert torch.equal(compiled(seeds, steps, (1, 6, 6), 0, table), drawn_on("cpu", (1, 6, 6)))


def test_seeds_keep_their_bits() -> None:
    assert device_noise.as_int64(SEEDS).numpy().view(np.uint64).tolist() == SEEDS


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        device_noise.as_int64([seed])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (3, 128, 128)])
@pytest.mark.parametrize("stream", NoiseStream)
def test_a_gpu_gives_the_bits_of_numpy(
    shape: tuple[int, ...], stream: NoiseStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = torch.from_numpy(noise.normals(SEEDS, STEPS, shape, stream))
    assert device_noise.HAS_KERNEL, "torch for CUDA comes with Triton"
    assert torch.equal(drawn_on("cuda", shape, stream).cpu(), expected)
    monkeypatch.setattr(device_noise, "HAS_KERNEL", False)
    assert torch.equal(drawn_on("cuda", shape, stream).cpu(), expected)


@pytest.mark.gpu
def test_a_gpu_takes_seeds_and_steps_from_columns() -> None:
    assert torch.equal(from_columns("cuda").cpu(), drawn_on("cpu", (3, 9, 9)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [True, False])
def test_a_cuda_graph_draws_for_the_seeds_it_is_given(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_noise, "HAS_KERNEL", kernel)
    seeds, steps = device_noise.as_int64(SEEDS).cuda(), torch.tensor(STEPS, device="cuda")
    table = device_noise.table("cuda")
    device_noise.normals(seeds, steps, (3, 32, 32), 0, table)  # what is compiled on first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = device_noise.normals(seeds, steps, (3, 32, 32), 0, table)
    seeds.copy_(seeds.flip(0))
    graph.replay()
    assert np.array_equal(drawn.cpu().numpy(), noise.normals(SEEDS[::-1], STEPS, (3, 32, 32)))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_compiled() -> None:
    compiled = torch.compile(device_noise.normals, fullgraph=True)
    seeds, steps = device_noise.as_int64(SEEDS).cuda(), torch.tensor(STEPS, device="cuda")
    drawn = compiled(seeds, steps, (3, 32, 32), 0, device_noise.table("cuda"))
    assert torch.equal(drawn, drawn_on("cuda", (3, 32, 32)))
