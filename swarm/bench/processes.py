"""Peak memory and processor time of processes, as the system counts them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil

from swarm.children import PYTHON
from swarm.errors import SwarmError

_IMPORTS = """
from peers.commands import import_server
import_server()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
IMPORT_S = 120.0


def peak_mb(pid: int) -> float:
    """VmHWM, the most that ever was resident, in MiB. Raises :class:`SwarmError` where there is no such thing."""
    try:
        return _parse(Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        raise SwarmError(f"peak memory can't be read here: {error}") from None


def peak_of_imports_mb() -> float:
    """What a peer takes before it has a single weight: Python, torch, transformers and the network library."""
    done = subprocess.run([*PYTHON, "-c", _IMPORTS], capture_output=True, text=True, check=True, timeout=IMPORT_S)
    return _parse(done.stdout)


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
