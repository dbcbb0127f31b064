"""What one node of the DHT stores for others, whatever strangers send."""

from __future__ import annotations

import pytest

from swarm import _hivemind, dht_node
from swarm.dht_node import _LocalStorage

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
