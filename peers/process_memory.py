"""How a peer's process shares its machine: gives back freed heap and pages of libraries, waits without spinning, and
keeps its weights in large pages.

Linux with glibc; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any, Final

_MADV_DONTNEED: Final = 4
_MADV_COLLAPSE: Final = 25
"""Linux 6.1; older ones refuse it."""
_LARGE_PAGE: Final = 2 * 2**20
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 2**20
_SCRATCH_BYTES: Final = 16 * 2**20
_KERNELS: Final = 64
_MAPPING: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ \d+\s*(.*)$")


def limit_growth() -> None:
    """For a process that lives long; call it before there are threads, and before torch is imported.

    Threads share one heap, instead of one each with its own freed memory: the compute thread does nearly all
    allocations anyway, so that there is nobody to wait for. Large blocks are mapped, so that freeing one, a matrix
    before it is packed or a KV cache, always gives it back. And oneDNN, which compiles a kernel of half a megabyte
    for every shape of a matrix and every number of rows, keeps 64 of them and not a thousand: compiling one again
    takes a millisecond.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, str(_KERNELS))
    _mallopt(_M_ARENA_MAX, 1)
    map_large_blocks()


def map_large_blocks() -> None:
    """For loading: what is freed of it goes back at once. Until :func:`keep_scratch`."""
    _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def wait_asleep() -> None:
    """For a machine with other work on it; call it before torch is imported.

    Threads of one matrix product wait for each other asleep. By default they spin, and when several peers on one
    machine compute with all cores at once, most of what the cores do is spinning: measured, 50 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def return_freed_heap() -> None:
    """Tells glibc to give pages back that were freed. Matrices before they are packed leave holes in its heap, of
    a third of a shard's size, that nothing would ever fill again. Takes about a millisecond."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_scratch() -> None:
    """From now on blocks of some megabytes come from the heap, and what is freed of it stays: call it when all is
    loaded. A pass over a prompt's chunk needs a few of them for each matrix, and a block that is mapped anew costs a
    page fault for every 4 KB: measured, a third of the pass with quantised weights."""
    _mallopt(_M_MMAP_THRESHOLD, _SCRATCH_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, 4 * _SCRATCH_BYTES)


def return_library_pages() -> None:
    """Unmaps code and constants of shared libraries; pages that are used again come back from the page cache.

    Loading torch registers thousands of operators, and with each touches code that a peer never runs again: some
    50 MB, which stay resident otherwise. Only read-only mappings without a single changed page are touched, so that
    nothing is lost.
    """
    madvise = getattr(_libc(), "madvise", None)
    if madvise is None:
        return
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return
    span: tuple[int, int] | None = None
    for line in lines:
        mapping = _MAPPING.match(line)
        if mapping is not None:
            constant = mapping[3] in ("r-xp", "r--p") and ".so" in mapping[4]
            span = (int(mapping[1], 16), int(mapping[2], 16)) if constant else None
        elif span is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                start, end = span
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
            span = None


def use_large_pages() -> None:
    """Has the system put what is resident now into pages of 2 MB, wherever one fits; call it when all is loaded.

    A decode step reads all weights once. In pages of 4 KB that takes tens of thousands of translations of addresses:
    measured, 3% of its time. Nothing changes for memory that is asked for later.
    """
    madvise = getattr(_libc(), "madvise", None)
    if madvise is None:
        return
    try:
        mappings = [_MAPPING.match(line) for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return
    for mapping in mappings:
        if mapping is None or mapping[3] != "rw-p" or mapping[4] not in ("", "[heap]"):
            continue
        first, end = -(-int(mapping[1], 16) // _LARGE_PAGE), int(mapping[2], 16) // _LARGE_PAGE
        for page in range(first, end):  # each by itself: the first that can't be had would end a longer call
            madvise(ctypes.c_void_p(page * _LARGE_PAGE), ctypes.c_size_t(_LARGE_PAGE), _MADV_COLLAPSE)


def _mallopt(parameter: int, value: int) -> None:
    call = getattr(_libc(), "mallopt", None)
    if call is not None:
        call(parameter, value)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
