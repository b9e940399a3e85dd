from __future__ import annotations

from typing import Any

import torch

from model.training.loop import ResumableTrainer


def states(it: ResumableTrainer[Any]) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, module in it.modules().items():
        tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in it.net.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in it.optimizer.state[parameter].items()}
    return {name: value.detach().clone() for name, value in tensors.items()}
