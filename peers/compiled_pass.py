"""Rows through all layers of a shard in one call, from the embedded ones to what the last layer puts out.

A decode step is a few hundred small operations. With the matrices read at the speed of memory, calling them from Python
takes as long as a quarter of the arithmetic, and it holds the interpreter's lock, for which the network waits. Here the
compiled kernels walk through the layers themselves: norms, products, rotation, attention over the sessions' caches. On
long prompts they are as fast as oneDNN.

A row's result is the same to the last bit whichever rows share the pass, so that a stage that replays a session's rows
in other chunks than they came in gets what the lost one had. That goes for bfloat16, too, where the CPU
multiplies it itself: rows are rounded before each product, and only there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import nn

from peers.attention import Spans
from peers.attention_kernel import AttentionKernel, attention_kernel
from peers.block_kernels import FLOAT32, BlockKernels, Matrix, block_kernels
from peers.decoder_layer import DecoderLayer, Rotation
from peers.linear import OneDnnLinear
from peers.norm import weight_of
from peers.quantized_linear import PanelLinear
from peers.weights.blocks import BlockKind
from swarm.sampling import Floats


class CompiledPass:
    """Gives what the layers' own modules give, to within the dtype's rounding, by as many threads as torch uses."""

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        rotation: Rotation,
        dtype: torch.dtype,
        norm: nn.Module | None,
        kernels: BlockKernels,
        attention: AttentionKernel,
    ) -> None:
        """Takes what :meth:`of` has found fit."""
        self._kept: list[torch.Tensor] = []
        numbers = [_described(layer, self._kept) for layer in layers]
        self._layers = layers  # with the tensors above, their memory is what the addresses mean
        self._numbers = (ctypes.c_int64 * sum(map(len, numbers)))(*(n for layer in numbers for n in layer))
        self._kernels, self._attention = kernels, attention
        self._rotary = _RotaryTables(rotation)
        first = layers[0]
        self._heads, self._kv_heads, self._dim, self._scale = first.heads, first.kv_heads, first.head_dim, first.scaling
        self._epsilon = _epsilon(first)
        self._norm = None if norm is None else _held(weight_of(norm), self._kept)
        self.rounded = dtype == torch.bfloat16 and kernels.multiplies_bfloat16 and all(map(_may_be_rounded, layers))
        """Products are bfloat16's, the CPU's own: as fast for one row, and much faster for many."""

    @classmethod
    def of(
        cls, layers: Sequence[nn.Module], rotation: nn.Module, dtype: torch.dtype, norm: nn.Module | None
    ) -> Self | None:
        """None where there is no compiler, or a layer has something that the kernels don't know. ``dtype`` is that of
        what the caches hold; ``norm``, if any, follows the last layer."""
        if dtype not in (torch.float32, torch.bfloat16):
            return None
        kernels, attention = block_kernels(), attention_kernel()
        known = [layer for layer in layers if isinstance(layer, DecoderLayer)]
        if kernels is None or attention is None or not known or len(known) != len(layers):
            return None
        if not isinstance(rotation, Rotation) or not all(_fits(layer, kernels.lanes) for layer in known):
            return None
        if len({(layer.heads, layer.kv_heads, layer.head_dim, layer.scaling, _epsilon(layer)) for layer in known}) > 1:
            return None
        if norm is not None and norm.variance_epsilon != _epsilon(known[0]):
            return None
        return cls(known, rotation, dtype, norm, kernels, attention)

    def run(self, given: Floats, spans: Spans) -> tuple[Floats, bool]:
        """Contiguous float32 ``[rows, hidden]`` -> the same, after the last layer and its norm, and whether all of
        it is finite; the new keys and values are in the caches.

        These are arrays, not tensors: an operation of torch lets go of Python's lock, which the loop's thread takes
        then, and the rows wait for it; and with the processor's caches full of weights each costs ten microseconds.
        """
        result = np.empty(given.shape, np.float32)
        positions = spans.positions
        cos, signed_sin = self._rotary.reaching(max(positions))
        finite = self._kernels.run_layers(
            self._numbers, len(self._layers), cos, signed_sin, (ctypes.c_int64 * len(positions))(*positions),
            self._heads, self._kv_heads, self._dim, self.rounded, self._scale, self._epsilon,
            self._norm, self._attention.put_address, self._attention.attend_address, spans.table, len(spans),
            torch.get_num_threads(), given, result,
        )  # fmt: skip
        return result, finite


class _RotaryTables:
    """The family's rotary embedding by position, computed once for each."""

    def __init__(self, rotation: Rotation) -> None:
        self._rotation = rotation
        self._tables: list[torch.Tensor] = []
        self._positions = 0
        self._addresses = 0, 0

    def reaching(self, position: int) -> tuple[int, int]:
        """Addresses of cosines and signed sines, contiguous float32 ``[positions, head_dim]`` as :class:`Rotation`
        gives them, up to ``position`` at least; until the next call."""
        if position >= self._positions:
            self._positions = max(256, 1 << position.bit_length())
            found = self._rotation(torch.empty(0), torch.arange(self._positions)[None])
            self._tables = [table[:, 0].contiguous() for table in found]
            cos, signed_sin = self._tables
            self._addresses = cos.data_ptr(), signed_sin.data_ptr()
        return self._addresses


def _fits(layer: DecoderLayer, lanes: int) -> bool:
    if layer.head_dim % (2 * lanes) or AttentionKernel.misfit(layer.heads, layer.kv_heads, layer.head_dim):
        return False
    norms = [norm for norm in _norms(layer) if norm is not None]
    if len(norms) == 3 or len({norm.variance_epsilon for norm in norms}) > 1:
        return False
    linears = _linears(layer)
    return all(_matrix(linear, lanes) is not None for linear in linears) and all(
        getattr(linear, "bias", None) is None for linear in linears[1:]
    )


def _linears(layer: DecoderLayer) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    return layer.query_key_value, layer.output, layer.gate_up, layer.down


def _norms(layer: DecoderLayer) -> tuple[nn.Module, nn.Module, nn.Module | None, nn.Module | None]:
    return layer.input_norm, layer.output_norm, layer.query_norm, layer.key_norm


def _matrix(linear: nn.Module, lanes: int) -> Matrix | None:
    """None for what is not on a CPU, or not as the kernels read it."""
    if isinstance(linear, PanelLinear):
        found = linear.matrix.described
    elif isinstance(linear, OneDnnLinear) and linear.packed_size is not None and linear.packed_size % lanes == 0:
        kind = FLOAT32 if linear.weight.dtype == torch.float32 else BlockKind.BFLOAT16.value
        found = kind, linear.address, linear.out_features, linear.in_features, linear.packed_size
    else:
        return None
    return found if found[2] % 32 == 0 and found[3] % 32 == 0 else None


def _may_be_rounded(layer: DecoderLayer) -> bool:
    matrices = [_matrix(linear, 1) for linear in _linears(layer)]
    return all(found is not None and found[0] != FLOAT32 and found[4] % 32 == 0 for found in matrices)


def _described(layer: DecoderLayer, kept: list[torch.Tensor]) -> list[int]:
    """A ``layer`` of ``block_kernels.c``; what it points to and the layer doesn't have comes into ``kept``."""
    numbers: list[int] = []
    for linear in _linears(layer):
        matrix = _matrix(linear, 1)
        assert matrix is not None  # `_fits` has seen to it
        numbers += matrix
    bias = getattr(layer.query_key_value, "bias", None)
    norms = [None if norm is None else weight_of(norm) for norm in _norms(layer)]
    for found in (*norms[:2], None if bias is None else bias.float(), *norms[2:]):
        numbers.append(0 if found is None else _held(found, kept))
    return [*numbers, layer.layer_idx, layer.window or 0]


def _held(numbers: torch.Tensor, kept: list[torch.Tensor]) -> int:
    """Their address; ``kept`` keeps them there."""
    kept.append(numbers.contiguous())
    return kept[-1].data_ptr()


def _epsilon(layer: DecoderLayer) -> float:
    return layer.input_norm.variance_epsilon  # type: ignore[return-value]
