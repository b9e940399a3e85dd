"""Chains by hand: our plans as their module's docstring says, and diffusers' schedulers beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model.samplers import Plan
from model.schedule import NoiseSchedule

SHAPE = (2, 1, 4, 4)
Network = Callable[[Tensor, int], Tensor]
Step = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def noise(row: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(row + 1), dtype=torch.float64)


def network(schedule: NoiseSchedule) -> Network:
    """An output that depends on x and t everywhere, whose x₀ is bounded yet leaves [−1, 1] at times."""
    picture = 1.2 * torch.sin(torch.arange(math.prod(SHAPE), dtype=torch.float64)).view(SHAPE)

    def out(x: Tensor, t: int) -> Tensor:
        ac = float(schedule.alphas_cumprod[t])
        x0 = torch.tanh(picture + 0.3 * torch.sin(3 * x)) * 1.3
        eps = (x - math.sqrt(ac) * x0) / math.sqrt(1 - ac)
        by_kind: dict[str, Tensor] = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": ac**0.5 * eps - (1 - ac) ** 0.5 * x0,
        }
        return by_kind[schedule.prediction_type]

    return out


def values(row: np.void, names: str) -> list[float]:
    return [float(row[name]) for name in names.split()]


def follow(plan: Plan, out: Network, variance_frac: Network | None = None) -> list[Tensor]:
    """x after every step, in float64, as the docstring of model/samplers.py says.

    variance_frac: the output's second half.
    """
    x, previous, xs = noise(-1), torch.zeros(SHAPE, dtype=torch.float64), []
    for step, row in enumerate(plan.table):
        t, a_x, a_o, clip, q, c_x, c_0, c_u, c_p, c_n, c_v = values(
            row, "t a_x a_o clip q c_x c_0 c_u c_p c_n c_v"
        )
        unclipped = a_x * x + a_o * out(x, int(t))
        x0 = unclipped.clamp(-clip, clip)
        if q:
            most = torch.quantile(unclipped.abs().flatten(1), q, dim=1).clamp(1, clip).view(-1, 1, 1, 1)
            x0 = unclipped.clamp(-most, most) / most
        wider = 1.0 if variance_frac is None else torch.exp(c_v * (variance_frac(x, int(t)) + 1) / 2)
        x = c_x * x + c_0 * x0 + c_u * unclipped + c_p * previous + c_n * wider * noise(step)
        previous = x0
        xs.append(x)
    return xs


def drive(timesteps: Tensor, out: Network, step: Step) -> list[Tensor]:
    """x after every step of a diffusers scheduler."""
    x, xs = noise(-1), []
    for row, t in enumerate(timesteps.tolist()):
        x = step(out(x, t), t, x, noise(row))
        xs.append(x)
    return xs


def assert_same_chain(ours: Sequence[Tensor], theirs: Sequence[Tensor], within: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for row, (x, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert (x - expected).abs().max() <= within, f"step {row}"
    assert ours[-1].std() > 0.1
