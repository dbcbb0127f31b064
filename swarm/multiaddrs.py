"""Addresses as they are written down: checked here before anything is dialled, announced or bound."""

from __future__ import annotations

import re
from collections.abc import Iterable

from multiaddr import Multiaddr

from swarm.errors import ConfigError
from swarm.identity import is_peer_id
from swarm.types import PeerAddress, PeerId

MAX_LENGTH = 256
"""Characters in one multiaddr; a relayed one with two peer ids has about 200."""

_PLAIN = re.compile(r"/ip4/{0}\.{0}\.{0}\.{0}/(?:tcp|udp)/(0|[1-9][0-9]{{0,4}})".format("(0|[1-9][0-9]{0,2})"))
_HOST = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})
_PORT = frozenset({"tcp", "udp"})
_REST = frozenset({"quic", "quic-v1", "ws", "wss", "tls", "p2p", "p2p-circuit"})


def parse(text: object) -> Multiaddr:
    """A dialable multiaddr; raises ``ValueError`` with a sentence.

    Dialable means: a host, then a port, then only what p2pd speaks. So ``/unix/...`` or a comma (which
    p2pd's command line takes as a separator) never gets through.
    """
    if not isinstance(text, str) or not 0 < len(text) <= MAX_LENGTH or not text.isascii() or "," in text:
        raise ValueError("not a multiaddr")
    try:
        parsed = Multiaddr(text)
        names = [protocol.name for protocol in parsed.protocols()]
    except Exception as error:  # the parser's own tree, plus what its codecs let through (struct, idna, base58)
        raise ValueError(str(error) or type(error).__name__) from None
    if len(names) < 2 or names[0] not in _HOST or names[1] not in _PORT or not _REST.issuperset(names[2:]):
        raise ValueError(f"{text!r} is no address that can be dialled; write /ip4/HOST/tcp/PORT/p2p/PEER_ID")
    return parsed


def is_dialable(text: object) -> bool:
    """True if :func:`parse` takes it; never raises."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def split(text: str) -> tuple[str, PeerId | None]:
    """``/ip4/A/tcp/P/p2p/ID`` -> (``/ip4/A/tcp/P``, ``ID``); no id at the end -> ``None``. Raises ``ValueError``."""
    head, marker, peer_id = text.rstrip("/").rpartition("/p2p/")
    if not (marker and _is_plain(head)):
        parse(text)
    if not marker or "/" in peer_id:
        return text.rstrip("/"), None
    if not is_peer_id(peer_id):
        raise ValueError(f"{peer_id!r} is no peer id")
    return head, PeerId(peer_id)


def _is_plain(text: str) -> bool:
    """Most addresses are: an IPv4 host and a port. The parser takes a millisecond for one; a view reads thousands."""
    match = _PLAIN.fullmatch(text)
    return match is not None and max(map(int, match.groups()[:4])) < 2**8 and int(match[5]) < 2**16


def is_loopback(text: str) -> bool:
    """Whether nobody but this machine can dial it."""
    return text.startswith(("/ip4/127.", "/ip6/::1/"))


def tcp_endpoint(text: str) -> tuple[str, int] | None:
    """Host and port of a plain TCP address, ``None`` for one that is relayed or not TCP. Raises ``ValueError``."""
    parts = str(parse(text)).split("/")  # "", "ip4", HOST, "tcp", PORT, ...
    return None if "p2p-circuit" in parts or parts[3] != "tcp" else (parts[2], int(parts[4]))


def peer_address(text: object) -> PeerAddress:
    """An initial peer or ``--via`` argument, or what a program takes for one; raises :class:`ConfigError`."""
    text = str(text).strip()
    try:
        _, peer_id = split(text)
    except ValueError as error:
        raise ConfigError(f"bad peer address {text!r}: {error}") from None
    if peer_id is None:
        raise ConfigError(f"peer address {text!r} lacks the peer id; write /ip4/HOST/tcp/PORT/p2p/PEER_ID")
    return PeerAddress(peer_id, (text,))


def peer_addresses(texts: Iterable[str]) -> list[PeerAddress]:
    """Many of them, those of the same peer joined; order kept. Raises :class:`ConfigError`."""
    joined: dict[PeerId, tuple[str, ...]] = {}
    for text in texts:
        peer = peer_address(text)
        joined[peer.peer_id] = tuple(dict.fromkeys((*joined.get(peer.peer_id, ()), *peer.multiaddrs)))
    return [PeerAddress(peer_id, multiaddrs) for peer_id, multiaddrs in joined.items()]
