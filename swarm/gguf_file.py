"""The header of a GGUF file: metadata and tensor table, read from a memory map without touching the weights.

The layout is that of the GGUF specification (ggml project), versions 2 and 3, little endian. A count or length in
the file is believed only as far as the file itself reaches, so a damaged header costs neither memory nor time.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from swarm.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
# struct letters of the fixed-size value types; on every platform that runs torch these are array's too
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LENGTH = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_VOCABULARY = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. ``shape`` is in torch order, ``offset`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_header(path: Path) -> GgufHeader:
    """Raises :class:`ModelError` if the file is no GGUF file, is cut off, or contradicts itself."""
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"{path} is no GGUF file: it does not start with the letters GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).header()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error


def read_outline(path: Path) -> GgufHeader:
    """Without the vocabulary, which takes a tenth of a second and more to read; kept while the file stays as it is.

    Raises as :func:`read_header`.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    return _outline(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=4)
def _outline(path: Path, *stamp: int) -> GgufHeader:
    header = read_header(path)
    return replace(header, metadata={key: value for key, value in header.metadata.items() if key not in _VOCABULARY})


class _Reader:
    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._at = 4

    def header(self) -> GgufHeader:
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise ModelError(f"{self._path} is GGUF version {version}; versions 2 and 3, little endian, can be read")
        tensor_count, value_count = self._unpack("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
        if not isinstance(metadata.get("general.architecture"), str):
            raise ModelError(f"{self._path} does not name its architecture (general.architecture)")
        table = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ModelError(f"{self._path} has the alignment {alignment!r}, which is no positive number")
        start = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(name, shape, kind, start + offset) for name, shape, kind, offset in table}
        if len(tensors) != len(table):
            raise ModelError(f"{self._path} holds two tensors of the same name")
        return GgufHeader(self._path, metadata, tensors)

    def _take(self, size: int) -> int:
        at = self._at
        if size > self._size - at:
            raise self._cut_off()
        self._at = at + size
        return at

    def _not_text(self) -> ModelError:
        return ModelError(f"{self._path} is corrupt: a string of its header is not UTF-8")

    def _cut_off(self) -> ModelError:
        return ModelError(f"{self._path} is cut off or corrupt: its header reaches past the end of the file")

    def _unpack(self, letters: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + letters)
        return layout.unpack_from(self._view, self._take(layout.size))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        at = self._take(length)
        try:
            return self._view[at : at + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._not_text() from error

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has 50,000 and more, so this is a tight loop."""
        view, size, at, unpack = self._view, self._size, self._at, _LENGTH.unpack_from
        found: list[bytes] = []
        while len(found) < count:
            start = at + _LENGTH.size
            at = start + unpack(view, at)[0] if start <= size else size + 1
            if at > size:
                raise self._cut_off()
            found.append(view[start:at])
        self._at = at
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError as error:
            raise self._not_text() from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._unpack(self._letter(kind))[0]

    def _array(self) -> list[Any]:
        kind, count = self._unpack("IQ")
        if kind == _STRING:
            return self._strings(count)
        letter = self._letter(kind)
        size = struct.calcsize("<" + letter) * count
        at = self._take(size)
        raw = self._view[at : at + size]
        if kind == _BOOL:
            return [byte != 0 for byte in raw]
        return array(letter, raw).tolist()

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ModelError(f"{self._path} is corrupt: its header has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ModelError(f"{self._path} is corrupt: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(reversed(self._unpack("Q" * dimensions)))  # ggml counts the fastest-moving dimension first
        kind, offset = self._unpack("IQ")
        return name, shape, kind, offset
