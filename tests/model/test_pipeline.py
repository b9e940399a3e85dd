"""What a pipeline says that it is: one U-Net of pixels and one scheduler, or refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

from model.folder import CheckpointError
from model.pipeline import Components, as_declared, check_network, components_of
from model.schedule import NoiseSchedule
from tests.model.conftest import TINY

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


EXCHANGED = [
    ("DDPMPipeline", "PNDMScheduler", "DDPMScheduler", "PNDMScheduler", True),
    ("DDPMPipeline", "DDIMScheduler", None, "DDIMScheduler", False),
    ("DDPMPipeline", "DDPMScheduler", "DDIMScheduler", "DDPMScheduler", True),
    ("DDPMPipeline", "DDPMScheduler", "DDPMScheduler", "DDPMScheduler", False),
    ("DDIMPipeline", "DDPMScheduler", "DDPMScheduler", "DDIMScheduler", True),
]
"""(pipeline, the scheduler it names, who wrote the config of that, what it is, whether that is said)."""


@pytest.mark.parametrize(("pipeline", "named", "written", "taken", "warned"), EXCHANGED)
def test_the_scheduler_is_the_one_that_diffusers_takes(
    pipeline: str,
    named: str,
    written: str | None,
    taken: str,
    warned: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    diffusers.DDPMPipeline(UNet2DModel(**TINY | {"num_class_embeds": None}), DDPMScheduler()).save_pretrained(
        tmp_path
    )
    content = json.loads((tmp_path / "model_index.json").read_text())
    content |= {"_class_name": pipeline, "scheduler": ["diffusers", named]}
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    place = tmp_path / "scheduler" / "scheduler_config.json"
    config = {**json.loads(place.read_text()), "_class_name": written}
    place.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    theirs = DiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(theirs).__name__ == taken
    with caplog.at_level(logging.WARNING, "model.pipeline"):
        ours = as_declared(content, json.loads(place.read_text()))
    assert ours["_class_name"] == taken
    assert (f"the scheduler is a {taken}" in caplog.text) == warned
    clips = taken != "PNDMScheduler"  # it has no such option, whatever the file says
    assert NoiseSchedule.from_diffusers(ours).bounded == clips


def test_without_a_pipeline_a_scheduler_is_what_its_config_says() -> None:
    config = {"_class_name": "PNDMScheduler", "beta_end": 0.01}
    assert as_declared({}, config) == config
    assert as_declared({"id2label": ["a", "MyScheduler"]}, config) == config
    assert as_declared(index(unet=UNET), config) == config
