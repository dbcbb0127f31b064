"""The norm of Llama's family, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RootMeanSquareNorm(nn.Module):
    """The family's norm in float32, through the one norm that torch computes in a single kernel on a CPU.

    ``x`` beside ``-x`` has the mean 0, and so its variance is the mean square of ``x``.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat((weight, torch.zeros_like(weight))), requires_grad=False)
        self.variance_epsilon = epsilon  # as transformers calls it

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        size = rows.shape[-1]
        both = torch.cat((rows, rows.neg()), -1)
        return torch.layer_norm(both, (2 * size,), self.weight, None, self.variance_epsilon)[..., :size]


class CardNorm(nn.Module):
    """The family's norm by torch's kernel for graphics cards, which rounds once, at the end."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon = epsilon

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(rows, self.weight.shape, self.weight, self.variance_epsilon)


def fast_norm(norm: Any) -> nn.Module:
    """In place of a norm of transformers; that one itself where this is no faster."""
    weight = norm.weight.detach()
    if weight.device.type != "cpu":
        return CardNorm(weight, norm.variance_epsilon)
    if weight.dtype != torch.float32:
        return norm  # type: ignore[no-any-return]
    return RootMeanSquareNorm(weight, norm.variance_epsilon)


def weight_of(norm: Any) -> torch.Tensor:
    """Of a norm of this kind, ours or transformers': float32 ``[size]``."""
    weight: torch.Tensor = norm.weight.detach()
    return weight[: len(weight) // 2] if isinstance(norm, RootMeanSquareNorm) else weight.float()
