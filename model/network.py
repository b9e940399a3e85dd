"""What a network is to whatever runs it: noisy pictures in, a prediction out, and a config that says which.

Two families are such networks: diffusers' `UNet2DModel` (model/unet.py) and denoising-diffusion-pytorch's
`Unet` (model/denoising_diffusion.py). A model folder's `unet/config.json` says which by its `_class_name`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class NetworkConfig(Protocol):
    """What has to be known of a network beside the network."""

    @property
    def sample_size(self) -> tuple[int, int] | None:
        """(height, width) of a picture; None where that is not known."""

    @property
    def in_channels(self) -> int:
        """C of the input."""

    @property
    def out_channels(self) -> int:
        """C of the output: as many, or twice as many where the variance is predicted too."""

    @property
    def num_class_embeds(self) -> int | None:
        """How many classes its embedding has, the null class included; None where it has no such table."""

    @property
    def labels(self) -> int | None:
        """How many labels there are to choose from; None where there are none, or any number is one."""

    @property
    def conditional(self) -> bool:
        """Whether it takes class labels."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture. Raises ConfigError where `sample_size` is None."""

    @property
    def lowest_timestep(self) -> int:
        """The first timestep that it has a value at."""

    def check_timesteps(self, timesteps: int, scale: float = 1.0) -> None:
        """Raise ConfigError where the network cannot embed each of so many timesteps, times scale."""

    def to_diffusers(self) -> dict[str, Any]:
        """The same as a `unet/config.json`."""


class Split(NamedTuple):
    """A network in parts, for what runs it in one dtype throughout: a timestep does not survive bfloat16.

    features: (t, y) → float32 features of the timestep, then of the label or the label, each [B, …].
    body: (x, *features) → output, a copy of the network behind them. scaled: (output, t) → the prediction.
    """

    features: Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]
    body: nn.Module
    scaled: Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """A network of any family. A module of torch, since runtimes copy, cast, compile and trace it.

    It has to give a row the same output in every batch but for rounding, and to run at fixed shapes without
    branching on values, so that its steps can be recorded.
    """

    config: NetworkConfig

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict ε (or whatever the checkpoint's `prediction_type` says) for each row.

        x: [B, C, H, W], in the dtype of the weights; t: [B] timesteps; y: [B] int64 class labels, required
        exactly when the network is class-conditional. Returns [B, C_out, H, W]. Raises ValueError for labels
        that are missing or not wanted.
        """
        raise NotImplementedError

    def split(self) -> Split:
        """The same in parts: `scaled(body(x, *features(t, y)), t)` is `forward(x, t, y)`."""
        raise NotImplementedError
