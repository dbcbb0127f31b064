"""A folder with a model: its JSON files, and which safetensors file holds which tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.errors import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """``by_tensor`` is what the index says; without an index the one file ``files[0]`` holds everything."""

    source: str
    files: tuple[str, ...]
    by_tensor: dict[str, str] | None = None

    def holder(self, tensor: str) -> str:
        if self.by_tensor is None:
            return self.files[0]
        if tensor not in self.by_tensor:
            raise ModelError(f"{self.source}: no file holds the tensor {tensor} ({INDEX} does not name it)")
        return self.by_tensor[tensor]


def read_json(path: Path) -> dict[str, Any]:
    """Raises :class:`ModelError` if the file is missing or is no JSON object."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    return json_object(data, str(path))


def json_object(data: bytes, source: str) -> dict[str, Any]:
    """Raises :class:`ModelError` that names ``source``."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter: nested very deeply
        raise ModelError(f"{source} is no valid JSON") from error
    if not isinstance(value, dict):
        raise ModelError(f"{source} holds no JSON object")
    return value


def optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def weight_files(folder: Path) -> WeightFiles:
    """The index if there is one, else the only safetensors file. Files that an index names need not be there."""
    if (folder / INDEX).is_file():
        return indexed_files(read_json(folder / INDEX), str(folder))
    if (folder / SINGLE).is_file():
        return WeightFiles(str(folder), (SINGLE,))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return WeightFiles(str(folder), (found[0],))
    if found:
        raise ModelError(f"{folder} has {len(found)} safetensors files but no {INDEX} that says what is where")
    raise ModelError(f"{folder} has no safetensors file; other kinds of weight files are not read")


def indexed_files(index: dict[str, Any], source: str) -> WeightFiles:
    by_tensor = index.get("weight_map")
    if not isinstance(by_tensor, dict) or not by_tensor:
        raise ModelError(f"{source}: {INDEX} has no weight_map")
    for name in set(by_tensor.values()):
        # the index comes from elsewhere: it must not lead out of the folder
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{source}: {INDEX} names {name!r}, which is no file of the folder")
    return WeightFiles(source, tuple(sorted(set(by_tensor.values()))), by_tensor)
