"""The standard streams of a command, which may be closed, full, or read by nobody."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SharedLine:
    """The last line of a terminal, to which text on stdout and reports on stderr are both written.

    A report that comes in the middle of a text begins on a line of its own; the text goes on after it.
    """

    def __init__(self) -> None:
        self._open = False
        """There is text in it."""
        self._broken = False
        """It was left for a report, and no text has come since."""

    def write(self, text: str) -> None:
        print(text, end="", flush=True)
        if text:
            self._open = not text.endswith("\n") and sys.stdout.isatty() and sys.stderr.isatty()
            self._broken = False

    def end(self, *, echoed: bool = False) -> None:
        """After the last of a text. ``echoed``: the terminal has shown what was typed there, such as ^C."""
        if echoed or not self._broken:
            print(flush=True)
        self._open = self._broken = False

    def leave(self) -> None:
        """Before a report."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open, self._broken = False, True


shared_line = SharedLine()


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
