"""Networks that take a picture beside x."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint, noise
from model.chain import Chain
from model.checkpoint import Checkpoint, CheckpointError
from model.condition import ConditionError, Part, assemble, channels_of, parts_of
from model.denoiser import Denoiser, generate
from model.runtimes import OpenVinoRuntime, TorchRuntime
from model.samplers import Guidance, build_plan
from tests.model.conftest import tiny_checkpoint

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (1, 8, 8)).astype(np.float32)
OTHER = RNG.uniform(-1, 1, (1, 8, 8)).astype(np.float32)


def conditioned(condition: tuple[Part, ...] = ("image",), **options: Any) -> Checkpoint:
    extra = sum(1 for _ in condition)  # of grey pictures
    return replace(tiny_checkpoint(in_channels=1 + extra, **options), condition=condition)


@pytest.mark.parametrize(
    ("extra", "named", "parts"),
    [
        (0, None, ()),
        (3, None, ("image",)),
        (4, ["mask", "masked_image"], ("mask", "masked_image")),
        (4, ["masked_image", "mask"], ("masked_image", "mask")),
        (3, ["masked_image"], ("masked_image",)),
    ],
)
def test_the_parts_of_a_condition(extra: int, named: object, parts: tuple[Part, ...]) -> None:
    assert parts_of(extra, 3, named) == parts
    assert channels_of(3 + extra, parts) == 3


@pytest.mark.parametrize(
    ("extra", "named", "reason"),
    [
        (4, None, "has to be said"),
        (1, None, "has to be said"),
        (3, ["mask"], "1 channels for pictures of 3, but the network takes 3"),
        (3, "image", "must be a list"),
        (3, ["depth"], "must be a list"),
        (6, ["image", "image"], "must be a list"),
    ],
)
def test_what_the_channels_do_not_say_is_not_guessed(extra: int, named: object, reason: str) -> None:
    with pytest.raises(ConditionError, match=reason):
        parts_of(extra, 3, named)


def test_a_condition_is_put_together_in_its_order() -> None:
    kept = np.arange(8)[None, None, :] < np.full((1, 8, 1), 4)
    mask, masked, whole = assemble(("mask", "masked_image", "image"), IMAGE, kept)
    np.testing.assert_array_equal(mask, ~kept[0])
    np.testing.assert_array_equal(masked, np.where(kept[0], IMAGE[0], 0))
    np.testing.assert_array_equal(whole, IMAGE[0])


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["plain", "guided"])
def test_each_sample_has_its_own_condition(scale: float) -> None:
    """Against a plain loop: DDIM with the condition after x in the input, of guidance's second row too."""
    model = conditioned()
    plan = build_plan(model.schedule, "ddim", 4, guidance=Guidance(scale))
    chains = [Chain(plan, seed, 1, condition=each) for seed, each in ((5, IMAGE), (6, OTHER))]
    made = generate(Denoiser.of(model, TorchRuntime(model)), chains)
    for chain, result in zip(chains, made, strict=True):
        assert chain.condition is not None
        given = torch.from_numpy(chain.condition)[None]
        x = torch.from_numpy(noise.normals([chain.seed], [noise.START], (1, 8, 8)))
        for row in plan.table:
            t = torch.tensor([int(row["t"])])
            with torch.inference_mode():
                out, free = (
                    model.unet(torch.cat((x, given), 1), t, torch.tensor([label])) for label in (1, 3)
                )
            out = free + row["w"] * (out - free)
            unclipped = row["a_x"] * x + row["a_o"] * out
            x0 = unclipped.clamp(-1, 1)
            x = row["c_x"] * x + row["c_0"] * x0 + row["c_u"] * unclipped
        torch.testing.assert_close(result, x[0].float(), atol=2e-4, rtol=0)


def test_another_runtime_is_given_it_too() -> None:
    model = conditioned()
    chains = [Chain(build_plan(model.schedule, "ddim", 2), 5, 1, condition=IMAGE)]
    first = generate(Denoiser.of(model, TorchRuntime(model)), chains)
    second = generate(Denoiser.of(model, OpenVinoRuntime(model, threads=1)), chains)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


def test_a_condition_outlasts_more_slots_and_ends_with_its_sample() -> None:
    model = conditioned()
    denoiser = Denoiser.of(model, TorchRuntime(model))
    chain = Chain(build_plan(model.schedule, "ddim", 2), 5, 1, condition=IMAGE)
    first = generate(denoiser, [chain])
    denoiser.reserve(50)
    generate(denoiser, [replace(chain, condition=OTHER)])
    assert torch.equal(generate(denoiser, [chain]), first)


def test_a_condition_is_there_exactly_where_the_network_takes_one(tiny: Checkpoint) -> None:
    plan = build_plan(tiny.schedule, "ddim", 2)
    for model, condition, wanted in ((conditioned(), None, "needs"), (tiny, IMAGE, "takes no")):
        with pytest.raises(ValueError, match=f"{wanted} picture"):
            generate(Denoiser.of(model, TorchRuntime(model)), [Chain(plan, 5, 1, condition=condition)])


def test_a_folder_says_what_its_network_takes(tmp_path: Path) -> None:
    model = conditioned(("masked_image", "mask"))
    checkpoint.save(tmp_path / "a", model)
    loaded = checkpoint.load(tmp_path / "a")
    assert (loaded.condition, loaded.shape) == (("masked_image", "mask"), (1, 8, 8))
    index = tmp_path / "a" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"condition": ["mask", "image", "depth"]}))
    (tmp_path / "a" / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match='in_channels=3: "condition" must be a list'):
        checkpoint.load(tmp_path / "a")
