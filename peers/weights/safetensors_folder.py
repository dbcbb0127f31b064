"""Tensors of a folder of safetensors files: only the wanted ones are read, straight into their destination.

The format (https://huggingface.co/docs/safetensors): 8 bytes little endian, length of the header; the header, JSON:
name -> dtype, shape, [start, end) in the data; the data. Read here by ``pread`` and not through a memory map, so
that pages of the file never count as memory of this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from peers.weights.blocks import BLOCK, BlockKind, Blocks
from peers.weights.compact import CompactRows
from swarm.architectures import EMBEDDING, FINAL_NORM, HEAD
from swarm.checkpoint_files import CONFIG, WeightFiles, weight_files
from swarm.errors import ModelError, UnsupportedModel

MAX_HEADER_BYTES = 100_000_000
"""As the reference implementation has it."""
CHUNK_BYTES = 8 * 1024 * 1024
"""Bytes that are converted to another dtype, or sent to another device, at once."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""


class SafetensorsSource:
    """See :class:`peers.weights.TensorSource`. ``folder`` may lack files that hold nothing of the range."""

    def __init__(self, folder: Path, wanted: dict[str, tuple[int, ...]]) -> None:
        self._folder = folder
        files = weight_files(folder)
        self._entries: dict[str, _Entry] = {}
        headers: dict[Path, dict[str, _Entry]] = {}
        for name, shape in wanted.items():
            path = folder / files.holder(name)
            if path not in headers:
                headers[path] = _read_header(path)
            entry = headers[path].get(name)
            if entry is None:
                raise ModelError(f"{path} lacks the tensor {name}")
            if entry.shape != shape:
                raise ModelError(f"{path}: {name} has the shape {entry.shape}, not {shape} as the config says")
            self._entries[name] = entry
        tied = FINAL_NORM in wanted and HEAD not in wanted
        own_head = _found(HEAD, folder, files, headers) if tied else None
        self._open: dict[Path, int] = {path: os.open(path, os.O_RDONLY) for path in headers}
        # one buffer for all conversions: freeing one after each tensor would leave holes between the tensors
        self._chunk = torch.empty(0, dtype=torch.uint8)
        if own_head is not None and not self._same(own_head, self._entries[EMBEDDING]):
            self.close()
            raise UnsupportedModel(
                f"{folder} has a {HEAD} that is not the embedding, to which its config ties the head; "
                f"set tie_word_embeddings to false in its {CONFIG}"
            )

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).shape

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        entry = self._find(name)
        result = torch.empty(entry.shape, dtype=dtype, device=device)
        flat = result.view(-1)
        if entry.dtype == dtype and flat.device.type == "cpu":
            self._fill(entry, 0, flat)
            return result
        step = CHUNK_BYTES // entry.dtype.itemsize
        if not len(self._chunk):
            self._chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        chunk = self._chunk.view(entry.dtype)
        for start in range(0, flat.numel(), step):
            part = chunk[: min(step, flat.numel() - start)]
            self._fill(entry, start, part)
            flat[start : start + part.numel()].copy_(part)
        return result

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        entry = self._find(name)
        count, width = entry.shape[0], prod(entry.shape[1:])
        result = torch.empty((len(indices), width), dtype=entry.dtype)
        for place, index in enumerate(indices):
            if not 0 <= index < count:
                raise ModelError(f"{name} has the rows 0 to {count - 1}; {index} is asked for")
            self._fill(entry, index * width, result[place])
        return result.to(dtype)

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        entry = self._find(name)
        if entry.dtype not in (torch.float16, torch.bfloat16):
            return None
        codes = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self._fill(entry, start * prod(entry.shape[1:]), codes.view(-1))
        return CompactRows(codes)

    def blocks(self, name: str) -> Blocks | None:
        entry = self._find(name)
        if entry.dtype != torch.bfloat16 or entry.shape[-1] % BLOCK:
            return None
        return Blocks(BlockKind.BFLOAT16, self.read(name, torch.bfloat16).view(torch.uint8))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ModelError(f"{name} is not among the tensors of this range of {self._folder}")
        return self._entries[name]

    def _same(self, first: _Entry, second: _Entry) -> bool:
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        count = prod(first.shape)
        step = CHUNK_BYTES // first.dtype.itemsize
        chunks = torch.empty((2, min(step, count)), dtype=first.dtype)
        for start in range(0, count, step):
            parts = chunks[:, : count - start]
            for entry, part in zip((first, second), parts, strict=True):
                self._fill(entry, start, part)
            if not torch.equal(*parts):
                return False
        return True

    def _fill(self, entry: _Entry, start: int, target: torch.Tensor) -> None:
        """Read ``target.numel()`` numbers, beginning with number ``start`` of the tensor."""
        view = target.view(torch.uint8).numpy().data  # preadv writes into the tensor itself
        offset = entry.offset + start * entry.dtype.itemsize
        while view:
            count = os.preadv(self._open[entry.path], [view], offset)
            if count == 0:
                raise ModelError(f"{entry.path} was cut off while it was read")
            view, offset = view[count:], offset + count


def _found(name: str, folder: Path, files: WeightFiles, headers: dict[Path, dict[str, _Entry]]) -> _Entry | None:
    """A tensor that need not be there."""
    if files.by_tensor is not None and name not in files.by_tensor:
        return None
    path = folder / files.holder(name)
    if path not in headers:
        headers[path] = _read_header(path)
    return headers[path].get(name)


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelError(f"{path} is cut off or no safetensors file: its header reaches past its end")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: its header is no JSON") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is corrupt: its header is no JSON object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, facts, 8 + length, size) for name, facts in header.items()}


def _entry(path: Path, name: str, facts: Any, data: int, size: int) -> _Entry:
    try:
        kind, shape, (start, end) = (
            str(facts["dtype"]),
            tuple(map(int, facts["shape"])),
            map(int, facts["data_offsets"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is corrupt: {name} is described wrongly") from error
    if kind not in _DTYPES:
        raise UnsupportedModel(f"{path}: {name} is of the dtype {kind}; {', '.join(_DTYPES)} can be read")
    dtype = _DTYPES[kind]
    if start < 0 or any(length < 0 for length in shape) or end - start != prod(shape) * dtype.itemsize:
        raise ModelError(f"{path} is corrupt: {name} of shape {shape} does not fit its place in the file")
    if data + end > size:
        raise ModelError(f"{path} is cut off: {name} reaches past the end of the file")
    return _Entry(path, dtype, shape, data + start)
