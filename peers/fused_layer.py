"""All of a decoder layer but its attention in two calls, for few rows and matrices in blocks.

With four bits a weight a layer's arithmetic takes less time than the calls of its small operations.
"""

from __future__ import annotations

import torch
from torch import nn

from peers.block_kernels import BlockKernels, block_kernels, described
from peers.norm import RootMeanSquareNorm
from peers.quantized_linear import QuantizedLinear


class FusedLayer:
    """Gives what the layer's own modules give, to within float32 rounding. One thread."""

    def __init__(
        self,
        kernels: BlockKernels,
        matrices: list[QuantizedLinear],
        norms: tuple[RootMeanSquareNorm, RootMeanSquareNorm],
        rotated: int,
        head_dim: int,
    ) -> None:
        """``matrices``: query, key and value; output; gate and up; down. ``rotated``: heads of queries and keys."""
        self._kernels = kernels
        self._matrices = matrices  # their memory is what the addresses below mean
        self._norms = norms
        self._query_key_value, self._output, self._gate_up, self._down = (
            described(linear.matrix) for linear in matrices
        )
        self._outputs = matrices[0].out_features
        self._rotated, self._head_dim = rotated, head_dim

    @classmethod
    def of(
        cls, linears: list[nn.Module], norms: tuple[RootMeanSquareNorm, RootMeanSquareNorm], rotated: int, head_dim: int
    ) -> FusedLayer | None:
        """None where a matrix is not in blocks or has a bias, a head has an odd size, or there are no kernels."""
        kernels = block_kernels()
        matrices = [linear for linear in linears if isinstance(linear, QuantizedLinear) and linear.bias is None]
        if kernels is None or len(matrices) != len(linears) or head_dim % 16 or matrices[0].in_features % 32:
            return None
        return cls(kernels, matrices, norms, rotated, head_dim)

    def project(self, hidden: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` -> ``[rows, heads, head_dim]``: queries and keys, rotated, and values."""
        out = hidden.new_empty(hidden.shape[0], self._outputs // self._head_dim, self._head_dim)
        norm = self._norms[0]
        self._kernels.project(
            self._query_key_value, hidden, norm.weight, norm.epsilon, cos, signed_sin, self._rotated, out
        )
        return out

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What the layer gives for ``hidden``, once its attention gave ``attended``, both ``[rows, ...]``."""
        result = hidden.clone()
        norm = self._norms[1]
        self._kernels.finish(self._output, self._gate_up, self._down, attended, norm.weight, norm.epsilon, result)
        return result
