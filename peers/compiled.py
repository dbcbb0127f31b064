"""C files compiled on this machine, for this machine, by its own compiler; kept in the cache folder."""

from __future__ import annotations

import contextlib
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
        with _compiled(source) as place:
            kernels = library(place)
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
    return _compiler() is not None and not all(map(_kept, HERE.glob("*.c")))


def _kept(source: Path) -> Path | None:
    """A C file's shared library, if the cache has it."""
    try:
        place = _place(source)
        return place if place.is_file() else None
    except OSError:  # a cache that this user must not read
        return None


def _place(source: Path) -> Path:
    """Of a C file's shared library in the cache. Raises :class:`OSError` where there can't be one."""
    read = [file.read_bytes() for file in (source, *sorted(HERE.glob("*.h")))]
    facts = [*read, " ".join(FLAGS).encode(), platform.machine().encode(), *cpu_features()]
    return cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(facts)).hexdigest()[:32]}.so"


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), *COMPILERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextlib.contextmanager
def _compiled(source: Path) -> Iterator[Path]:
    """A C file's shared library, from the cache or made now. Where it can't be kept it is gone after the block, which
    does not matter to who has loaded it. Raises :class:`OSError` or :class:`SubprocessError`."""
    if (kept := _kept(source)) is not None:
        yield kept
        return
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang)")
    with contextlib.ExitStack() as stack:
        place: Path | None
        try:
            place = _place(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_in_turn(place.parent))
            # in a folder of its own, then an atomic rename: not all have waited for their turn
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=place.parent))
        except OSError as error:
            logger.warning("%s is compiled again at each start, since it can't be kept: %s", source.name, error)
            place, folder = None, stack.enter_context(tempfile.TemporaryDirectory(prefix="swarm-kernels-"))
        made = Path(folder) / "kernels.so"
        if place is not None and place.is_file():
            made = place
        else:
            command = [compiler, *FLAGS, f"-I{HERE}", str(source), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_S)
            made = made.replace(place) if place else made
        yield made


@contextlib.contextmanager
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
