"""Child processes that never outlive their owner, not even one that is killed with SIGKILL.

A guard process holds the reading end of a pipe whose writing end only the owner has. When the owner is gone, however
it went, the guard reads EOF and kills every process group that it was told of. (``PR_SET_PDEATHSIG`` would be
simpler, but it fires when the *thread* that started the child ends, and does not reach grandchildren.)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from swarm.errors import Internal, SwarmError, from_code

PYTHON = (sys.executable, "-P")
"""For our own modules: -P keeps the current folder off the path, where a clone, called swarm as well, may lie."""

TAIL_LINES = 12
TAIL_BYTES = 8192
MAX_EVENTS = 512
"""Kept of what a child says, the newest."""
REAP_S = 5.0
"""A killed group is gone at once, save for a process in an uninterruptible wait."""

_GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    group = int(line)
    groups.add(group) if group > 0 else groups.discard(-group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

# Waits for a line, so that nothing runs before the guard knows of it: if the owner dies in between, read fails.
_GATE = 'read -r _ && exec "$@" </dev/null'


def inherited_environment() -> dict[str, str]:
    """This process's, without the settings of ``SWARM_...``: a child is told its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}


class Guard:
    """``with Guard() as guard``; children are spawned with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guard:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the owner
        )

    def close(self) -> None:
        """Kills whatever has not been released."""
        if self._process is not None:
            try:
                self._process.communicate(timeout=REAP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._process = None

    def add(self, group: int) -> None:
        self._tell(group)

    def release(self, group: int) -> None:
        with contextlib.suppress(Internal):  # without the guard nobody kills the group, which is what was wanted
            self._tell(-group)

    def _tell(self, number: int) -> None:
        if self._process is None or self._process.stdin is None:
            raise Internal("the guard of the child processes is not running")
        try:
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()
        except OSError as error:
            raise Internal(f"the guard of the child processes is gone: {error}") from None


class Process(Protocol):
    """What :class:`subprocess.Popen` has of a child."""

    @property
    def pid(self) -> int: ...
    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Child:
    """One process, leader of a process group of its own, that prints one JSON object a line."""

    def __init__(self, name: str, process: Process, guard: Guard, log: Path) -> None:
        """Use :meth:`spawn`."""
        self.name = name
        self.log = log
        """What it writes to stderr."""
        self._process = process
        self._guard = guard
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._newest: dict[str, dict[str, Any]] = {}
        """Of each name the last event, in the order in which they came."""
        self._changed = threading.Condition()
        self._ended = False
        self._buried = False
        self._frozen: set[int] = set()
        """Processes below it that are stopped, which the guard knows of meanwhile."""
        self._reader = threading.Thread(target=self._read, name=f"stdout of {name}", daemon=True)

    @classmethod
    def spawn(
        cls,
        name: str,
        command: Sequence[str],
        guard: Guard,
        log: Path,
        env: Mapping[str, str],
        fork: Callable[[IO[bytes]], Process | None] | None = None,
    ) -> Child:
        """``fork``: gives the process instead, from where its stderr goes; it waits for a line as well."""
        with log.open("wb") as stderr:
            forked = fork(stderr) if fork is not None else None
            process = forked or subprocess.Popen(
                ["/bin/sh", "-c", _GATE, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(env),
                start_new_session=True,
            )
        child = cls(name, process, guard, log)
        assert process.stdin is not None
        try:
            guard.add(process.pid)
            process.stdin.write(b"go\n")
        finally:
            process.stdin.close()
            child._reader.start()
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def event(self, name: str, timeout_s: float) -> dict[str, Any] | None:
        """The first event of this name, as soon as it is printed; None after ``timeout_s``.

        Raises the error that the process reported, or :class:`SwarmError` with the end of its log, when it ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._find(name) is not None, timeout_s)
            found, ended = self._find(name), self._ended
        if found is None and ended:
            raise self._failure()
        return found

    def newest(self, *names: str) -> dict[str, Any]:
        """The last event that has one of these names, however much was printed since; empty if there was none."""
        with self._changed:
            return next((self._newest[name] for name in reversed(self._newest) if name in names), {})

    def signal(self, number: int, *, alone: bool = False) -> None:
        """To the process and all below it (a peer's daemon has a group of its own), or to it ``alone``.

        None of it if it has ended.
        """
        if not self.alive:
            return
        below = [] if alone else self._below()
        with contextlib.suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(self.pid, number)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def freeze(self) -> None:
        """SIGSTOP to the process and all below it."""
        for pid in self._below():  # a stopped daemon can't notice that its process is gone
            self._guard.add(pid)
            self._frozen.add(pid)
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)
        self._release_frozen()

    def _release_frozen(self) -> None:
        while self._frozen:
            self._guard.release(self._frozen.pop())

    def _below(self) -> list[int]:
        try:
            return [process.pid for process in psutil.Process(self.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self, timeout_s: float) -> int | None:
        """Exit code, or None if it is still there after ``timeout_s``."""
        try:
            return self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            return None

    def bury(self) -> None:
        """Kills what is left of it and gives back pipe, thread and process entry. May be called again."""
        if self._buried:
            return
        self.signal(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(REAP_S)
        self._reader.join(REAP_S)
        self._guard.release(self.pid)
        self._release_frozen()
        self._buried = True

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = stream.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])

    def _find(self, name: str) -> dict[str, Any] | None:
        return next((event for event in self._events if event.get("event") == name), None)

    def _failure(self) -> SwarmError:
        code = self.wait(REAP_S)
        said = self._find("error")
        if said is not None:
            return from_code(str(said.get("code", "error")), f"{self.name}: {said.get('message', '')}")
        log = self.tail()
        return SwarmError(f"{self.name} ended with exit code {code}" + (f":\n{log}" if log else " and no message"))

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # a library that prints
                if isinstance(event, dict):
                    name = str(event.get("event"))
                    with self._changed:
                        self._events.append(event)
                        self._newest.pop(name, None)
                        self._newest[name] = event
                        self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
