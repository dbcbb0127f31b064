"""What one node of the DHT stores for others, whatever strangers send."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from swarm import _hivemind, dht, dht_node
from swarm.config import Settings
from swarm.dht_node import MAX_KEYS, MAX_KEYS_PER_PEER, _LocalStorage
from swarm.errors import Unreachable
from swarm.types import PeerAddress, PeerId

NOW = 1.8e9


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_hivemind.load("hivemind.utils.timed_storage"), "get_dht_time", clock)
    monkeypatch.setattr(dht_node, "dht_time", clock)
    return clock


def stored(storage: _LocalStorage) -> dict[str, tuple[bytes, float]]:
    entry = storage.get(b"key")
    return {} if entry is None else {subkey: tuple(item) for subkey, item in entry.value.items()}


def test_a_record_that_is_refused_does_not_end_the_known_one(clock: Clock) -> None:
    """Anybody can send a peer's record once more, with an end that is near."""
    storage = _LocalStorage()
    assert storage.store_subkey(b"key", "peer", b"record", NOW + 45)
    assert not storage.store_subkey(b"key", "peer", b"record", NOW + 1)
    clock.now += 2
    assert stored(storage) == {"peer": (b"record", NOW + 45)}
    assert storage.store_subkey(b"key", "peer", b"next", NOW + 60)
    clock.now += 50
    assert stored(storage) == {"peer": (b"next", NOW + 60)}


def test_what_was_stored_by_a_wrong_clock_keeps_nothing_out(clock: Clock) -> None:
    storage = _LocalStorage()
    clock.now += 3600
    assert storage.store_subkey(b"key", "peer", b"record", clock.now + 45)
    clock.now -= 3600
    assert storage.store_subkey(b"key", "peer", b"next", NOW + 45)
    assert stored(storage) == {"peer": (b"next", NOW + 45)}


def test_one_peer_does_not_fill_a_node_with_its_records(clock: Clock) -> None:
    storage = _LocalStorage(maxsize=MAX_KEYS)
    assert storage.store_subkey(b"key", "peer", b"record", NOW + 45)
    assert storage.store_subkey(b"key 0", "hoarder", b"junk", NOW + 120)
    took = sum(storage.store_subkey(b"key %d" % n, "hoarder", b"junk", NOW + 60) for n in range(1, 2 * MAX_KEYS))
    assert took == MAX_KEYS_PER_PEER - 1
    assert stored(storage) == {"peer": (b"record", NOW + 45)}
    assert storage.store_subkey(b"key 0", "hoarder", b"next", NOW + 121), "what it has it may renew"
    assert storage.store_subkey(b"key 99", "peer", b"record", NOW + 45), "others have room"
    clock.now += 1
    assert not storage.store_subkey(b"key 99", "hoarder", b"junk", clock.now + 60)
    clock.now += 61
    assert storage.store_subkey(b"key 99", "hoarder", b"moved", clock.now + 60), "others of its records have ended"


async def test_a_node_that_does_not_start_in_time_is_an_error_with_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a ``TimeoutError``: a command ended with a traceback, and with ``--json`` without a last line."""

    async def never(**_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(dht, "create_node", never)
    p2p = SimpleNamespace(peer_id=SimpleNamespace(to_bytes=lambda: b"peer"))
    transport: Any = SimpleNamespace(local=PeerAddress(PeerId("peer")), p2p=p2p)
    settings = replace(Settings(), timeouts=replace(Settings().timeouts, dht_s=0.01))
    with pytest.raises(Unreachable, match=r"timeouts\.dht_s"):
        async with dht.Dht(transport, settings, lambda *_: True):
            pass
