"""Starts peers as forks of one process that has imported what they need, ``peers/nursery.py``.

Each ``swarm-peer serve`` reads torch, transformers and hivemind for seconds before it does anything. Several on one
machine start sooner as forks, and share what was read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Final

import psutil

from swarm.children import PYTHON, REAP_S, Guard
from swarm.errors import DeadlineExceeded

MESSAGE_BYTES: Final = 2**17
"""Of a peer's arguments and environment at most."""
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
    """``with Nursery(env) as nursery``. Its peers don't end with it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        """``env``: for libraries that look at it when they are imported; each peer has one of its own."""
        self._env = dict(env)
        self._guard = Guard()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._asking = threading.Lock()
        self._heard = threading.Condition()
        self._started: int | None = None
        """The pid of the peer that was asked for last."""
        self._codes: dict[int, int] = {}
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

    def start(self) -> None:
        """Returns at once."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._guard.start()
        with theirs:
            self._process = subprocess.Popen(
                [*PYTHON, "-m", "peers.nursery"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a peer that is started by itself says what is wrong
                env=self._env,
                start_new_session=True,
            )
        self._guard.add(self._process.pid)
        threading.Thread(target=self._listen, args=[self._socket], name="nursery", daemon=True).start()

    def close(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has gone by itself
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            try:
                self._process.wait(REAP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(REAP_S)
        self._guard.close()

    def fork(self, args: Sequence[str], env: Mapping[str, str], stderr: IO[bytes]) -> Forked | None:
        """``swarm-peer ARGS`` in a session of its own, which runs once a line is written to its stdin.

        None if the nursery has gone, and :class:`DeadlineExceeded` if it does not answer.
        """
        message = json.dumps({"args": list(args), "env": dict(env)}).encode()
        (stdin, to_stdin), (from_stdout, stdout) = os.pipe(), os.pipe()
        try:
            with self._asking:
                pid = self._ask(message, [stdin, stdout, stderr.fileno()])
        except BaseException:
            os.close(to_stdin)
            os.close(from_stdout)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        opened = os.fdopen(to_stdin, "wb", buffering=0), os.fdopen(from_stdout, "rb")
        if pid is None:
            for stream in opened:
                stream.close()
            return None
        return Forked(self, pid, *opened)

    def code_of(self, pid: int, timeout_s: float | None) -> int | None:
        """With which a peer of this nursery ended; None if it hasn't after so long."""
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with self._heard:
            while pid not in self._codes and (left_s := deadline - time.monotonic()) > 0:
                self._heard.wait(min(left_s, POLL_S))
                if self._gone and not psutil.pid_exists(pid):
                    self._codes[pid] = -signal.SIGKILL  # nobody knows
            return self._codes.get(pid)

    def _ask(self, message: bytes, streams: Sequence[int]) -> int | None:
        self._started = None
        if self._socket is None or self._gone:
            return None
        try:
            socket.send_fds(self._socket, [message], streams)
        except OSError:
            return None
        with self._heard:
            if not self._heard.wait_for(lambda: self._started is not None or self._gone, FORK_S):
                self._socket.shutdown(socket.SHUT_RDWR)  # what comes late would be taken for the next one
                raise DeadlineExceeded(f"no peer was forked within {FORK_S:g} s")
        return self._started

    def _listen(self, channel: socket.socket) -> None:
        with channel:
            while message := self._received(channel):
                told = json.loads(message)
                with self._heard:
                    if "pid" in told:
                        self._started = told["pid"]
                    else:
                        self._codes[told["ended"]] = told["code"]
                    self._heard.notify_all()
        with self._heard:
            self._gone = True
            self._heard.notify_all()

    @staticmethod
    def _received(channel: socket.socket) -> bytes:
        try:
            return channel.recv(MESSAGE_BYTES)
        except OSError:
            return b""
