"""The standard streams of a command, which may be closed, full, or read by nobody."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def standard_streams(command: str) -> Iterator[None]:
    """For all that ``command`` does. It ends well if nobody reads on, and a full disk is one line and exit code 1."""
    _open_missing()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # models write characters that not every terminal has
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our stdout has gone (a pipe into head)
        _discard_stdout()
        sys.exit(0)
    except SystemExit as ended:
        if not isinstance(ended.__context__, BrokenPipeError):  # which typer makes an exit code 1
            raise
        _discard_stdout()
        sys.exit(0)
    except OSError as error:
        if error.errno not in FULL:
            raise
        _discard_stdout()
        print(f"{command}: can't write: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _open_missing() -> None:
    """Else the next file or socket gets the number of a standard stream, which libuv takes for a bug."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
