"""Small facts that are dear to learn, kept between runs: hashes of large files, descriptions from the Hub.

A cache only: losing it costs time, so failing to read or to write it is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from swarm.atomic_file import write_atomically
from swarm.errors import ModelError

_READ_BYTES = 4 * 1024 * 1024


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/swarm``, by default ``~/.cache/swarm``. Raises :class:`OSError` for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path("~/.cache").expanduser()) / "swarm"
    except RuntimeError:
        raise FileNotFoundError("this user has no home folder, and XDG_CACHE_HOME is not set") from None


def load_cached(key: str) -> str | None:
    try:
        return _place(key).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def store_cached(key: str, value: str) -> None:
    with contextlib.suppress(OSError):
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, value.encode())  # several peers of one machine write at once


def file_sha256(path: Path) -> str:
    """Of the whole file; remembered under path, modification time and size. Raises :class:`ModelError`."""
    try:
        facts = path.stat()
        key = f"sha256 {path.resolve()} {facts.st_mtime_ns} {facts.st_size}"
        known = load_cached(key)
        if known is not None and len(known) == 64:
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}") from error
    store_cached(key, digest.hexdigest())
    return digest.hexdigest()


def _place(key: str) -> Path:
    return cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
