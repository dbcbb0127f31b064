"""Tensors of a GGUF file: memory mapped, dequantised a few rows at a time, under their Hugging Face names."""

from __future__ import annotations

import mmap
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from peers.weights.blocks import BLOCK, BlockKind, Blocks
from peers.weights.compact import CompactRows
from swarm.architectures import Architecture
from swarm.errors import ModelError, UnsupportedModel
from swarm.gguf_file import GgufTensor, read_outline

CHUNK_BYTES = 1024 * 1024
"""Float32 bytes that are dequantised at once; the intermediate values are several times that."""

_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_READ_ELSEWHERE = {"rope_freqs.weight"}
"""Of a model's tensors, those that its config tells of, see :mod:`swarm.gguf_model`."""
_BLOCK_KINDS = {
    GGMLQuantizationType.Q4_0: BlockKind.Q4_0,
    GGMLQuantizationType.Q4_1: BlockKind.Q4_1,
    GGMLQuantizationType.Q8_0: BlockKind.Q8_0,
    GGMLQuantizationType.BF16: BlockKind.BFLOAT16,
}
_Q8_BYTES = 34
"""A block of Q8_0: the scale in float16, then 32 codes of one byte."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
# llama.cpp's converter interleaves the halves of each rotary head for these, so that its kernels find pairs adjacent
_PERMUTED_FAMILIES = ("llama", "mistral")


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    match = _LAYER.match(name)
    return f"blk.{match[1]}.{_PARTS[match[2]]}.{match[3]}" if match else _WHOLE[name]


class GgufSource:
    """See :class:`peers.weights.TensorSource`."""

    def __init__(self, path: Path, architecture: Architecture, wanted: dict[str, tuple[int, ...]]) -> None:
        header = read_outline(path)
        self._path = path
        self._architecture = architecture
        self._tensors: dict[str, GgufTensor] = {}
        size = path.stat().st_size
        for name, shape in wanted.items():
            tensor = header.tensors.get(gguf_name(name))
            if tensor is None:
                raise ModelError(f"{path} lacks the tensor {gguf_name(name)}")
            if tensor.shape != shape:
                raise ModelError(
                    f"{path}: {tensor.name} has the shape {tensor.shape}, not {shape} as its metadata says"
                )
            if tensor.offset + shape_bytes(path, tensor) > size:
                raise ModelError(f"{path} is cut off: {tensor.name} reaches past the end of the file")
            self._tensors[name] = tensor
        known = set(map(gguf_name, architecture.shapes(0, architecture.num_layers))) | _READ_ELSEWHERE
        if unknown := sorted(header.tensors.keys() - known):
            raise UnsupportedModel(f"{path} has the tensor {unknown[0]}, which no {architecture.family} has here")
        self._file = os.open(path, os.O_RDONLY)
        self._close_file = weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        tensor = self._find(name)
        result = torch.empty(tensor.shape, dtype=dtype, device=device)
        packed = self._packed(tensor)
        flat = result.view(packed.shape[0], -1)
        order = self._order(name, tensor)
        step = max(1, CHUNK_BYTES // (4 * flat.shape[1]))
        for start in range(0, packed.shape[0], step):
            raw = packed[start : start + step] if order is None else packed[order[start : start + step]]
            flat[start : start + step].copy_(self._floats(tensor, raw))
        self._forget(tensor)
        return result

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """By ``pread`` and not through the map, whose pages would count as memory of this process."""
        tensor = self._find(name)
        if not self._close_file.alive:
            raise ModelError(f"{self._path} is closed")
        count = tensor.shape[0]
        size = shape_bytes(self._path, tensor) // count
        if indices and not 0 <= min(indices) <= max(indices) < count:
            raise ModelError(f"{name} has the rows 0 to {count - 1}; {max(indices)} is asked for")
        raw = b"".join([os.pread(self._file, size, tensor.offset + index * size) for index in indices])
        if len(raw) != size * len(indices):
            raise ModelError(f"{self._path} was cut off while it was in use")
        return self._floats(tensor, np.frombuffer(raw, dtype=np.uint8).reshape(len(indices), size)).to(dtype)

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        tensor = self._find(name)
        kind = GGMLQuantizationType(tensor.ggml_type)
        packed = self._packed(tensor)
        order = self._order(name, tensor)
        raw = packed[start:stop] if order is None else packed[order[start:stop]]
        if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.BF16):
            return CompactRows(self._floats(tensor, raw))
        if kind is not GGMLQuantizationType.Q8_0:
            return None
        blocks = raw.reshape(len(raw), -1, _Q8_BYTES)
        scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)[:, :, 0]
        codes = blocks[:, :, 2:].reshape(len(raw), -1).view(np.int8)
        if stop == tensor.shape[0]:
            self._forget(tensor)
        return CompactRows(torch.from_numpy(codes), torch.from_numpy(scales))

    def blocks(self, name: str) -> Blocks | None:
        tensor = self._find(name)
        kind = _BLOCK_KINDS.get(GGMLQuantizationType(tensor.ggml_type))
        if kind is None or tensor.shape[-1] % BLOCK:
            return None
        packed, order = self._packed(tensor), self._order(name, tensor)
        blocks = Blocks(kind, torch.from_numpy(packed.copy() if order is None else packed[order]))
        self._forget(tensor)
        return blocks

    def close(self) -> None:
        self._map.close()
        self._close_file()

    def _find(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise ModelError(f"{name} is not among the tensors of this range of {self._path}")
        return self._tensors[name]

    def _packed(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """``[rows, bytes of a row]``; a vector has rows of one number. A view: nothing is read yet."""
        count = shape_bytes(self._path, tensor)
        flat = np.frombuffer(self._map, dtype=np.uint8, count=count, offset=tensor.offset)
        return flat.reshape(tensor.shape[0], -1)

    def _floats(self, tensor: GgufTensor, raw: npt.NDArray[np.uint8]) -> torch.Tensor:
        kind = GGMLQuantizationType(tensor.ggml_type)
        if kind is GGMLQuantizationType.F32:
            return torch.from_numpy(raw.copy()).view(torch.float32)
        if kind is GGMLQuantizationType.F16:
            return torch.from_numpy(raw.copy()).view(torch.float16)
        if kind is GGMLQuantizationType.BF16:
            return torch.from_numpy(raw.copy()).view(torch.bfloat16)
        try:
            return torch.from_numpy(dequantize(raw, kind))
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"{self._path}: {tensor.name} is quantised as {kind.name}, which can't be read"
            ) from error

    def _order(self, name: str, tensor: GgufTensor) -> npt.NDArray[np.int64] | None:
        """For each row of the Hugging Face tensor, the row of the file that holds it; ``None``: the same."""
        if self._architecture.family not in _PERMUTED_FAMILIES:
            return None
        if ".q_proj." in name:
            heads = self._architecture.num_heads
        elif ".k_proj." in name:
            heads = self._architecture.num_kv_heads
        else:
            return None
        rows = np.arange(tensor.shape[0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _forget(self, tensor: GgufTensor) -> None:
        """Give back the pages that were read: they'd count as this process's memory although a copy exists."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.offset + shape_bytes(self._path, tensor)
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def shape_bytes(path: Path, tensor: GgufTensor) -> int:
    """Bytes of a tensor in the file; raises :class:`UnsupportedModel` for a type that the gguf package doesn't know."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{path}: {tensor.name} is of the unknown ggml type {tensor.ggml_type}") from error
    if tensor.shape[-1] % block or (block > 1 and len(tensor.shape) == 1):
        raise ModelError(f"{path}: rows of {tensor.name} are no whole number of blocks of {block}")
    return tensor.elements // block * size
