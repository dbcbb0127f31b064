"""The signed record of an announcement: encoding, and decoding that trusts nothing.

A record is ``[payload, signature]``, the payload a msgpack list that newer versions make longer. Everything that a
stranger sends is size-capped, typed and range-checked before it becomes an :class:`Announcement`.

A usual record has 540 bytes: peer id 54, address 28, model and version 38, numbers 94, voucher 130, signature 70, and
15 for each of at most eight link times, 18 if it is known how much a link carries. A record that would be too large
tells fewer of them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import msgpack

from swarm import multiaddrs
from swarm.admission import is_signed
from swarm.errors import SwarmError
from swarm.identity import Identity, is_peer_id, verify
from swarm.types import (
    LINK_SUFFIX,
    MAX_LIFETIME_S,
    Announcement,
    Capacity,
    LayerRange,
    LinkReport,
    ModelId,
    PeerAddress,
    PeerId,
    PeerState,
    Voucher,
)

MAX_RECORD_BYTES = 1000
"""Of an encoded announcement; the DHT takes a little more."""
MAX_MULTIADDRS = 6
MAX_LAYERS = 4096
MAX_LINKS = 8
MOST_KNOWN = 16_384
"""Decoded records that are kept; a view of more peers than this would check every signature at every refresh."""

_DOMAIN = b"swarm announcement 1\n"
"""Signed together with the payload, so that no other signature of the same key passes for an announcement."""
_MAX_TEXT = 128
_MAX_SECONDS = 1e6
_MAX_COUNT = 2**48
_MAX_LINK_US = 2**32 - 1
_MAX_KB_PER_S = 10**6
_STORING_S = 2.0
"""A record may be stored so long after it was signed, and expires so much later."""


def encode_announcement(announcement: Announcement, identity: Identity) -> bytes:
    """Signed bytes for the DHT; no more than ``MAX_MULTIADDRS`` addresses. ``ValueError`` if nobody would accept it.

    Link times come back in whole microseconds, what links carry in kB/s, and of the last ones only those that fit.
    """
    for links in range(min(len(announcement.links), MAX_LINKS), -1, -1):
        payload = _payload(replace(announcement, links=announcement.links[:links]), identity)
        record: bytes = msgpack.packb([payload, identity.sign(_DOMAIN + payload)])
        if len(record) <= MAX_RECORD_BYTES:
            break
    if decode_announcement(identity.peer_id, record) is None:
        raise ValueError(f"an announcement that nobody would accept: {announcement}")
    return record


def _payload(a: Announcement, identity: Identity) -> bytes:
    suffix = f"/p2p/{identity.peer_id}"
    addresses = [text.removesuffix(suffix) for text in a.peer.multiaddrs[:MAX_MULTIADDRS]]
    payload: bytes = msgpack.packb(
        [
            a.peer.peer_id,
            addresses,
            a.model,
            a.layers.start,
            a.layers.end,
            a.state.value,
            a.version,
            float(a.decode_s_per_layer),
            float(a.prefill_s_per_token_layer),
            int(a.kv_tokens_free),
            float(a.queue_s),
            int(a.sessions),
            a.peer.relayed,  # for older versions; the addresses tell it, too
            float(a.sent_at),
            _to_numbers(a.capacity),
            [a.moving_to.start, a.moving_to.end] if a.moving_to else [],
            int(a.memory_mb),
            float(a.gflops),
            bool(a.gpu),
            [a.voucher.verifier, float(a.voucher.at), a.voucher.signature] if a.voucher else [],
            float(a.step_s),
            float(a.head_s),
            [part for link in a.links for part in _to_parts(link)],
            float(a.lifetime_s),
            _to_rates(a.links),
        ]
    )
    return payload


@functools.lru_cache(maxsize=MOST_KNOWN)
def _decode(peer_id: str, record: bytes) -> Announcement | None:
    # cached, because the same record comes from every replica at every refresh and a signature costs 0.1 ms
    try:
        payload, signature = msgpack.unpackb(record, ext_hook=_no_extension, raw=False)
        if not isinstance(payload, bytes) or not verify(peer_id, _DOMAIN + payload, signature):
            return None
        return _announcement(peer_id, msgpack.unpackb(payload, ext_hook=_no_extension, raw=False))
    except (ValueError, TypeError, SwarmError, msgpack.UnpackException):
        return None


def decode_announcement(peer_id: str, record: bytes) -> Announcement | None:
    """The announcement of ``peer_id``, or ``None`` for anything that this peer did not sign or that is out of range.

    Takes any bytes from the network and never raises. Addresses come back with ``/p2p/ID`` at the end.
    """
    if not isinstance(peer_id, str) or not isinstance(record, bytes) or len(record) > MAX_RECORD_BYTES:
        return None
    return _decode(peer_id, record)


def check_record(peer_id: str, record: bytes, expiration: float) -> bool:
    """What every DHT node asks before it stores or believes a record (``swarm.dht_node.RecordCheck``). Never raises.

    A record that ended later than its peer means it to would keep out the next ones, which end before it.
    """
    announcement = decode_announcement(peer_id, record)
    if announcement is None:
        return False
    lifetime_s = min(announcement.lifetime_s + _STORING_S, MAX_LIFETIME_S)
    return expiration <= announcement.sent_at + lifetime_s


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"msgpack extension {code}")


def _announcement(peer_id: str, fields: Any) -> Announcement:
    """Raises ``ValueError`` or ``TypeError`` unless every field has its type and range."""
    if not isinstance(fields, list) or len(fields) < 14:  # more: a newer version
        raise ValueError("fields")
    claimed, addresses, model, start, end, state, version, *numbers = fields[:14]
    decode_s, prefill_s, kv, queue_s, sessions, _, sent_at = numbers
    if claimed != peer_id or not is_peer_id(peer_id):
        raise ValueError("peer id")
    if not isinstance(addresses, list) or len(addresses) > MAX_MULTIADDRS:
        raise ValueError("addresses")
    announcement = Announcement(
        peer=PeerAddress(PeerId(peer_id), tuple(_address(text, peer_id) for text in addresses)),
        model=ModelId(_text(model)),
        layers=LayerRange(_count(start, MAX_LAYERS), _count(end, MAX_LAYERS)),
        state=PeerState(_text(state)),
        version=_text(version),
        decode_s_per_layer=_seconds(decode_s),
        prefill_s_per_token_layer=_seconds(prefill_s),
        kv_tokens_free=_count(kv),
        queue_s=_seconds(queue_s),
        sessions=_count(sessions),
        sent_at=_seconds(sent_at, 1e11),
        **_more(fields[14:19]),
        **_times(fields[20:23], fields[24] if len(fields) > 24 else []),
        lifetime_s=_seconds(fields[23], MAX_LIFETIME_S) if len(fields) > 23 else MAX_LIFETIME_S,
    )
    voucher = _voucher(fields[19]) if len(fields) > 19 else None
    if voucher is None or not is_signed(voucher, announcement.peer.peer_id, announcement.model, announcement.layers):
        return announcement
    return replace(announcement, voucher=voucher)


def _to_numbers(capacity: Capacity | None) -> list[int]:
    return [] if capacity is None else [capacity.middle, capacity.first, capacity.last, int(capacity.whole)]


def _more(fields: list[Any]) -> dict[str, Any]:
    """What placement and policy need; an older version does not tell it."""
    if not fields:
        return {}
    capacity, moving_to, memory_mb, gflops, gpu = fields
    if not isinstance(gpu, bool) or not isinstance(capacity, list) or not isinstance(moving_to, list):
        raise TypeError("capacity, moving_to or gpu")
    counts = [_count(number, MAX_LAYERS) for number in capacity]
    ends = [_count(number, MAX_LAYERS) for number in moving_to]
    if len(counts) not in (0, 4) or len(ends) not in (0, 2):
        raise ValueError("capacity or moving_to")
    return {
        "capacity": Capacity(counts[0], counts[1], counts[2], bool(counts[3])) if counts else None,
        "moving_to": LayerRange(ends[0], ends[1]) if ends else None,
        "memory_mb": _count(memory_mb),
        "gflops": _seconds(gflops, 1e9),
        "gpu": gpu,
    }


def _times(fields: list[Any], rates: Any) -> dict[str, Any]:
    """What planners need to predict well; an older version does not tell it."""
    if not fields:
        return {}
    step_s, head_s, links = fields
    if not isinstance(links, list) or len(links) % 3 or len(links) > 3 * MAX_LINKS:
        raise ValueError("links")
    if any(len(_text(name)) != LINK_SUFFIX for name in links[::3]):
        raise ValueError("a link to somebody")
    seconds = [[_count(number, _MAX_LINK_US) / 1e6 for number in links[first::3]] for first in (1, 2)]
    if not isinstance(rates, list) or len(rates) not in (0, len(links) // 3):
        raise ValueError("rates")
    bytes_per_s = [1e3 * _count(rate, _MAX_KB_PER_S) for rate in rates or [0] * (len(links) // 3)]
    reports = tuple(LinkReport(*parts) for parts in zip(links[::3], *seconds, bytes_per_s, strict=True))
    return {"step_s": _seconds(step_s), "head_s": _seconds(head_s), "links": reports}


def _to_parts(link: LinkReport) -> tuple[str, int, int]:
    seconds, jitter = (min(round(value * 1e6), _MAX_LINK_US) for value in (link.seconds, link.jitter_s))
    return link.peer, seconds, jitter


def _to_rates(links: tuple[LinkReport, ...]) -> list[int]:
    """In kB/s; none if all are 0."""
    rates = [min(math.ceil(link.bytes_per_s / 1e3), _MAX_KB_PER_S) for link in links]
    return rates if any(rates) else []


def _voucher(fields: Any) -> Voucher | None:
    if not isinstance(fields, list) or len(fields) not in (0, 3):
        raise ValueError("voucher")
    if not fields:
        return None
    verifier, at, signature = fields
    if not isinstance(signature, bytes) or not is_peer_id(verifier):
        raise ValueError("voucher")
    return Voucher(PeerId(verifier), _seconds(at, 1e11), signature)


def _address(text: Any, peer_id: str) -> str:
    full = f"{text}/p2p/{peer_id}"
    address, owner = multiaddrs.split(full)
    if owner != peer_id or (not address.endswith("/p2p-circuit") and "/p2p/" in address):
        raise ValueError("address")
    return full


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT or not value.isprintable():
        raise ValueError("text")
    return value


def _count(value: Any, limit: int = _MAX_COUNT) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError("count")
    return value


def _seconds(value: Any, limit: float = _MAX_SECONDS) -> float:
    if not isinstance(value, float) or not 0 <= value <= limit:  # NaN compares false
        raise ValueError("seconds")
    return value
