"""Starts peers as forks of one process that has imported what they need, ``peers/nursery.py``.

Each ``swarm-peer serve`` reads torch, transformers and hivemind for seconds before it does anything. Several on one
machine start sooner as forks, and share what was read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Final

import psutil

from swarm.children import PYTHON, REAP_S
from swarm.errors import Internal

MESSAGE_BYTES: Final = 2**17
"""Of a peer's arguments at most."""
REST: Final = b"null"
"""The message after which no peer is asked for."""
STREAMS: Final = 3
"""Its stdin, stdout and stderr."""
POLL_S: Final = 0.2
"""Between two looks at a peer whose nursery has gone."""
FORK_S: Final = 60.0
"""For the first one, before which all is imported, on a machine that is busy."""


class Forked:
    """A peer, as if this process had started it."""

    def __init__(self, nursery: Nursery, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self._nursery = nursery

    def poll(self) -> int | None:
        return self._nursery.code_of(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._nursery.code_of(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired("swarm-peer", timeout or 0)
        return code


class Nursery:
    """``with Nursery(env) as nursery``. Its peers don't end with it, but it does with this process."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """``env``: of its peers, too."""
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._heard = threading.Condition()
        self._codes: dict[int, int] = {}
        self._resting = False
        self._gone = False

    def __enter__(self) -> Nursery:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def possible() -> bool:
        """macOS' own libraries don't survive a fork."""
        return sys.platform == "linux" and hasattr(os, "pidfd_open")

    @property
    def pid(self) -> int:
        if self._process is None:
            raise Internal("the nursery is not running")
        return self._process.pid

    def start(self) -> None:
        """Returns at once."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", "peers.nursery"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a peer that is started by itself says what is wrong
                env=self._env,
                start_new_session=True,  # Ctrl-C in the terminal is for the owner
            )
        threading.Thread(target=self._listen, args=[self._socket], name="nursery", daemon=True).start()

    def ready(self) -> bool:
        """Waits until all is imported and a fork takes a moment; whether there can be one at all."""
        with open(os.devnull, "wb") as nowhere:
            never = self.fork(["--help"], nowhere)
        if never is None:
            return False
        never.stdin.close()
        never.stdout.close()
        return True

    def rest(self) -> None:
        """Forks no more. It gives its memory back, and tells of its peers' ends as before."""
        if self._socket is not None and not self._resting:
            self._resting = True
            with contextlib.suppress(OSError):  # it has gone
                self._socket.send(REST)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # while it imports it hears nothing
            self._process.wait(REAP_S)

    def fork(self, args: Sequence[str], stderr: IO[bytes]) -> Forked | None:
        """``swarm-peer ARGS`` in a session of its own, which runs once a line is written to its stdin.

        None if the nursery rests or has gone, or does not answer within ``FORK_S``.
        """
        if self._socket is None:
            raise Internal("the nursery is not running")
        if self._resting:
            return None
        with contextlib.ExitStack() as unless_forked:
            stdin, to_stdin = _pipe()
            from_stdout, stdout = _pipe()
            unless_forked.push(to_stdin)
            unless_forked.push(from_stdout)
            with stdin, stdout, contextlib.suppress(OSError):  # the nursery has gone, and nobody will write to stdout
                descriptors = [stream.fileno() for stream in (stdin, stdout, stderr)]
                socket.send_fds(self._socket, [json.dumps(list(args)).encode()], descriptors)
            events = select.poll()
            events.register(from_stdout, select.POLLIN)
            line = from_stdout.readline() if events.poll(FORK_S * 1000) else b""
            if not line:
                return None
            unless_forked.pop_all()
            pid = int(line)
            with self._heard:
                self._codes.pop(pid, None)  # of an earlier peer, whose pid the system gives again
            return Forked(self, pid, to_stdin, from_stdout)

    def code_of(self, pid: int, timeout_s: float | None) -> int | None:
        """With which a peer of this nursery ended; None if it hasn't after so long."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._heard:
            while pid not in self._codes:
                left_s = deadline - time.monotonic()
                if self._gone and not _runs(pid):
                    self._codes[pid] = -signal.SIGKILL  # nobody knows
                elif left_s <= 0:
                    return None
                else:
                    self._heard.wait(min(left_s, POLL_S))
            return self._codes[pid]

    def _listen(self, channel: socket.socket) -> None:
        with channel, contextlib.suppress(OSError):
            while message := channel.recv(MESSAGE_BYTES):
                pid, code = json.loads(message)
                with self._heard:
                    self._codes[pid] = code
                    self._heard.notify_all()
        with self._heard:
            self._gone = True
            self._heard.notify_all()


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    reading, writing = os.pipe()
    return open(reading, "rb"), open(writing, "wb", buffering=0)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # as whose new parent not everybody collects it
    except psutil.NoSuchProcess:
        return False
