"""C files compiled on this machine, for this machine, by its own compiler; kept in the cache folder."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

import torch
from filelock import FileLock, Timeout

from swarm.cache import cache_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

COMPILERS: Final = ("cc", "gcc", "clang")
FLAGS: Final = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
COMPILE_S: Final = 180.0
"""A slow machine with much else to do takes a minute."""
TURN_S: Final = 2 * COMPILE_S
"""So long is another process waited for that compiles."""
HERE: Final = Path(__file__).parent
"""Where headers are."""


def load_kernels(source: Path, library: Callable[[Path], T], works: Callable[[T], bool], without: str) -> T | None:
    """``library`` of the compiled ``source``. None, and a warning that says what is ``without`` it, where there is no
    compiler, or what it made does not work."""
    try:
        kernels = library(_compiled(source))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logger.warning("%s: %s", without, _why(error))
        return None
    if not works(kernels):
        logger.warning("%s: what the compiler made of %s gives wrong results", without, source.name)
        return None
    return kernels


def shared_out(work: Callable[[int, int], None], pieces: int) -> None:
    """``work(first, stop)`` for all ``pieces``, on as many threads as torch uses; a library is called without Python's
    lock."""
    threads = min(torch.get_num_threads(), pieces)
    if threads < 2:
        work(0, pieces)
        return
    bounds = [pieces * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(lambda part: work(*part), itertools.pairwise(bounds)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="swarm-kernel")


def to_compile() -> bool:
    """Whether there is a compiler, and something for it to do that takes its time."""
    return _compiler() is not None and not all(_place(source).is_file() for source in HERE.glob("*.c"))


def _place(source: Path) -> Path:
    """Of a C file's shared library in the cache."""
    read = [file.read_bytes() for file in (source, *sorted(HERE.glob("*.h")))]
    facts = [*read, " ".join(FLAGS).encode(), platform.machine().encode(), *cpu_features()]
    return cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(facts)).hexdigest()[:32]}.so"


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _compiled(source: Path) -> Path:
    """A C file's shared library, from the cache or made now. Raises :class:`OSError` or :class:`SubprocessError`."""
    place = _place(source)
    if place.is_file():
        return place
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang)")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _in_turn(place.parent):
        if not place.is_file():
            _compile(compiler, source, place)
    return place


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Peers that start at the same moment wait for the first one's libraries. Not for ever: a holder may hang, and then
    several compile at once."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=TURN_S)
    except Timeout:
        logger.warning("%s is held for %g s: its holder is not waited for any more", lock.lock_file, TURN_S)
    try:
        yield
    finally:
        lock.release()


def _compile(compiler: str, source: Path, place: Path) -> None:
    """Into a folder of its own, then an atomic rename."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / "kernels.so"
        command = [compiler, *FLAGS, f"-I{HERE}", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
        made.replace(place)


def cpu_features() -> list[bytes]:
    """What the CPU can do, as the kernel calls it: homes are shared between machines, and code for one may not run on
    another."""
    try:
        found = re.search(rb"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_bytes(), re.MULTILINE)
    except OSError:
        return platform.processor().encode().split()
    return found[1].split() if found else []


def _why(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"the compiler failed: {error.stderr.decode(errors='replace')[-500:]}"
    return str(error)
