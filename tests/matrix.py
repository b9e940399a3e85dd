"""Folders and files as they are found in the field, with tiny random weights: what loads, and what does not.

`python -m tests.matrix` prints them as the table of docs/models.md. `tests/test_matrix.py` makes each of
them, and compares what it generates with diffusers.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from huggingface_hub import export_folder_as_dduf
from torch import nn

from tests.model import denoising_diffusion as package
from tests.model.conftest import randomise
from tests.model.convert.references import HoNet, OpenAINet

Options = dict[str, Any]
SMALL: Options = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
ATTENTION: Options = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
SCHEDULER: Options = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Case:
    """One folder or file.

    unet, scheduler: what differs from SMALL and SCHEDULER. change: what is done to the pipeline's folder
    afterwards; returns the path that is loaded. refused: a part of the reason, if it is not to load. label:
    of what is generated. over_http: whether it is also served. sample_size: as the setting of that name.
    ends_at_one: whether the scheduler's last step ends at ᾱ = 1, where no option says so. dtype: of the
    weights' values.
    """

    family: str
    what: str
    unet: Options = field(default_factory=dict)
    scheduler: Options = field(default_factory=dict)
    change: Callable[[Path, UNet2DModel], Path] = lambda folder, _: folder
    refused: str = ""
    label: int | None = None
    over_http: bool = False
    sample_size: tuple[int, int] | None = None
    ends_at_one: bool = True
    dtype: torch.dtype = torch.float32

    def network(self) -> UNet2DModel:
        """The network, by diffusers, with random weights everywhere."""
        net = UNet2DModel(**(SMALL | self.unet)).eval()
        randomise(net)
        return net.to(self.dtype).float()

    def scheduler_config(self) -> Options:
        """As in `scheduler_config.json`."""
        return SCHEDULER | self.scheduler

    def make(self, folder: Path) -> Path:
        """Write it into a new folder, as diffusers would. Returns the path to load."""
        net = self.network()
        net.save_pretrained(folder / "unet")
        scheduler = folder / "scheduler" / "scheduler_config.json"
        scheduler.parent.mkdir()
        scheduler.write_text(json.dumps(self.scheduler_config()))
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        index |= {"scheduler": ["diffusers", self.scheduler_config()["_class_name"]]}
        (folder / "model_index.json").write_text(json.dumps(index))
        return self.change(folder, net)


# ── Changes ────────────────────────────────────────────────────────────────────────────────────


def edited(file: str, **values: Any) -> Callable[[Path, UNet2DModel], Path]:
    """A JSON file with other values; None takes a key out."""

    def change(folder: Path, _: UNet2DModel) -> Path:
        content = json.loads((folder / file).read_text()) | values
        kept = {name: value for name, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))
        return folder

    return change


def flat(folder: Path, _: UNet2DModel) -> Path:
    for path in (*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()):
        shutil.move(path, folder / path.name)
    for name in ("unet", "scheduler"):
        (folder / name).rmdir()
    (folder / "model_index.json").unlink()
    return folder


def saved(**options: Any) -> Callable[[Path, UNet2DModel], Path]:
    """Weights as `save_pretrained` writes them with these options."""

    def change(folder: Path, net: UNet2DModel) -> Path:
        (folder / "unet" / WEIGHTS).unlink()
        net.save_pretrained(folder / "unet", **options)
        return folder

    return change


def beside(**options: Any) -> Callable[[Path, UNet2DModel], Path]:
    """The same weights a second time, under another name."""

    def change(folder: Path, net: UNet2DModel) -> Path:
        net.save_pretrained(folder / "unet", **options)
        return folder

    return change


def averaged(folder: Path, net: UNet2DModel) -> Path:
    """The averages are what is to be taken; the plain weights are others."""
    average = EMAModel(net.parameters(), model_cls=UNet2DModel, model_config=net.config)
    average.save_pretrained(folder / "unet_ema")
    other = UNet2DModel.from_config(net.config)
    randomise(other, seed=9)
    other.save_pretrained(folder / "unet")
    return folder


def in_dtype(dtype: torch.dtype) -> Callable[[Path, UNet2DModel], Path]:
    """Weights of another precision."""

    def change(folder: Path, net: UNet2DModel) -> Path:
        net.to(dtype).save_pretrained(folder / "unet")
        return folder

    return change


def file_of(folder: Path, _: UNet2DModel) -> Path:
    return folder / "unet" / WEIGHTS


def renamed(prefix: str) -> Callable[[Path, UNet2DModel], Path]:
    """Weights as a wrapper around the network names them."""

    def change(folder: Path, net: UNet2DModel) -> Path:
        from safetensors.torch import save_file

        save_file({prefix + name: each for name, each in net.state_dict().items()}, folder / "unet" / WEIGHTS)
        return folder

    return change


def old_attention(folder: Path, net: UNet2DModel) -> Path:
    from safetensors.torch import save_file

    state = net.state_dict()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {name.replace(f".{new}.", f".{old}."): each for name, each in state.items()}
    save_file(state, folder / "unet" / WEIGHTS)
    return folder


def pointer(folder: Path, _: UNet2DModel) -> Path:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (folder / "unet" / WEIGHTS).write_text(text)
    return folder


def broken(folder: Path, net: UNet2DModel) -> Path:
    net.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    net.save_pretrained(folder / "unet")
    return folder


def without(name: str) -> Callable[[Path, UNet2DModel], Path]:
    def change(folder: Path, _: UNet2DModel) -> Path:
        (folder / name).unlink()
        return folder

    return change


def pickled(folder: Path, net: UNet2DModel) -> Path:
    (folder / "unet" / WEIGHTS).unlink()
    torch.save(net.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    return folder


def packed(folder: Path, _: UNet2DModel) -> Path:
    export_folder_as_dduf(folder.with_suffix(".dduf"), folder)
    return folder.with_suffix(".dduf")


def pipeline(folder: Path, net: UNet2DModel) -> Path:
    shutil.rmtree(folder)
    DDPMPipeline(net, DDPMScheduler.from_config(SCHEDULER)).save_pretrained(folder)
    return folder


# ── Cases ──────────────────────────────────────────────────────────────────────────────────────


def _unet(what: str, refused: str = "", **options: Any) -> Case:
    http, label = options.pop("over_http", False), options.pop("label", None)
    return Case("UNet2DModel", what, unet=options, refused=refused, over_http=http, label=label)


def _scheduler(what: str, refused: str = "", **options: Any) -> Case:
    http, to_one = options.pop("over_http", False), options.pop("ends_at_one", True)
    return Case("Scheduler", what, scheduler=options, refused=refused, over_http=http, ends_at_one=to_one)


def _layout(what: str, change: Callable[[Path, UNet2DModel], Path], refused: str = "", **others: Any) -> Case:
    return Case("Files", what, change=change, refused=refused, **others)


def _class(name: str, what: str = "", **options: Any) -> Case:
    return _scheduler(what or name, _class_name=name, **options)


_SIGMA = "its network takes a noise level σ and scaled input, not a timestep"


SQUARE_COSINE = {"beta_schedule": "squaredcos_cap_v2"}
CASES: tuple[Case, ...] = (
    # What the network may be.
    _unet("3 channels", over_http=True),
    _unet("1 channel", in_channels=1, out_channels=1),
    _unet("2 channels", in_channels=2, out_channels=2),
    _unet("4 channels: RGBA", in_channels=4, out_channels=4, over_http=True),
    _unet("5 channels: arrays", in_channels=5, out_channels=5, over_http=True),
    _unet("8×16, higher than wide or wider than high", sample_size=(8, 16), over_http=True),
    _unet(
        "sizes that halve unevenly",
        "must be a height and a width, or one number for both, that can be halved",
        sample_size=(8, 15),
    ),
    _unet("attention, 4 channels to a head", **ATTENTION),
    _unet("attention with a single head", **ATTENTION, attention_head_dim=None),
    _unet("attention_head_dim that does not divide the width", **ATTENTION, attention_head_dim=5),
    _unet("attn_norm_num_groups", **ATTENTION, attn_norm_num_groups=2),
    _unet("add_attention: false", add_attention=False),
    _unet("mid_block_type: null", mid_block_type=None),
    _unet(
        "resnet blocks that halve and double",
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        over_http=True,
    ),
    _unet(
        "downsample_type, upsample_type: resnet",
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    _unet("resnet_time_scale_shift: scale_shift", resnet_time_scale_shift="scale_shift"),
    _unet(
        "downsample_padding 0, freq_shift 1, sines first",
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
    ),
    _unet("act_fn: swish", act_fn="swish"),
    _unet("act_fn: mish", act_fn="mish"),
    _unet("act_fn: gelu", act_fn="gelu"),
    _unet("act_fn: relu", act_fn="relu"),
    _unet("dropout", dropout=0.2),
    _unet("center_input_sample", center_input_sample=True),
    _unet("time_embedding_dim", time_embedding_dim=24),
    _unet("time_embedding_type: fourier", time_embedding_type="fourier"),
    _unet("time_embedding_type: learned", time_embedding_type="learned", num_train_timesteps=1000),
    _unet("num_train_timesteps that nothing reads", num_train_timesteps=1000),
    _unet("classes", num_class_embeds=4, label=2, over_http=True),
    _unet("class_embed_type: timestep", class_embed_type="timestep", label=5),
    _unet(
        "class_embed_type: identity",
        "such a network takes a vector where a request gives a class; python -m model.convert",
        class_embed_type="identity",
    ),
    _unet("6 channels in, 3 out: a picture beside x", in_channels=6),
    Case(
        "UNet2DModel",
        "7 channels in, 3 out, and what they are",
        unet={"in_channels": 7},
        change=edited("model_index.json", condition=["mask", "masked_image"]),
    ),
    _unet("7 channels in, 3 out", 'has to be said by "condition" in model_index.json', in_channels=7),
    _unet(
        "skip blocks",
        "'SkipDownBlock2D' is not supported",
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
    ),
    _unet("learned variance, unused", out_channels=6, over_http=True),
    # What the scheduler may be. Each is compared by DDIM with its noise schedule.
    _class("DDPMScheduler", over_http=True),
    _class("DDIMScheduler"),
    _class("PNDMScheduler"),
    _class("DPMSolverMultistepScheduler", over_http=True),
    _class("DPMSolverSinglestepScheduler"),
    _class("DEISMultistepScheduler", ends_at_one=False),
    _class("UniPCMultistepScheduler"),
    _class("EulerDiscreteScheduler", over_http=True),
    _class("EulerAncestralDiscreteScheduler"),
    _class("HeunDiscreteScheduler"),
    _class("LMSDiscreteScheduler"),
    _class("KDPM2DiscreteScheduler"),
    _class("SASolverScheduler", ends_at_one=False),
    _class("KarrasVeScheduler", refused=_SIGMA),
    _class("ScoreSdeVeScheduler", refused=_SIGMA),
    _class("EDMEulerScheduler", refused=_SIGMA),
    _class("CMStochasticIterativeScheduler", refused="its network is distilled to jump to x₀"),
    _class("LCMScheduler", refused="its network is distilled to jump to x₀"),
    _class(
        "FlowMatchEulerDiscreteScheduler",
        refused="its network predicts the velocity of a flow from data to noise, not of a diffusion process",
    ),
    Case(
        "Scheduler",
        "one that the pipeline has, and another wrote its config",
        scheduler={"_class_name": "PNDMScheduler"},
        change=edited("scheduler/scheduler_config.json", _class_name="DDPMScheduler"),
    ),
    _scheduler("beta_schedule: scaled_linear", beta_schedule="scaled_linear"),
    _scheduler("beta_schedule: squaredcos_cap_v2", **SQUARE_COSINE),
    _scheduler("beta_schedule: sigmoid", beta_schedule="sigmoid"),
    _scheduler("beta_schedule: laplace", beta_schedule="laplace"),
    _scheduler("trained_betas", trained_betas=[0.001 * (1 + i % 5) for i in range(1000)]),
    _scheduler("prediction_type: v_prediction", prediction_type="v_prediction", over_http=True),
    _scheduler("prediction_type: sample", prediction_type="sample"),
    _scheduler(
        "rescale_betas_zero_snr, v, trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    ),
    _scheduler("thresholding", thresholding=True, clip_sample=False, sample_max_value=1.5),
    _scheduler("clip_sample_range", clip_sample_range=0.7),
    _scheduler("clip_sample: false", clip_sample=False),
    _class("DDIMScheduler", what="set_alpha_to_one: false", set_alpha_to_one=False),
    _scheduler("leading with steps_offset", timestep_spacing="leading", steps_offset=1),
    _scheduler("100 timesteps", num_train_timesteps=100),
    _scheduler("4000 timesteps", num_train_timesteps=4000),
    _scheduler("a misspelt key", "clip_smaple=True is an option of no scheduler", clip_smaple=True),
    # How the files may lie.
    _layout("a pipeline as diffusers saves it", pipeline, over_http=True),
    _layout("flat: config and weights at the root", flat),
    _layout("the path of the weights", file_of),
    _layout("sharded, with an index", saved(max_shard_size="2KB")),
    _layout("variant fp16", saved(variant="fp16")),
    _layout("several variants side by side", beside(variant="fp16")),
    _layout("unet_ema beside unet", averaged),
    _layout("float16", in_dtype(torch.float16), dtype=torch.float16),
    _layout("bfloat16", in_dtype(torch.bfloat16), dtype=torch.bfloat16),
    _layout("float64", in_dtype(torch.float64)),
    _layout("saved from torch.compile", renamed("_orig_mod.")),
    _layout("saved from DataParallel", renamed("module.")),
    _layout("attention as before diffusers 0.15", old_attention, unet=ATTENTION),
    _layout(
        "no sample_size, and the setting", edited("unet/config.json", sample_size=None), sample_size=(8, 8)
    ),
    _layout(
        "no sample_size",
        edited("unet/config.json", sample_size=None),
        "sample_size is missing: set DDPM_SAMPLE_SIZE",
    ),
    _layout("a DDUF file", packed, "unpack it (unzip"),
    _layout(
        "only a pickle",
        pickled,
        "a pickle, which can run code when read; convert it once, if you trust it: python -m model.convert",
    ),
    _layout("a Git LFS pointer", pointer, "a Git LFS pointer, not the file itself: run git lfs pull"),
    _layout("NaN in the weights", broken, "conv_in.weight has values that are not finite"),
    _layout(
        "no scheduler",
        without("scheduler/scheduler_config.json"),
        "missing: it says what noise the network was trained with",
    ),
    _layout(
        "a latent pipeline",
        edited("model_index.json", vqvae=["diffusers", "VQModel"]),
        "this is latent diffusion, which does not work on pixels",
    ),
    _layout(
        "a text-conditional U-Net",
        edited("unet/config.json", _class_name="UNet2DConditionModel"),
        "a UNet2DConditionModel, which is conditioned on text or other embeddings",
    ),
    _layout(
        "an option that is not known",
        edited("unet/config.json", cross_attention_dim=768),
        "cross_attention_dim=768 is not an option this network has",
    ),
    _layout("bookkeeping that changes nothing", edited("unet/config.json", torch_dtype="float16")),
)


# ── Other projects' checkpoints ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Source:
    """A file of another project, for `python -m model.convert`. options: of its command line.

    content: what the project saves of a network. keyword: what its network calls a label. arguments: others
    that it is called with. refused: a part of the reason, if it cannot be converted.
    """

    family: str
    what: str
    make: Callable[[], nn.Module]
    options: str = ""
    refused: str = ""
    label: int | None = None
    keyword: str = "y"
    arguments: Options = field(default_factory=dict)
    content: Callable[[nn.Module], Options] = lambda net: dict(net.state_dict())

    def network(self) -> nn.Module:
        """The project's own network, with random weights everywhere."""
        net = self.make().eval()
        randomise(net)
        return net


def monai(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        net: nn.Module = DiffusionModelUNet(
            spatial_dims=2,
            channels=(8, 16),
            attention_levels=(False, True),
            num_res_blocks=1,
            num_head_channels=8,
            norm_num_groups=4,
            **{"in_channels": 1, "out_channels": 1} | options,
        )
        return net

    return make


def named(*names: str) -> Callable[[nn.Module], Options]:
    """A file that is recognised by these weights."""
    return lambda _: {name: torch.zeros(4, 4, 3, 3) for name in names}


_GUIDED, _IMPROVED = "guided-diffusion", "improved-diffusion"
_LUCIDRAINS = "denoising-diffusion-pytorch"
_PIXELS = "--sample-size 8"
_MONAI = f"{_PIXELS} --num-head-channels 8 --norm-num-groups 4"
SOURCES: tuple[Source, ...] = (
    Source(
        _GUIDED,
        "resblock_updown, new attention order",
        lambda: OpenAINet(resblock_updown=True, head_channels=32, new_order=True),
        f"{_PIXELS} --num-head-channels 32 --use-new-attention-order",
    ),
    Source(
        _GUIDED,
        "legacy attention order, classes",
        lambda: OpenAINet(resblock_updown=True, head_channels=32, classes=5),
        f"{_PIXELS} --num-head-channels 32",
        label=3,
    ),
    Source(_IMPROVED, "learned variance", lambda: OpenAINet(heads=4), f"{_PIXELS}"),
    Source(
        _IMPROVED,
        "T = 4000, cosine, rescale_timesteps",
        lambda: OpenAINet(heads=4),
        f"{_PIXELS} --num-train-timesteps 4000 --beta-schedule squaredcos_cap_v2 --rescale-timesteps",
    ),
    Source(
        _IMPROVED,
        "EMA by ema_pytorch beside the weights",
        lambda: OpenAINet(heads=4),
        f"{_PIXELS}",
        content=lambda net: {
            "model": {name: each + 1 for name, each in net.state_dict().items()},
            "ema": {f"ema_model.{name}": each for name, each in net.state_dict().items()},
        },
    ),
    Source(
        _IMPROVED,
        "a picture beside x, and --condition",
        lambda: OpenAINet(heads=4, channels=6, outputs=3),
        f"{_PIXELS} --condition image",
    ),
    Source(
        _GUIDED,
        "an upsampler",
        lambda: OpenAINet(resblock_updown=True, head_channels=32, channels=6),
        f"{_PIXELS} --num-head-channels 32",
        refused="an upsampler, which takes a smaller picture as well: give --condition image",
    ),
    Source("DDPM (Ho et al.)", "names of its PyTorch ports", HoNet, _PIXELS),
    Source("MONAI", "DiffusionModelUNet, pixels in [0, 1]", monai(), _MONAI),
    Source("MONAI", "classes", monai(num_class_embeds=5), _MONAI, label=2, keyword="class_labels"),
    Source("MONAI", "resblock_updown", monai(resblock_updown=True), _MONAI),
    Source(
        _LUCIDRAINS,
        "predicts v",
        lambda: package.network(),
        "--sample-size 16",
        content=lambda net: package.diffusion(net).state_dict(),
    ),
    Source(
        _LUCIDRAINS,
        "predicts ε, cosine",
        lambda: package.network(),
        "--sample-size 16",
        content=lambda net: package.diffusion(
            net, objective="pred_noise", beta_schedule="cosine"
        ).state_dict(),
    ),
    Source(
        _LUCIDRAINS,
        "predicts x₀, linear",
        lambda: package.network(),
        "--sample-size 16",
        content=lambda net: package.diffusion(net, objective="pred_x0", beta_schedule="linear").state_dict(),
    ),
    Source(
        _LUCIDRAINS,
        "classes",
        lambda: package.network(num_classes=3),
        "--sample-size 16",
        label=2,
        keyword="classes",
        arguments={"cond_drop_prob": 0.0},
        content=lambda net: package.diffusion(net).state_dict(),
    ),
    Source(
        _LUCIDRAINS,
        "self_condition",
        lambda: package.network(self_condition=True),
        "--sample-size 16",
        refused="that it takes its last prediction beside the picture is not supported",
        content=lambda net: package.diffusion(net).state_dict(),
    ),
    Source(
        "latent diffusion",
        "CompVis",
        nn.Identity,
        refused="it works on the latents of an autoencoder, not on pixels",
        content=named("first_stage_model.encoder.conv_in.weight"),
    ),
    Source(
        "score_sde",
        "Song et al. 2021",
        nn.Identity,
        refused="its modules are numbered, so what they are is not in the file",
        content=named("all_modules.1.weight", "all_modules.1.bias"),
    ),
    Source(
        "DiT",
        "a transformer",
        nn.Identity,
        refused="it is not a U-Net",
        content=named("x_embedder.proj.weight", "t_embedder.mlp.0.weight"),
    ),
)


def table() -> str:
    """The cases as Markdown."""
    lines = ["|Family|What|Loads|Why not|", "|---|---|---|---|"]
    rows: list[tuple[Case | Source, str]] = [(case, "yes") for case in CASES]
    for each, loads in [*rows, *((source, "converted") for source in SOURCES)]:
        lines.append(f"|{each.family}|{each.what}|{'no' if each.refused else loads}|{each.refused}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
