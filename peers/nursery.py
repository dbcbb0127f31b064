"""Peers as forks of a process that has imported what they need: ``python -m peers.nursery``, see ``swarm/nursery.py``.

Its standard input is a socket, with a message for each peer: arguments, and as file descriptors its standard streams.
The peer writes its pid as a line to its stdout, and waits for one on its stdin. When it has ended, the nursery says
``[pid, exit code]``. After the message ``REST`` that is all it does, in the memory of a bare interpreter. When the
other end of the socket has gone it goes, too; its peers don't.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import socket
import sys
from collections.abc import Sequence
from typing import Final

from peers.cli import main as swarm_peer
from peers.commands import import_server
from swarm.nursery import MESSAGE_BYTES, REST, STREAMS

_RESTING: Final = """
import json, os, socket
owner = socket.socket(fileno=0)
try:
    while True:
        pid, status = os.wait()
        owner.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
except OSError:
    pass  # there is no peer left, or nobody who listens
"""


def main() -> None:
    import_server()
    gc.collect()
    gc.freeze()  # a collection would write to pages that all share
    _become(*_forked())
    swarm_peer()


def _forked() -> tuple[list[str], Sequence[int]]:
    """Returns in each fork: the arguments of its peer, and its streams. The nursery itself exits here."""
    owner = socket.socket(fileno=os.dup(0))
    peers: dict[int, int] = {}  # pids, by descriptors that can be read when that process has ended
    events = select.poll()
    events.register(owner, select.POLLIN)
    while True:
        for descriptor, _ in events.poll():
            if descriptor in peers:
                events.unregister(descriptor)
                os.close(descriptor)
                pid, status = os.waitpid(peers.pop(descriptor), 0)
                with contextlib.suppress(OSError):  # the other end has gone, as will be seen
                    owner.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
                continue
            message, streams, _, _ = socket.recv_fds(owner, MESSAGE_BYTES, STREAMS)
            if not message:
                sys.exit()
            if message == REST:
                os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", _RESTING])
            pid = os.fork()
            if pid == 0:
                for inherited in (owner.detach(), *peers):
                    os.close(inherited)
                return json.loads(message), streams
            for stream in streams:
                os.close(stream)
            watched = os.pidfd_open(pid)
            peers[watched] = pid
            events.register(watched, select.POLLIN)


def _become(args: Sequence[str], streams: Sequence[int]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.write(1, b"%d\n" % os.getpid())
    if not os.read(0, 1):  # its owner has gone before the guard of its children knew of this one
        sys.exit(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.argv = ["swarm-peer", *args]


if __name__ == "__main__":
    main()
