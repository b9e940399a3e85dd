"""The U-Nets of denoising-diffusion-pytorch (P. Wang), by its own package.

The package has two of them: `Unet`, without classes, and that of its module `classifier_free_guidance`.
A state dict has the package's names below `model.`, as its `GaussianDiffusion` has its network, with one
difference: the null class (Ho & Salimans 2022) is the last row of `classes_emb` and not a vector beside it,
so that each row of a batch is of some class or of none.

The package is an optional extra. It imports all that its training needs, torchvision among it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from torch import Tensor, nn

from model.network import Network, Split
from model.unet_config import MAX_LEVELS, ConfigError, check_count, check_list, check_size

PACKAGE = "denoising-diffusion-pytorch"
PLAIN = "denoising_diffusion_pytorch.Unet"
CONDITIONAL = "denoising_diffusion_pytorch.classifier_free_guidance.Unet"
CLASS_NAMES = (PLAIN, CONDITIONAL)
"""What `_class_name` is in the config of a network of this family."""
OF_PLAIN = ("full_attn", "sinusoidal_pos_emb_theta")
"""Options that `classifier_free_guidance.Unet` has not."""


@dataclass(frozen=True)
class DenoisingDiffusionConfig:
    """Options of the package's `Unet`, with its names and its defaults.

    sample_size: (height, width), or None where it is not known. `dim` times each of `dim_mults` is
    the width of a level, highest resolution first. `attn_heads`, `attn_dim_head` and `full_attn` are one
    value for all levels, or one for each. num_classes: without the null class; None for the network without
    classes.
    """

    dim: int
    sample_size: tuple[int, int] | None = None
    init_dim: int | None = None
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    channels: int = 3
    learned_variance: bool = False
    sinusoidal_pos_emb_theta: float = 10_000
    attn_dim_head: int | tuple[int, ...] = 32
    attn_heads: int | tuple[int, ...] = 4
    full_attn: tuple[bool, ...] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        check_list("dim_mults", self.dim_mults, MAX_LEVELS)
        levels = len(self.dim_mults)
        counts: list[tuple[str, object]] = [("dim", self.dim), ("channels", self.channels)]
        counts += [("dim_mults", mult) for mult in self.dim_mults]
        optional = [("init_dim", self.init_dim), ("num_classes", self.num_classes)]
        counts += [(name, value) for name, value in optional if value is not None]
        for name in ("attn_dim_head", "attn_heads", "full_attn"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ConfigError(f"{name}={value!r} must have one entry for each of the {levels} dim_mults")
            if name != "full_attn":
                counts += [(name, each) for each in (value if isinstance(value, tuple) else (value,))]
        for name, value in counts:
            check_count(name, value)
        theta = self.sinusoidal_pos_emb_theta
        if type(theta) not in (int, float) or not 0 < theta < math.inf:
            raise ConfigError(f"sinusoidal_pos_emb_theta={theta!r} must be a number above 0")
        for flag in (self.learned_variance, *(self.full_attn or ())):
            if not isinstance(flag, bool):
                raise ConfigError(f"learned_variance and full_attn must be true or false, not {flag!r}")
        if self.sample_size is not None:
            object.__setattr__(self, "sample_size", check_size(self.sample_size, levels - 1))
        if self.num_classes is not None:
            options = {field.name: field.default for field in fields(self)}
            for name in OF_PLAIN:
                if getattr(self, name) != options[name]:
                    raise ConfigError(f"{name} is not an option of {CONDITIONAL}")

    @property
    def in_channels(self) -> int:
        """C of the input."""
        return self.channels

    @property
    def out_channels(self) -> int:
        """C of the output."""
        return self.channels * (2 if self.learned_variance else 1)

    @property
    def num_class_embeds(self) -> int | None:
        """How many labels there are, the null class as the last one included."""
        return None if self.num_classes is None else self.num_classes + 1

    @property
    def labels(self) -> int | None:
        """The same: each label is one of these."""
        return self.num_class_embeds

    @property
    def conditional(self) -> bool:
        """Whether it takes class labels."""
        return self.num_classes is not None

    @property
    def lowest_timestep(self) -> int:
        """It has a value at every one."""
        return 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture. Raises ConfigError where `sample_size` is None."""
        if self.sample_size is None:
            raise ConfigError("sample_size is not known")
        return self.channels, *self.sample_size

    def check_timesteps(self, timesteps: int, scale: float = 1.0) -> None:
        """Nothing to raise: it embeds any timestep."""

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> DenoisingDiffusionConfig:
        """Read a `unet/config.json` of this family. Raises ConfigError on an option not supported here."""
        options: dict[str, Any] = {}
        names = {field.name for field in fields(cls)}
        for name, value in config.items():
            if name.startswith("_"):
                continue
            if name not in names:
                raise ConfigError(f"{name}={value!r} is not an option this network has")
            options[name] = tuple(value) if isinstance(value, list) else value
        kind = config.get("_class_name")
        if (kind == CONDITIONAL) != (options.get("num_classes") is not None):
            raise ConfigError(f"num_classes={options.get('num_classes')!r} does not go with {kind}")
        return cls(**options)

    def to_diffusers(self) -> dict[str, Any]:
        """The same as a `unet/config.json`."""
        kind, left_out = (PLAIN, ("num_classes",)) if self.num_classes is None else (CONDITIONAL, OF_PLAIN)
        options = {name: value for name, value in asdict(self).items() if name not in left_out}
        if self.sample_size is not None and len(set(self.sample_size)) == 1:
            options["sample_size"] = self.sample_size[0]
        return {"_class_name": kind, **options}


class DenoisingDiffusionUnet(Network):
    """The package's network, called as all networks are. Raises ConfigError without the package."""

    def __init__(self, config: DenoisingDiffusionConfig) -> None:
        super().__init__()
        self.config: DenoisingDiffusionConfig = config
        self.model = _unet(config)
        if config.num_classes is not None:
            self.model.classes_emb = nn.Embedding(config.num_classes + 1, config.dim)
            del self.model.null_classes_emb
        # Its sinusoids of the timestep are float32 in a network of any dtype.
        first = cast("nn.Linear", cast("nn.Sequential", self.model.time_mlp)[1])
        first.register_forward_pre_hook(_as_weights)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """As `Network.forward`. The label num_classes is the null class."""
        if (y is None) == self.config.conditional:
            raise ValueError("class labels must be given exactly when the network is class-conditional")
        out: Tensor = self.model(x, t) if y is None else self.model(x, t, y, cond_drop_prob=0.0)
        return out

    def split(self) -> Split:
        """See `Network.split`."""
        body = deepcopy(self)
        layers = cast("nn.Sequential", body.model.time_mlp)
        first, layers[0] = layers[0], nn.Identity()
        return Split(
            lambda t, y: (first(t),) if y is None else (first(t), y),
            body,
            lambda out, _: out,
        )


def _as_weights(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.to(cast("Tensor", layer.weight).dtype) for value in inputs)


def _unet(config: DenoisingDiffusionConfig) -> nn.Module:
    """The package's own network. Raises ConfigError where the package cannot be had."""
    try:
        # An optional extra, and heavy.
        from denoising_diffusion_pytorch import Unet
        from denoising_diffusion_pytorch.classifier_free_guidance import Unet as ConditionalUnet
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed, which this network needs: pip install {PACKAGE}"
        ) from error
    except (ImportError, RuntimeError) as error:  # of a torchvision that is built for another torch
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{PACKAGE} cannot be imported ({reason}): the torchvision that it imports must fit this torch"
        ) from error
    options = {name: value for name, value in config.to_diffusers().items() if name != "_class_name"}
    del options["sample_size"]
    try:
        unet: nn.Module = (Unet if config.num_classes is None else ConditionalUnet)(**options)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{PACKAGE} makes no network of these options ({error!r})") from error
    return unet
