"""Traces on disk: where one was asked for, and this machine's last generation for ``swarm why``."""

from __future__ import annotations

import json
import os
from pathlib import Path

from swarm.cache import load_cached, store_cached
from swarm.chrome_trace import chrome_trace
from swarm.errors import BadRequest
from swarm.trace import Trace

_KEY = "last-generation"


def keep_trace(trace: Trace) -> None:
    store_cached(_KEY, trace.to_json())


def check_place(file: Path) -> None:
    """Before the work whose result is to be there; raises :class:`BadRequest`."""
    if file.is_dir():
        raise BadRequest(f"can't write {file}: it is a folder")
    if not file.parent.is_dir():
        raise BadRequest(f"can't write {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise BadRequest(f"can't write {file}: no permission")


def write_trace(file: Path, trace: Trace) -> None:
    """Raises :class:`BadRequest` if ``file`` can't be written."""
    write_text(file, trace.to_json())


def export_trace(file: Path, trace: Trace) -> None:
    """For Chrome's trace viewer and Perfetto. Raises :class:`BadRequest` if ``file`` can't be written."""
    write_text(file, json.dumps(chrome_trace(trace)))


def write_text(file: Path, text: str) -> None:
    """Raises :class:`BadRequest` if ``file`` can't be written."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"can't write {file}: {error.strerror}") from None


def read_trace(file: Path) -> Trace:
    """Raises :class:`BadRequest` if ``file`` can't be read, or is no trace."""
    try:
        return Trace.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"can't read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"can't read {file}: {error}") from None
    except BadRequest as error:
        raise BadRequest(f"{file}: {error.message}") from None


def last_trace() -> Trace:
    """Raises :class:`BadRequest` if there is none."""
    text = load_cached(_KEY)
    if text is None:
        raise BadRequest("nothing was generated on this machine yet; run swarm generate first")
    return Trace.from_json(text)
