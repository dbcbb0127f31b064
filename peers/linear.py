"""Matrix products on a CPU, from weights stored the way the kernel reads them.

PyTorch's own ``linear`` hands row-major weights to a general BLAS, which is slow for the 2 to 32 rows of a decode
batch. oneDNN's inner product with weights that were reordered once is faster at every number of rows (1.1 to 2.2
times where measured), with the same float32 accumulation. ``torch.compile`` does this to frozen linear layers; here
it happens while a shard loads, one matrix at a time, so that there is never a second copy of a model.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, Final

import torch
from torch import nn

from peers.compiled import cpu_features

_ops: Any = torch.ops.mkldnn

PACKED_SIZES: Final = (64, 48, 32, 16, 8)
"""Outputs that oneDNN puts side by side, by kind of CPU."""


class OneDnnLinear(nn.Module):
    """Stands in for ``nn.Linear``. Keeps the weight ``[out, in]`` only in oneDNN's blocked layout, or, if it is not
    to be packed because an embedding shares it, as it is; the kernel is the same."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, packed: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _ops._reorder_linear_weight(weight.contiguous()) if packed else weight
        self.packed_size = packed_size(self.weight, weight) if packed else None
        self.bias = bias

    @property
    def address(self) -> int:
        """Of the weight's numbers, as long as this module lives."""
        return int(_ops.data_ptr(self.weight)) if self.weight.is_mkldnn else self.weight.data_ptr()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return product(rows, self.weight, self.bias)


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``rows @ weight.T + bias`` by oneDNN's kernel; ``weight`` ``[out, in]`` may be packed."""
    return _ops._linear_pointwise(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def memory_of(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of a packed matrix in the order in which they lie. Valid as long as ``packed`` is."""
    size = _ops._nbytes(packed)
    return torch.frombuffer((ctypes.c_char * size).from_address(_ops.data_ptr(packed)), dtype=packed.dtype)


def packed_size(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """How many outputs of ``weight`` ``[out, in]`` stand side by side in ``packed``: it then lies as
    ``[out / size, in, size]`` in float32, and as ``[out / size, in / 2, size, 2]`` in bfloat16. None for any other
    layout."""
    outputs, inputs = weight.shape
    each = {torch.float32: 1, torch.bfloat16: 2}.get(weight.dtype)
    if each is None or inputs % each or _ops._nbytes(packed) != weight.nbytes:
        return None
    memory = memory_of(packed)
    for size in PACKED_SIZES:
        if outputs % size == 0:
            ends = (memory[: size * inputs], weight[:size]), (memory[-size * inputs :], weight[-size:])
            if all(
                torch.equal(found.view(inputs // each, size, each), wanted.view(size, -1, each).transpose(0, 1))
                for found, wanted in ends
            ):
                return size
    return None


def blank(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """A packed matrix of zeros, to be filled through its memory, see :func:`blank_size`."""
    packed: torch.Tensor = _ops._reorder_linear_weight(torch.zeros(outputs, inputs, dtype=dtype))
    return packed


def blank_size(outputs: int, inputs: int, dtype: torch.dtype) -> int | None:
    """:func:`packed_size` of such a matrix; None if its layout is not known."""
    numbers = torch.arange(outputs * inputs, dtype=torch.float32).view(outputs, inputs)  # below 2**24: exact
    if dtype == torch.bfloat16:
        numbers = numbers.remainder(251)  # ... below 2**8
    try:
        return packed_size(_ops._reorder_linear_weight(numbers.to(dtype)), numbers.to(dtype))
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None


class DenseLinear(nn.Module):
    """``torch``'s own kernel, for devices and dtypes without the other."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(rows, self.weight, self.bias)


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build and machine have the kernel for ``dtype``: tried once, on a small product."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator).to(dtype)
    rows = torch.randn(3, 40, generator=generator).to(dtype)
    try:
        with torch.inference_mode():
            got = OneDnnLinear(weight, None, packed=True)(rows)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    return torch.allclose(got.float(), rows.float() @ weight.float().T, atol=tolerance)


@cache
def bfloat16_is_fast() -> bool:
    """Whether the kernel for bfloat16 is faster than ours for float32. With AVX512_BF16 alone it is not: on Intel's
    CPUs a product of pairs takes as long as four of floats."""
    return packing_works(torch.bfloat16) and not {b"amx_bf16", b"bf16"}.isdisjoint(cpu_features())
