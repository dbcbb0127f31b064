"""Peers as forks of a process that has imported what they need: ``python -m peers.nursery``, see ``swarm/nursery.py``.

Its standard input is a socket, with a message for each peer: arguments and environment, and as file descriptors its
standard streams, of which stdin holds it back until something comes. It answers with ``{"pid": ...}`` and, when a peer
has ended, with ``{"ended": pid, "code": ...}``. When the other end has gone it goes, too; its peers don't.
"""

from __future__ import annotations

import gc
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from peers.cli import main as swarm_peer
from peers.commands import import_server
from swarm.nursery import MESSAGE_BYTES, STREAMS


class _Nursery:
    def __init__(self) -> None:
        self._owner = socket.socket(fileno=os.dup(0))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._owner, selectors.EVENT_READ)

    def run(self) -> tuple[dict[str, Any], Sequence[int]]:
        """Returns in each fork: what its peer is to be, and its streams. The nursery itself exits here."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._owner:
                    self._collect(key.fd, key.data)
                    continue
                message, streams, _, _ = socket.recv_fds(self._owner, MESSAGE_BYTES, STREAMS)
                if not message:
                    sys.exit()
                pid = os.fork()
                if pid == 0:
                    self._leave()
                    return json.loads(message), streams
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, data=pid)
                for stream in streams:
                    os.close(stream)
                self._tell({"pid": pid})

    def _collect(self, descriptor: int, pid: int) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        self._tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, int]) -> None:
        try:
            self._owner.send(json.dumps(message).encode())
        except OSError:  # the other end has gone
            sys.exit()

    def _leave(self) -> None:
        """What a fork has of its nursery."""
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._owner:
                os.close(key.fd)
        self._selector.close()
        self._owner.close()


def _become(peer: dict[str, Any], streams: Sequence[int]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(peer["env"])
    sys.argv = ["swarm-peer", *peer["args"]]
    if not os.read(0, 1):  # its owner has gone before the guard of its children knew of this one
        sys.exit(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nursery = _Nursery()
    import_server()
    gc.collect()
    gc.freeze()  # a collection would write to pages that all share
    _become(*nursery.run())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    swarm_peer()


if __name__ == "__main__":
    main()
