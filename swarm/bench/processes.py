"""Peak memory and processor time of processes, as the system counts them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

from swarm.errors import SwarmError
from swarm.nursery import Nursery


def peak_mb(pid: int) -> float:
    """VmHWM, the most that ever was resident, in MiB. Raises :class:`SwarmError` where there is no such thing."""
    try:
        return _parse(Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        raise SwarmError(f"peak memory can't be read here: {error}") from None


def peak_of_imports_mb() -> float:
    """What a peer takes before it has a single weight: Python, torch, transformers and the network library."""
    with Nursery(os.environ) as nursery:
        if not nursery.ready():
            raise SwarmError("no peer can be forked here")
        return peak_mb(nursery.pid)


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time of these processes and of their children that live."""
    total = 0.0
    for pid in pids:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children()):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _parse(status: str) -> float:
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise SwarmError("peak memory can't be read here: the kernel does not count it")
    return int(match[1]) / 1024
