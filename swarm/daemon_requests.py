"""Requests to a p2pd daemon on its control socket, and what its refusals mean in our words."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from multiaddr import Multiaddr

from swarm import _hivemind, multiaddrs
from swarm.awake import timeout_awake
from swarm.errors import SwarmError, Unreachable
from swarm.identity import is_peer_id
from swarm.types import PeerAddress

_p2p = _hivemind.load("hivemind.p2p")
_bindings = _hivemind.load("hivemind.p2p.p2p_daemon_bindings.utils")
_pb = _hivemind.load("hivemind.proto.p2pd_pb2")


_OWN_DAEMON_DOWN = (ConnectionError, FileNotFoundError, EOFError)
"""What becomes of a request to a daemon that has ended."""
_NOTICED_S = 0.05
"""After this who watches the daemon knows it, too, and has others wait for the next one."""


async def dial(
    socket: str, peer: PeerAddress, protocol: str | None, timeout_s: float
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to ``peer``, then open a stream, both on one control connection, which then is the stream.

    p2pd does nothing for the first when it is connected; with ``protocol`` None that is all that is asked of it.
    Raises :class:`Unreachable`.
    """
    if not is_peer_id(peer.peer_id):
        raise Unreachable(f"{peer.peer_id!r} is no peer id")
    addresses = _dialable(peer)
    raw_id = _p2p.PeerID.from_base58(peer.peer_id).to_bytes()
    writer: asyncio.StreamWriter | None = None
    try:
        async with timeout_awake(timeout_s):
            reader, writer = await asyncio.open_unix_connection(socket)
            if addresses or protocol is None:
                connect = _pb.ConnectRequest(peer=raw_id, addrs=[address.to_bytes() for address in addresses])
                await _accepted(reader, writer, _pb.Request(type=_pb.Request.CONNECT, connect=connect))
            if protocol is not None:
                stream = _pb.StreamOpenRequest(peer=raw_id, proto=[protocol])
                await _accepted(reader, writer, _pb.Request(type=_pb.Request.STREAM_OPEN, streamOpen=stream))
        return reader, writer
    except BaseException as error:
        if writer is not None:
            writer.transport.abort()
        if isinstance(error, _OWN_DAEMON_DOWN):
            await asyncio.sleep(_NOTICED_S)
        if isinstance(error, Exception):
            raise translate(error, peer, timeout_s) from None
        raise


async def own_addresses(socket: str, timeout_s: float) -> list[str] | None:
    """Where others can dial the daemon, as it knows by now; ``None``: it is not there, or does not respond."""
    response = await _ask(socket, _pb.Request(type=_pb.Request.IDENTIFY), timeout_s)
    return list(_texts(response.identify.addrs)) if response is not None else None


async def is_connected(socket: str, peer: PeerAddress, timeout_s: float) -> bool:
    """Whether there is a connection to ``peer``, whoever made it; False if the daemon does not respond."""
    if not is_peer_id(peer.peer_id):
        return False
    response = await _ask(socket, _pb.Request(type=_pb.Request.LIST_PEERS), timeout_s)
    raw_id = _p2p.PeerID.from_base58(peer.peer_id).to_bytes()
    return response is not None and any(info.id == raw_id for info in response.peers)


async def _ask(socket: str, request: Any, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(socket)
            try:
                return await _call(reader, writer, request)
            finally:
                writer.close()
    except (OSError, EOFError):  # TimeoutError is an OSError, IncompleteReadError an EOFError
        return None


def _texts(addresses: Iterable[bytes]) -> Iterator[str]:
    for address in addresses:
        with contextlib.suppress(Exception):  # the parser's own tree: it does not know all kinds that p2pd does
            yield str(Multiaddr(address))


_IN_OTHER_WORDS = {
    "message did not have trailing newline": "what listens there is no peer",
    "i/o timeout": "no answer",
    "context deadline exceeded": "no answer in time",
    "dial backoff": "it could not be dialled a moment ago",
}
"""What p2pd says of an address that it dialled."""


def translate(error: Exception, peer: PeerAddress, deadline_s: float) -> SwarmError:
    """hivemind's errors, told apart by type first and text second; unknown ones are "unreachable, retryable"."""
    if isinstance(error, SwarmError):
        return error
    text = str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        return Unreachable(f"peer {peer.peer_id} did not answer within {deadline_s:g} s")
    if isinstance(error, _OWN_DAEMON_DOWN):
        return Unreachable(f"the own p2p daemon is down ({text})")
    if text.startswith("Daemon failed to start"):
        return Unreachable(text.replace("Daemon failed to start", "the own p2p daemon does not start"))
    if "protocols not supported" in text:
        return Unreachable(f"peer {peer.peer_id} does not speak this protocol")
    if "routing: not found" in text or "no addresses" in text:
        return Unreachable(f"nobody knows an address of peer {peer.peer_id}")
    # p2pd names each address that it dialled in a line of its own; what went wrong comes last
    lines = [line for line in text.splitlines() if line.lstrip().startswith("* [")]
    causes = dict.fromkeys(line.rpartition("] ")[2].rpartition(": ")[2] for line in lines)
    told = dict.fromkeys(_IN_OTHER_WORDS.get(cause, cause) for cause in causes)
    return Unreachable(f"can't reach peer {peer.peer_id}: {', '.join(told) or text}")


def _dialable(peer: PeerAddress) -> list[Multiaddr]:
    """Checked addresses, peer ids cut off. Raises :class:`Unreachable` if there are some but none is good."""
    good: list[Multiaddr] = []
    bad: list[str] = []
    for text in peer.multiaddrs:
        try:
            address, peer_id = multiaddrs.split(text)
            if peer_id not in (None, peer.peer_id):
                raise ValueError(f"{text!r} is the address of another peer")
            good.append(Multiaddr(address))
        except ValueError as error:
            bad.append(str(error))
    if bad and not good:
        raise Unreachable(f"no usable address of peer {peer.peer_id}: {'; '.join(bad)}")
    return good


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    """One request; the response, which may be a refusal."""
    await _bindings.write_pbmsg(writer, request)
    response = _pb.Response()
    await _bindings.read_pbmsg_safe(reader, response)
    return response


async def _accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> None:
    """One request; raises hivemind's ``ControlFailure`` with the daemon's words if it is refused."""
    _bindings.raise_if_failed(await _call(reader, writer, request))
