"""What a process asks of the system's memory, in a process of its own."""

import subprocess
import sys

import pytest

_MAPPED = """
import ctypes, mmap
from pathlib import Path
from peers.process_memory import use_large_pages

memory = mmap.mmap(-1, 32 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = bytes(range(256)) * (len(memory) // 256)

def large_kb():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:"))

whole = -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // 2**21) * 2**21
probe = ctypes.CDLL(None).madvise(ctypes.c_void_p(whole), ctypes.c_size_t(2**21), 25)
before = large_kb()
use_large_pages()
print(probe, large_kb() - before, memory[:] == bytes(range(256)) * (len(memory) // 256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for on Linux only")
def test_what_is_resident_comes_into_large_pages_and_stays_what_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", _MAPPED], capture_output=True, text=True, check=True, timeout=60)
    refused, gained_kb, same = done.stdout.split()
    if refused != "0":
        pytest.skip("this kernel puts nothing into large pages when asked")
    assert same == "True"
    assert int(gained_kb) >= 28 * 1024
