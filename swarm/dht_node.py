"""hivemind's DHT node, hardened: what it decodes, what it stores, and whose node ids it believes. Used by ``dht.py``.

Departures from hivemind:

- *Serializer guard.* 1.4 KiB of nested msgpack extensions crash a stock node (D13). Ours decodes one extension type,
  the dictionary of a key, at depth 0 only, and builds it from plain msgpack.
- *Record validator* on what is stored and on what is read. A record is a subkey that is a peer id and a value that
  this peer has signed; plain values, long ones and far expirations are refused. In a dictionary with bad entries only
  these are dropped (stock: all of it, so that one junk entry hides a key).
- *Time* is the swarm's (``dht_time``), for what hivemind itself does with records, too.
- *Room.* One peer has records under few keys of a node: else it could push out the others' (the stock node counts keys
  only).
- *Node ids* are SHA-1 of the peer id; others are ignored, in routing tables and in search results. So taking over a
  key takes as many identities as it takes luck, not one peer with twenty made-up ids (D9).

RPC names carry the name of our protocol class, so stock hivemind nodes and ours don't mix.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Awaitable, Callable
from types import FunctionType
from typing import Any

import msgpack

from swarm import _hivemind
from swarm.dht_time import dht_time
from swarm.identity import is_peer_id

_node = _hivemind.load("hivemind.dht.node")
_routing = _hivemind.load("hivemind.dht.routing")
_storage = _hivemind.load("hivemind.dht.storage")
_timed = _hivemind.load("hivemind.utils.timed_storage")
_Serializer: Any = _hivemind.load("hivemind.utils.serializer").MSGPackSerializer
_Protocol: Any = _hivemind.load("hivemind.dht.protocol").DHTProtocol
_Storage: Any = _storage.DHTLocalStorage

_dht_pb2: Any = _hivemind.load("hivemind.proto.dht_pb2")
for _module in (_node, _routing, _timed, _hivemind.load("hivemind.dht.protocol")):
    _module.get_dht_time = dht_time

log = logging.getLogger(__name__)

MAX_VALUE_BYTES = 1024
"""Of one record. With ``MAX_SUBKEYS`` this keeps a whole key below p2pd's 4 MiB for one message (D1, D2)."""
MAX_SUBKEYS = 3000
"""Peers under one key."""
MAX_KEYS = 4096
"""Keys that one node stores for others; those that expire first go first."""
MAX_KEYS_PER_PEER = 32
"""... with records of one peer; an honest one has a record for each bucket that it was in within ``MAX_TTL_S``."""
MAX_PEERS = 32_768
"""Whose keys are counted."""
MAX_TTL_S = 120.0
MAX_KEYS_PER_CALL = 256

_DICTIONARY_EXTENSION = 0x50

RecordCheck = Callable[[str, bytes, float], bool]
"""``check(peer_id, value, expiration)``: did this peer sign this value, for that long? Never raises."""


# --- the serializer guard --------------------------------------------------------------------------------------------


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"msgpack extension {code} in a record")


def _dictionary(code: int, data: bytes) -> Any:
    """The dictionary of one key: ``[maxsize, latest expiration, [[subkey, value, expiration], ...]]``."""
    if code != _DICTIONARY_EXTENSION:
        raise ValueError(f"msgpack extension {code}")
    _, _, entries = msgpack.unpackb(data, ext_hook=_no_extension, raw=False)
    if not isinstance(entries, list) or len(entries) > MAX_SUBKEYS:
        raise ValueError("too many subkeys")
    dictionary = _storage.DictionaryDHTValue()
    with dictionary.freeze():
        for subkey, value, expiration in entries:
            if not isinstance(subkey, str) or not isinstance(value, bytes) or not isinstance(expiration, float):
                raise ValueError("malformed entry")
            dictionary.store(subkey, value, expiration)
    return dictionary


class _GuardedSerializer(_Serializer):  # type: ignore[misc]
    @classmethod
    def loads(cls, buf: bytes) -> Any:
        return msgpack.unpackb(buf, ext_hook=_dictionary, raw=False)


# --- the validator ---------------------------------------------------------------------------------------------------


class RecordValidator:
    """hivemind's validator interface (validate, sign_value, strip_value). ``validate`` never raises."""

    def __init__(self, check: RecordCheck, clock: Callable[[], float] = dht_time) -> None:
        self._check = check
        self._clock = clock

    def validate(self, record: Any) -> bool:
        try:
            # negated, so that NaN fails too
            if not (record.expiration_time <= self._clock() + MAX_TTL_S):
                return False
            if len(record.value) > MAX_VALUE_BYTES or len(record.subkey) > MAX_VALUE_BYTES:
                return False
            subkey = msgpack.unpackb(record.subkey, ext_hook=_no_extension, raw=False)
            value = msgpack.unpackb(record.value, ext_hook=_no_extension, raw=False)
            if not isinstance(value, bytes) or not is_peer_id(subkey):
                return False
            return self._check(subkey, value, float(record.expiration_time))
        except Exception:  # whatever a stranger's bytes make msgpack raise: the record is bad, the node lives on (D13b)
            return False

    def sign_value(self, record: Any) -> bytes:
        return bytes(record.value)

    def strip_value(self, record: Any) -> bytes:
        return bytes(record.value)


# --- the node --------------------------------------------------------------------------------------------------------


def node_id_of(peer_id: bytes) -> Any:
    """The one node id that a peer may have (a ``DHTID``): SHA-1 of its binary peer id."""
    return _routing.DHTID.generate(source=peer_id)


def _bounded(rpc: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The same RPC, but not for thousands of keys in one request. ``wraps`` keeps the annotations hivemind reads."""

    @functools.wraps(rpc)
    async def bounded(self: Any, request: Any, context: Any) -> Any:
        if len(request.keys) > MAX_KEYS_PER_CALL:
            raise ValueError("too many keys")
        return await rpc(self, request, context)

    return bounded


class _LocalStorage(_Storage):  # type: ignore[misc]
    def __init__(self, maxsize: int | None = None) -> None:
        super().__init__(maxsize)
        self._keys_of = _timed.TimedStorage(MAX_PEERS)
        """The keys under which each peer has a record, until its last one ends."""

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        entry = self.get(key)
        if entry is not None and isinstance(entry.value, _storage.DictionaryDHTValue):
            known = entry.value.get(subkey)
            if known is None and len(entry.value) >= MAX_SUBKEYS:
                return False
            if known is not None and known.expiration_time > dht_time() + MAX_TTL_S:
                del entry.value[subkey]  # it was stored by a clock that has been put right since
            elif known is not None and known.expiration_time >= expiration_time:
                return False  # hivemind refuses it as well, but then ends the known one by that time
        if expiration_time < dht_time() or not self._count(key, subkey, expiration_time):
            return False
        return bool(super().store_subkey(key, subkey, value, expiration_time))

    def _count(self, key: Any, subkey: Any, expiration_time: float) -> bool:
        """False: this peer has records under enough other keys."""
        keys, ends = self._keys_of.get(subkey) or (_timed.TimedStorage(), expiration_time)
        if key not in keys and len(keys) >= MAX_KEYS_PER_PEER:
            return False
        keys.store(key, True, expiration_time)
        self._keys_of.store(subkey, keys, max(ends, expiration_time))
        return True


class SwarmDHTProtocol(_Protocol):  # type: ignore[misc]
    """hivemind's RPCs with our guard, bounds and node ids."""

    serializer = _GuardedSerializer
    rpc_find = _bounded(_Protocol.rpc_find)
    rpc_store = _bounded(_Protocol.rpc_store)

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> Any:
        protocol = await super().create(*args, **kwargs)
        protocol.storage, protocol.cache = _LocalStorage(maxsize=MAX_KEYS), _LocalStorage(maxsize=MAX_KEYS)
        return protocol

    async def ahead_s(self, peer: Any) -> float:
        """How far the clock of a peer is ahead of :data:`dht_time`, or NaN if it does not say."""
        began = dht_time()
        try:
            async with self.rpc_semaphore:
                request = _dht_pb2.PingRequest()
                response = await self.get_stub(peer).rpc_ping(request, timeout=self.wait_timeout)
        except Exception:  # hivemind raises anything
            return math.nan
        return float(response.dht_time) - (began + dht_time()) / 2

    async def update_routing_table(self, node_id: Any, peer_id: Any, responded: bool = True) -> None:
        if node_id is not None and node_id != node_id_of(peer_id.to_bytes()):
            log.info("peer %s claims a node id that isn't its own; ignored", peer_id)
            return
        await super().update_routing_table(node_id, peer_id, responded)

    async def call_find(self, peer: Any, keys: Any) -> Any:
        response = await super().call_find(peer, keys)
        return response and {key: (_honest(item), _neighbours(nearest)) for key, (item, nearest) in response.items()}

    def _validate_dictionary(self, key_bytes: bytes, dictionary: Any) -> bool:
        if not isinstance(dictionary, _storage.DictionaryDHTValue):
            return False
        with dictionary.freeze():
            entries = [(subkey, *entry) for subkey, entry in dictionary.items()]
            good = []
            for subkey, value, expiration in entries:
                if self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expiration):
                    good.append(expiration)
                else:
                    del dictionary[subkey]
            dictionary.latest_expiration_time = max(good, default=-math.inf)
        return bool(good)


def _honest(item: Any) -> Any:
    """A found dictionary with its entries' own expiration: a replica that claims infinity would end the search."""
    if item is None or not isinstance(item.value, _storage.DictionaryDHTValue):
        return None
    return _timed.ValueWithExpiration(item.value, item.value.latest_expiration_time)


def _neighbours(nearest: dict[Any, Any]) -> dict[Any, Any]:
    """The neighbours that a peer names, without those whose node id isn't theirs."""
    return {
        node_id: peer_id
        for node_id, peer_id in nearest.items()
        if node_id == node_id_of(peer_id.to_bytes()) and is_peer_id(peer_id.to_base58())
    }


async def create_node(**arguments: Any) -> Any:
    """``DHTNode.create(**arguments)``, but with :class:`SwarmDHTProtocol` for the stock protocol.

    ``create`` names its protocol as a global, so this runs a copy of the function with globals of its own: another user
    of hivemind in this process isn't affected.
    """
    create = _node.DHTNode.create.__func__
    own_globals = {**vars(_node), "DHTProtocol": SwarmDHTProtocol}
    copy = FunctionType(create.__code__, own_globals, "create", create.__defaults__)
    copy.__kwdefaults__ = create.__kwdefaults__
    return await copy(_node.DHTNode, **arguments)
