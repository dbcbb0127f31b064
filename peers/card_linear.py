"""``nn.Linear`` on an NVIDIA card, by the kernels of :mod:`peers.card_products`."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

from peers.weights.blocks import BlockKind, Blocks, to_blocks

logger = logging.getLogger(__name__)


class CardLinear(nn.Module):
    """Of a matrix in blocks or in numbers, ``[outputs, inputs]``."""

    def __init__(self, matrix: Blocks | torch.Tensor, bias: torch.Tensor | None) -> None:
        from peers.card_products import CardMatrix

        super().__init__()
        self.matrix = CardMatrix(matrix)
        self.out_features, self.in_features = self.matrix.outputs, self.matrix.inputs
        self.bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result = self.matrix.product(rows.reshape(-1, self.in_features).contiguous())
        result = result.view(*rows.shape[:-1], self.out_features)
        return result if self.bias is None else result.add_(self.bias)


@cache
def card_works(device: torch.device) -> bool:
    """Whether it is an NVIDIA card with units for bfloat16, and this build has the kernels: tried once, on a small
    product."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    generator = torch.Generator().manual_seed(0)
    matrix = to_blocks(torch.randn(70, 96, generator=generator), BlockKind.Q4_1).to(device)
    rows = torch.randn(140, 96, generator=generator).to(device)
    try:
        linear = CardLinear(matrix, None)
        many, few = linear(rows), linear(rows[:9])
        if torch.equal(many[:9], few) and torch.allclose(many, rows @ matrix.expand().T, atol=1e-4):
            return True
        logger.warning("the kernels give wrong products on %s, it will be slower", device)
    except Exception as error:  # of a compiler that knows many
        logger.warning("no kernels for products on %s, it will be slower: %s", device, error)
    return False
