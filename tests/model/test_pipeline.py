"""What a pipeline says that it is: one U-Net of pixels and one scheduler, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from model.folder import CheckpointError
from model.pipeline import Components, check_network, components_of

UNET = ["diffusers", "UNet2DModel"]
SCHEDULER = ["diffusers", "DDPMScheduler"]


def index(kind: str = "DDPMPipeline", **components: Any) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": "0.36.0", **components}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"id2label": {"0": "cat"}},
        {"id2label": ["cat", "dog"]},
        index(unet=UNET, scheduler=SCHEDULER),
        index("DDIMPipeline", unet=UNET, scheduler=["diffusers", "DDIMScheduler"]),
        index("PNDMPipeline", unet=UNET, scheduler=["diffusers", "PNDMScheduler"]),
        index("KarrasVePipeline", unet=UNET, scheduler=["diffusers", "KarrasVeScheduler"]),
        index("OurOwnPipeline", unet=UNET, scheduler=SCHEDULER, id2label={"0": "cat"}, size=[64, 64]),
        index(unet=UNET, scheduler=SCHEDULER, safety_checker=[None, None]),
    ],
)
def test_one_unet_and_one_scheduler_are_fine(content: dict[str, Any]) -> None:
    assert components_of(content) == ("unet", "scheduler")


def test_components_are_found_by_their_class() -> None:
    content = index("OurOwnPipeline", model=UNET, noise_scheduler=SCHEDULER)
    assert components_of(content) == Components("model", "noise_scheduler")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            index("LDMPipeline", unet=UNET, scheduler=SCHEDULER, vqvae=["diffusers", "VQModel"]),
            r"a LDMPipeline with vqvae \(VQModel\), which decodes latents",
        ),
        (
            index(
                "StableDiffusionPipeline",
                unet=["diffusers", "UNet2DConditionModel"],
                vae=["diffusers", "AutoencoderKL"],
            ),
            r"unet \(UNet2DConditionModel\), which is conditioned on text",
        ),
        (
            index("DiTPipeline", transformer=["diffusers", "DiTTransformer2DModel"], scheduler=SCHEDULER),
            r"transformer \(DiTTransformer2DModel\), which is a transformer",
        ),
        (
            index(
                "AudioDiffusionPipeline",
                unet=UNET,
                scheduler=SCHEDULER,
                mel=["audio_diffusion", "Mel"],
                vqvae=[None, None],
            ),
            r"mel \(Mel\), which turns sound",
        ),
        (
            index("DanceDiffusionPipeline", unet=["diffusers", "UNet1DModel"], scheduler=SCHEDULER),
            r"unet \(UNet1DModel\), which works on sound",
        ),
        (
            index("UnCLIPPipeline", super_res_first=UNET, super_res_last=UNET),
            r"a UnCLIPPipeline with 2 networks \(super_res_first, super_res_last\)",
        ),
        (index(unet=UNET, scheduler=SCHEDULER, inverse_scheduler=SCHEDULER), "with 2 schedulers"),
        (index(unet=UNET, upscaler=["my", "Upscaler"]), r"upscaler \(Upscaler\), which is nothing that"),
        (index(scheduler=SCHEDULER), "a DDPMPipeline without a UNet2DModel"),
    ],
)
def test_every_other_pipeline_is_refused_by_name(content: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        components_of(content)


def test_a_network_of_another_class_is_refused_by_name() -> None:
    check_network({})
    check_network({"_class_name": "UNet2DModel"})
    with pytest.raises(CheckpointError, match=r"a UNet2DConditionModel, which is conditioned on text"):
        check_network({"_class_name": "UNet2DConditionModel"})
    with pytest.raises(CheckpointError, match=r"a MyNet, which is another network \(served here: UNet2DMo"):
        check_network({"_class_name": "MyNet"})
