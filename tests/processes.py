"""What tests of real processes ask of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def is_gone(pid: int) -> bool:
    """True for a zombie too: its parent is gone and nobody reaps it in a container without an init."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
