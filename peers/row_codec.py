"""Hidden states as bytes: rows of tensors into the encodings of ``swarm.wire``, and back."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from swarm.sampling import Floats
from swarm.wire import BLOCK, row_bytes

Rows = torch.Tensor | Floats
"""Tensors, or float32 arrays where the compiled pass is between them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MOST = 127
"""Largest byte of ``int8``; -128 is not used, so that both signs reach as far."""


def encoded(rows: Rows, encoding: str) -> bytes:
    """``rows``: ``[rows, width]``, finite. Each row's bytes depend on this row alone."""
    if isinstance(rows, np.ndarray):
        if encoding == "float32":
            return rows.astype("<f4", copy=False).tobytes()
        rows = torch.from_numpy(rows)
    packed = _packed(rows) if encoding == "int8" else rows.to(DTYPES[encoding])
    data: bytes = packed.contiguous().view(torch.uint8).numpy(force=True).tobytes()
    return data


def array_of(data: bytes, width: int) -> Floats:
    """``float32`` rows as they are: ``[rows, width]``, not to be written to."""
    return np.frombuffer(data, "<f4").reshape(-1, width)


def decoded(data: bytes, encoding: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    """``[rows, width]`` in ``dtype`` out of whole rows, on the CPU. Values may be anything, not finite ones too."""
    if encoding != "int8":
        return torch.frombuffer(bytearray(data), dtype=DTYPES[encoding]).view(-1, width).to(dtype)
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, row_bytes(encoding, width))
    split = packed.shape[1] - width
    scales = packed[:, :split].reshape(-1).view(torch.bfloat16).view(len(packed), -1).float()
    values = packed[:, split:].view(torch.int8).float()
    return (values * scales.repeat_interleave(BLOCK, 1)[:, :width]).to(dtype)


def _packed(rows: torch.Tensor) -> torch.Tensor:
    """``[rows, scales and values]`` as bytes."""
    count, width = rows.shape
    blocks = functional.pad(rows.float(), (0, -width % BLOCK)).view(count, -1, BLOCK)
    scales = (blocks.abs().amax(-1, keepdim=True) / MOST).bfloat16()
    steps = scales.float()
    values = (blocks / steps.where(steps > 0, 1.0)).round().clamp(-MOST, MOST).to(torch.int8)
    bytes_of_scales = scales.view(count, -1).view(torch.uint8)
    return torch.cat((bytes_of_scales, values.view(count, -1)[:, :width].view(torch.uint8)), 1)
