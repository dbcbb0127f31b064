"""What p2pd needs around it: a private folder for its sockets and key, and ports that are really ours."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from swarm import multiaddrs
from swarm.errors import ConfigError, PortInUse

_PREFIX = "swarm-p2p-"
_MAX_FOLDER_LENGTH = 70
"""A unix socket path has at most 107 characters; p2pd's file names take 30."""


@contextlib.contextmanager
def runtime_folder() -> Iterator[Path]:
    """A folder of mode 0700 for as long as the context lives.

    Private, because whoever can connect to these sockets speaks for this peer. After a SIGKILL nobody removes it;
    the next process does: a folder whose lock is free has no owner. Raises :class:`ConfigError`.
    """
    try:
        base = Path(tempfile.gettempdir())
        if len(str(base)) + len(_PREFIX) > _MAX_FOLDER_LENGTH:
            base = Path("/tmp")
        _sweep(base)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        fd = os.open(folder / "lock.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"no temporary folder for sockets: {why}; TMPDIR may name one that can be written") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "lock.new").rename(folder / "lock")  # a sweeper never sees an unlocked lock of a live process
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _sweep(base: Path) -> None:
    for lock in base.glob(f"{_PREFIX}*/lock"):
        with contextlib.suppress(OSError):  # another user's, or swept by another process just now
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(fd)


@contextlib.contextmanager
def reserved_ports(host_maddrs: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The same addresses with every port fixed, and held for as long as the context lives.

    p2pd listens with ``SO_REUSEPORT``, so a second daemon on a taken port starts without an error and steals half of
    the connections. A socket that is bound with ``SO_REUSEPORT`` and never listens gets no connection but keeps
    the port from everybody else, also while p2pd is restarted. Raises :class:`PortInUse`, :class:`ConfigError`.
    """
    with contextlib.ExitStack() as held:
        yield tuple(_reserve(text, held) for text in host_maddrs)


def _reserve(text: str, held: contextlib.ExitStack) -> str:
    try:
        multiaddrs.parse(text)
    except ValueError as error:
        raise ConfigError(f"bad listen address {text!r}: {error}") from None
    _, host_name, host, port_name, port_text, *rest = text.rstrip("/").split("/")
    if host_name not in ("ip4", "ip6"):
        raise ConfigError(f"listen address {text!r} must be an IP address")
    family = socket.AF_INET if host_name == "ip4" else socket.AF_INET6
    kind = socket.SOCK_STREAM if port_name == "tcp" else socket.SOCK_DGRAM
    port = int(port_text)
    try:
        if port:
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # only past TIME_WAIT, not a listener
                probe.bind((host, port))
        holder = held.enter_context(socket.socket(family, kind))
        if kind == socket.SOCK_STREAM and not {"ws", "wss"}.intersection(rest):
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind((host, port))
            port = holder.getsockname()[1]
        elif not port:
            holder.bind((host, 0))
            port = holder.getsockname()[1]
            holder.close()  # a datagram socket that is bound would take part of the packets; web sockets share no port
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{port_name} port {port} on {host} is in use by another process") from None
        raise ConfigError(f"can't listen on {text!r}: {error.strerror or error}") from None
    return "/".join(["", host_name, host, port_name, str(port), *rest])
