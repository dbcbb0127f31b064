"""Whether this machine can be dialled, in words: what other peers found when they dialled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from swarm import multiaddrs
from swarm.config import Settings
from swarm.errors import SwarmError
from swarm.info import DialledBack, ask_to_dial_back
from swarm.transport import Transport
from swarm.types import PeerAddress

MOST_ASKED = 3
"""Peers, one after the other, until one knows it for sure."""


@dataclass(frozen=True, slots=True)
class Reachability:
    dialled: bool | None
    """``None``: nobody could tell."""
    sentence: str
    """Goes on from "this machine"."""


async def find_out(transport: Transport, peers: Sequence[PeerAddress], settings: Settings) -> Reachability:
    """Asks a few of ``peers``; never raises a :class:`SwarmError`."""
    own = [address for address in map(_bare, transport.local.multiaddrs) if not _is_relayed(address)]
    if all(multiaddrs.is_loopback(address) for address in own):
        return Reachability(
            False,
            "can't be dialled by others: it listens on the loopback only; "
            "--host-maddrs /ip4/0.0.0.0/tcp/31330 listens to all",
        )
    found = Reachability(None, "has no other peer to ask whether it can be dialled")
    for peer in peers[:MOST_ASKED]:
        try:
            found = judge(own, await ask_to_dial_back(transport, peer, settings))
        except SwarmError as error:
            if found.dialled is None:
                name = f"peer {peer.peer_id[-6:]}"
                found = Reachability(None, f"does not know whether it can be dialled: {name}: {error.message}")
        if found.dialled:
            break
    return found


def judge(own: Sequence[str], told: DialledBack) -> Reachability:
    """``own``: the addresses that this process announces, without the peer id."""
    name = f"peer {told.peer[-6:]}"
    if told.reached:
        return _reached(own, told.reached, name)
    if not told.failures:
        return Reachability(None, f"does not know whether it can be dialled: {name} sees it through a relay only")
    address, why = told.failures[0]
    host, port = _host(address), _port(address)
    if host in map(_host, own):
        cure = f"A firewall is in between, or nothing listens there: open {port}; or try --use-relay"
    else:
        cure = f"It is behind a NAT (router): forward {port} to it and add --announce-maddrs {address}; "
        cure += "or try --nat-port-map, or --use-relay"
    return Reachability(False, f"can't be dialled: {name} sees it at {host} and dialled {address}: {why}. {cure}")


def _reached(own: Sequence[str], reached: str, name: str) -> Reachability:
    if multiaddrs.is_loopback(reached):
        return Reachability(None, f"was dialled by {name} of this machine; only a peer elsewhere can tell about others")
    announced = reached in own or any(_is_name(a) and _port(a) == _port(reached) for a in own)
    lacking = "" if announced else f"; but it does not announce that: add --announce-maddrs {reached}"
    inside = ", which is in the same network: one outside may not" if ip_address(_host(reached)).is_private else ""
    return Reachability(True, f"can be dialled at {reached}: {name} did{inside}{lacking}")


def _bare(address: str) -> str:
    return multiaddrs.split(address)[0]


def _host(address: str) -> str:
    return address.split("/")[2]


def _port(address: str) -> str:
    return "{3} port {4}".format(*address.split("/"))


def _is_relayed(address: str) -> bool:
    return "p2p-circuit" in address.split("/")


def _is_name(address: str) -> bool:
    return address.split("/")[1].startswith("dns")
