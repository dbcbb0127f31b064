"""What control groups leave this process of the machine's memory: a container's ``--memory``, systemd's ``MemoryMax``.

The kernel ends a process that takes more, however much the machine has. Linux, both versions of the interface.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
NO_LIMIT = 2**60
"""Version 1 says a number beyond this where there is none."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version calls them."""

    limit: str
    used: str
    idle: str
    """In ``memory.stat``: cached parts of files that the kernel drops before it ends anybody."""


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True, slots=True)
class Allowance:
    """Of the tightest limit."""

    limit_bytes: int
    left_bytes: int


def allowance(mounts: Path = MOUNTS, membership: Path = MEMBERSHIP) -> Allowance | None:
    """None where nothing limits this process but the machine."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    found: list[Allowance] = []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            found += _limits(mounts, path, _VERSION_2)
        elif "memory" in controllers.split(","):
            found += _limits(mounts / "memory", path, _VERSION_1)
    return min(found, key=lambda one: one.left_bytes, default=None)


def _limits(mount: Path, path: str, files: _Files) -> list[Allowance]:
    """Of the group and all above it. In a container the path may be the host's, and the mount the group itself."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    found = []
    for count in range(len(parts), -1, -1):
        with contextlib.suppress(OSError, ValueError):  # no such folder, or no limit in words
            folder = mount.joinpath(*parts[:count])
            limit = int((folder / files.limit).read_text(encoding="utf-8"))
            if limit < NO_LIMIT:
                used = int((folder / files.used).read_text(encoding="utf-8"))
                found.append(Allowance(limit, max(0, limit - used + _idle_bytes(folder, files))))
    return found


def _idle_bytes(folder: Path, files: _Files) -> int:
    for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(" ")
        if name == files.idle:
            return int(value)
    return 0
