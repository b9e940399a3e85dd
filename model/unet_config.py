"""The options of the U-Net, by the names and with the defaults of diffusers' `UNet2DModel`.

An option that the network here does not have is refused by name, because a silently ignored one ruins
samples. What diffusers itself ignores is no reason to refuse a model, and is named in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

logger = logging.getLogger(__name__)

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
BOOKKEEPING = {
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
}
"""What diffusers writes about a configuration itself."""
EMA_KEYS = frozenset(
    {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
)
"""What diffusers' EMAModel adds to a network's config: how the average was taken."""
WITHOUT_EFFECT = {"torch_dtype", *EMA_KEYS}
"""Other keys that no output depends on."""


MAX_COUNT = 1 << 20
"""Of widths, classes and timesteps: far above what any network has, and far below what overflows."""
MAX_LAYERS = 64
"""Of blocks in a level: each is an object long before the weights say whether it is there."""
MAX_LEVELS = 12
MAX_SIDE = 4096
"""Of a picture, in pixels. A network says nothing of it that its weights could be compared with."""


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `64x128`, or of `32`, which is square. Raises ValueError for anything else."""
    height, _, width = text.partition("x")
    size = int(height), int(width or height)
    if min(size) < 1:
        raise ValueError(f"{text}: a size is a number, or HEIGHTxWIDTH")
    return size


class ConfigError(ValueError):
    """A configuration names something this code does not do; the message says what."""


@dataclass(frozen=True)
class UNetConfig:
    """Options of `UNet2DModel`, with its names and its defaults.

    `sample_size` is (height, width); one number, for a square, is taken too. None is for a network of which
    that is not known: it has no `shape`. `block_out_channels` are the widths per resolution level, highest
    resolution first. For class-conditional models `num_class_embeds` counts the null class of classifier-free
    guidance too, when the model was trained with one.

    As in diffusers, `downsample_type` and `upsample_type` are of the levels with attention alone,
    `num_train_timesteps` counts the entries of a `learned` time embedding, and `num_class_embeds` those of
    the classes where `class_embed_type` is None. Where it is `timestep`, a label is any number from 0, which
    is embedded as a timestep is.
    """

    sample_size: tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            check_list(name, getattr(self, name), MAX_LEVELS)
        self._check_counts()
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ConfigError("down_block_types, up_block_types and block_out_channels differ in length")
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in getattr(self, name):
                if kind not in known:
                    raise ConfigError(f"{name}: {kind!r} is not supported (known: {', '.join(known)})")
        for option, allowed in (
            ("mid_block_type", ("UNetMidBlock2D", None)),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
            ("downsample_padding", (0, 1)),
            ("downsample_type", ("conv", "resnet")),
            ("upsample_type", ("conv", "resnet")),
            ("act_fn", ACTIVATIONS),
            ("time_embedding_type", ("positional", "fourier", "learned")),
            ("class_embed_type", (None, "timestep", "identity")),
        ):
            if getattr(self, option) not in allowed:
                raise ConfigError(f"{option}={getattr(self, option)!r} is not supported (known: {allowed})")
        self._check_embeddings()
        self._check_size()

    def _check_counts(self) -> None:
        """Integers are integers, and what is divided into groups can be."""
        check_count("layers_per_block", self.layers_per_block, MAX_LAYERS)
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            check_count(name, getattr(self, name))
        for name in (
            "time_embedding_dim",
            "attention_head_dim",
            "attn_norm_num_groups",
            "num_class_embeds",
            "num_train_timesteps",
        ):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false")
        for name in ("freq_shift", "mid_block_scale_factor", "dropout", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not -MAX_COUNT < value < MAX_COUNT:
                raise ConfigError(f"{name}={value!r} must be a number")
        if not 0 <= self.dropout <= 1:
            raise ConfigError(f"dropout={self.dropout!r} must lie between 0 and 1")
        for name in ("mid_block_scale_factor", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be above 0")
        for width in self.block_out_channels:
            check_count("block_out_channels", width)
            if width % self.norm_num_groups:
                raise ConfigError(f"norm_num_groups={self.norm_num_groups} does not divide width {width}")
        last, groups = self.block_out_channels[-1], self.attn_norm_num_groups
        if groups and last % groups:
            raise ConfigError(f"attn_norm_num_groups={groups} does not divide width {last}")

    def _check_embeddings(self) -> None:
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ConfigError("time_embedding_type='learned' needs num_train_timesteps")
        if self.time_embedding_type == "positional" and self.freq_shift >= self.block_out_channels[0] // 2:
            raise ConfigError(
                f"freq_shift={self.freq_shift} must be below half of the first width,"
                f" {self.block_out_channels[0]}"
            )
        if self.class_embed_type == "identity":
            raise ConfigError(
                "class_embed_type='identity' is not supported: such a network takes a vector where a request"
                " gives a class; python -m model.convert --class-vectors FILE puts the vectors of its classes"
                " into it"
            )
        if self.class_embed_type == "timestep" and self.time_embedding_type == "fourier":
            raise ConfigError(
                "class_embed_type='timestep' is not supported with time_embedding_type='fourier': label 0 has"
                " no logarithm"
            )

    def _check_size(self) -> None:
        """Make `sample_size` a pair. diffusers' network fails too on what does not halve evenly."""
        given: Any = self.sample_size
        if given is not None:
            object.__setattr__(self, "sample_size", check_size(given, len(self.block_out_channels) - 1))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample. Raises ConfigError where the size is not known."""
        if self.sample_size is None:
            raise ConfigError("sample_size is missing: the network does not say how large its pictures are")
        return self.in_channels, *self.sample_size

    @property
    def conditional(self) -> bool:
        """Whether the network takes class labels."""
        return self.class_embed_type is not None or self.num_class_embeds is not None

    @property
    def labels(self) -> int | None:
        """How many labels there are to choose from; None where there are none, or any number is one."""
        if self.class_embed_type is None:
            return self.num_class_embeds
        return self.num_train_timesteps if self.time_embedding_type == "learned" else None

    @property
    def lowest_timestep(self) -> int:
        """The first timestep that the network has a value at: Fourier features take its logarithm."""
        return 1 if self.time_embedding_type == "fourier" else 0

    def check_timesteps(self, timesteps: int, scale: float = 1.0) -> None:
        """Raise ConfigError where the network cannot embed each of so many timesteps, times scale."""
        if self.lowest_timestep:
            logger.warning(
                "time_embedding_type='fourier': the network has no value at timestep 0, so only chains that"
                " end above it can be run: those of timestep_spacing 'trailing' and at most %d steps",
                timesteps // 2,
            )
        if self.time_embedding_type == "learned" and scale != 1:
            raise ConfigError(f"timestep_scale={scale}: learned time embeddings are of whole timesteps")
        if self.time_embedding_type == "learned" and (self.num_train_timesteps or 0) < timesteps:
            raise ConfigError(
                f"num_train_timesteps={self.num_train_timesteps} learned time embeddings are too few for the"
                f" scheduler's {timesteps} timesteps"
            )

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a diffusers `unet/config.json`. Raises ConfigError on an option not supported here.

        Keys that no output depends on are left out, and named in the log.
        """
        kind = config.get("_class_name", "UNet2DModel")
        if kind != "UNet2DModel":
            raise ConfigError(f"_class_name={kind!r} is not supported (known: UNet2DModel)")
        names = {field.name for field in fields(cls)}
        options: dict[str, Any] = {}
        ignored = []
        for name, value in config.items():
            if name in names:
                options[name] = tuple(value) if isinstance(value, list) else value
            elif name.startswith("_") or name in WITHOUT_EFFECT:
                ignored += [name] if name not in BOOKKEEPING else []
            else:
                raise ConfigError(f"{name}={value!r} is not an option this network has")
        if ignored:
            logger.warning("the U-Net's config: %s left out, without an effect", ", ".join(sorted(ignored)))
        for name in ("down_block_types", "up_block_types"):  # names of blocks have had a prefix
            if name in options:
                options[name] = tuple(str(kind).removeprefix("UNetRes") for kind in options[name])
        for name in ("downsample_type", "upsample_type"):
            options[name] = options.get(name) or "conv"
        if "act_fn" in options:
            options["act_fn"] = str(options["act_fn"]).lower()
        return cls(**options)

    def to_diffusers(self) -> dict[str, Any]:
        """The same as a `unet/config.json` that diffusers reads."""
        return {
            "_class_name": "UNet2DModel",
            **asdict(self),
            "sample_size": size_to_json(self.sample_size),
        }


def check_count(name: str, value: object, most: int = MAX_COUNT) -> None:
    """Raises ConfigError unless an option is a whole number that a network can have."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
    if value > most:
        raise ConfigError(f"{name}={value!r} must be at most {most}")


def check_list(name: str, value: object, most: int) -> None:
    """Raises ConfigError unless an option is a list of some entries, as JSON or a tuple has it."""
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= most:
        raise ConfigError(f"{name}={value!r} must be a list of 1 to {most} entries")


def check_size(given: Any, halvings: int) -> tuple[int, int]:
    """A (height, width) from one number or two. Raises ConfigError for one that cannot be halved so often."""
    size = (given, given) if isinstance(given, int) else given
    pair = isinstance(size, Sequence) and len(size) == 2 and all(type(side) is int for side in size)
    if not pair or any(side < 1 or side % 2**halvings for side in size):
        raise ConfigError(
            f"sample_size={given!r} must be a height and a width, or one number for both,"
            f" that can be halved {halvings} times"
        )
    if max(size) > MAX_SIDE:
        raise ConfigError(f"sample_size={given!r} must be at most {MAX_SIDE}")
    return size[0], size[1]


def size_to_json(size: tuple[int, int] | None) -> int | tuple[int, int] | None:
    """A (height, width) as configurations have it: one number for a square."""
    return size[0] if size is not None and size[0] == size[1] else size
