"""Announcements from strangers, the announcer's rhythm and the view, on a DHT in memory."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.placement import choose_range
from swarm import discovery
from swarm.admission import vouch
from swarm.announcement_record import (
    MAX_RECORD_BYTES,
    check_record,
    decode_announcement,
    encode_announcement,
)
from swarm.config import DiscoverySettings, PlacementSettings, PlannerSettings
from swarm.dht_time import DhtTime
from swarm.discovery import Announcer, SwarmView, keys_of, name_of, peers_by_name
from swarm.errors import Unreachable
from swarm.identity import Identity
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

MODEL = ModelId("smollm2-135m@0123456789abcdef")
FAST = DiscoverySettings(announce_ttl_s=45.0, announce_period_s=0.02, view_period_s=0.02)


def announcement(identity: Identity, layers: str = "0:10", **changes: Any) -> Announcement:
    plain = Announcement(
        peer=PeerAddress(identity.peer_id, (f"/ip4/127.0.0.1/tcp/4001/p2p/{identity.peer_id}",)),
        model=MODEL,
        layers=LayerRange.parse(layers),
        state=PeerState.SERVING,
        version="0.1.0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=10_000,
        sent_at=1000.0,
    )
    return replace(plain, **changes)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class MemoryDht:
    """Keeps the latest expiration of each subkey, as the real one does."""

    clock: Callable[[], float]
    records: dict[str, dict[str, tuple[bytes, float]]] = field(default_factory=dict)
    stores: int = 0
    dead: bool = False

    async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
        self.stores += 1
        expiration = self.clock() + ttl_s
        records = self.records.setdefault(key, {})
        if not check_record(subkey, value, expiration):
            return False
        if subkey in records and records[subkey][1] >= expiration:
            return False
        records[subkey] = (value, expiration)
        return True

    async def get_many(self, keys: Collection[str]) -> dict[str, dict[str, tuple[bytes, float]]]:
        if self.dead:
            raise Unreachable("the DHT can't be read")
        return {key: dict(self.records.get(key, {})) for key in keys}


def view_of(dht: MemoryDht, clock: Clock, wall: Callable[[], float] | None = None) -> SwarmView:
    return SwarmView(dht, MODEL, 30, DiscoverySettings(), clock=clock, wall_clock=wall or dht.clock)


def signed(identity: Identity, fields: Any) -> bytes:
    payload = fields if isinstance(fields, bytes) else msgpack.packb(fields)
    return bytes(msgpack.packb([payload, identity.sign(b"swarm announcement 1\n" + payload)]))


def fields_of(identity: Identity, **facts: object) -> list[Any]:
    payload, _ = msgpack.unpackb(encode_announcement(announcement(identity, **facts), identity))
    return list(msgpack.unpackb(payload))


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_and_is_small() -> None:
    identity = Identity.ephemeral()
    relayed = f"/ip4/1.2.3.4/tcp/1/p2p/{Identity.ephemeral().peer_id}/p2p-circuit/p2p/{identity.peer_id}"
    told = announcement(
        identity,
        peer=PeerAddress(identity.peer_id, (f"/ip4/10.0.0.1/tcp/4001/p2p/{identity.peer_id}", relayed)),
        queue_s=0.25,
        sessions=3,
    )
    record = encode_announcement(told, identity)
    read = decode_announcement(identity.peer_id, record)
    assert read == told
    assert read is not None
    assert read.peer.relayed
    assert len(encode_announcement(announcement(identity), identity)) < 330


def link_reports(count: int) -> tuple[LinkReport, ...]:
    return tuple(LinkReport(f"{n:08}", 0.012345 * (n + 1), 0.000678) for n in range(count))


def test_link_times_and_step_times_come_back_in_120_bytes() -> None:
    identity = Identity.ephemeral()
    told = announcement(identity, links=link_reports(8), step_s=0.0007, head_s=0.012)
    record = encode_announcement(told, identity)
    assert decode_announcement(identity.peer_id, record) == told
    assert len(record) <= len(encode_announcement(replace(told, links=()), identity)) + 130


def test_what_links_carry_comes_back_in_kilobytes_and_older_records_say_nothing_of_it() -> None:
    identity = Identity.ephemeral()
    rates = (125e3, 0.0, 1.0, 1e12)
    links = tuple(replace(link, bytes_per_s=rate) for link, rate in zip(link_reports(4), rates, strict=True))
    told = announcement(identity, links=links)
    assert [link.bytes_per_s for link in decoded(identity, told).links] == [125e3, 0.0, 1e3, 1e9]
    older = decode_announcement(identity.peer_id, signed(identity, fields_of(identity, links=links)[:24]))
    assert older is not None
    assert [link.bytes_per_s for link in older.links] == [0.0] * 4


@pytest.mark.parametrize("bad", [[125], [125, 0, 1], [-1, 0], [10**6 + 1, 0], [1.5, 0], [True, 0], "ab", None, {}])
def test_what_no_link_carries_spoils_the_record(bad: object) -> None:
    identity = Identity.ephemeral()
    fields = fields_of(identity, links=link_reports(2))[:24]
    assert decode_announcement(identity.peer_id, signed(identity, [*fields, [125, 0]])) is not None
    assert decode_announcement(identity.peer_id, signed(identity, [*fields, bad])) is None


def test_more_link_times_than_fit_are_left_out() -> None:
    identity, relay = Identity.ephemeral(), Identity.ephemeral().peer_id
    told = announcement(identity, links=link_reports(20))
    assert len(decoded(identity, told).links) == 8
    relays = tuple(f"/ip4/1.2.3.{n}/tcp/1/p2p/{relay}/p2p-circuit/p2p/{identity.peer_id}" for n in range(6))
    crowded = decoded(identity, replace(told, peer=PeerAddress(identity.peer_id, relays), version="v" * 128))
    assert len(crowded.peer.multiaddrs) == 6
    assert crowded.links == told.links[: len(crowded.links)]
    assert len(crowded.links) < 8


def decoded(identity: Identity, told: Announcement) -> Announcement:
    found = decode_announcement(identity.peer_id, encode_announcement(told, identity))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "bad",
    [
        [0.001, 0.0, ["12345678", 10]],
        [0.001, 0.0, ["1234567", 10, 1]],
        [0.001, 0.0, ["12345678", -1, 1]],
        [0.001, 0.0, ["12345678", 0.5, 1]],
        [0.001, 0.0, ["12345678", 10, 1] * 9],
        [0.001, 0.0, "12345678"],
        [-0.001, 0.0, []],
        [0.001, math.nan, []],
        [0.001, 0.0],
    ],
)
def test_bad_times_spoil_the_record(bad: list[object]) -> None:
    identity = Identity.ephemeral()
    fields = [*fields_of(identity)[:20], *bad]
    assert decode_announcement(identity.peer_id, signed(identity, fields)) is None
    assert decode_announcement(identity.peer_id, signed(identity, fields[:20])) is not None


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/1.2.3.256/tcp/1",
        "/ip4/1.2.3.4/tcp/65536",
        "/ip4/1.2.3.4",
        "/ip4/1.2.3.4/tcp/x",
        "/ip4/1.2.3.4/tcp/1,2",
        "",
    ],
)
def test_addresses_that_nobody_can_dial_spoil_the_record(address: str) -> None:
    identity = Identity.ephemeral()
    fields = fields_of(identity)
    assert decode_announcement(identity.peer_id, signed(identity, fields)) is not None
    fields[1] = [address]
    assert decode_announcement(identity.peer_id, signed(identity, fields)) is None


def test_only_the_peer_itself_can_say_it() -> None:
    one, other = Identity.ephemeral(), Identity.ephemeral()
    record = encode_announcement(announcement(one), one)
    assert decode_announcement(other.peer_id, record) is None
    forged = bytearray(record)
    forged[40] ^= 1
    assert decode_announcement(one.peer_id, bytes(forged)) is None
    assert decode_announcement(other.peer_id, signed(other, fields_of(one))) is None
    assert decode_announcement(one.peer_id, signed(other, fields_of(one))) is None


def test_a_record_can_not_be_kept_alive_by_others() -> None:
    identity = Identity.ephemeral()
    record = encode_announcement(announcement(identity), identity)
    assert check_record(identity.peer_id, record, 1045.0)
    assert not check_record(identity.peer_id, record, 1000.0 + MAX_LIFETIME_S + 1)
    assert not check_record(identity.peer_id, record, math.inf)
    assert not check_record(identity.peer_id, record, math.nan)


@pytest.mark.parametrize(
    ("index", "bad"),
    [
        (1, ["junk"]), (1, "x"), (1, ["/ip4/1.2.3.4/tcp/1"] * 7), (1, ["/unix/tmp/x"]), (1, [7]),
        (1, ["/ip4/1.2.3.4/tcp/1/p2p/12D3KooWGRUa3oF5zB3nGW4v5Q9zZVQ8sJZKvYbHhXo4v7x6w2dL"]),
        (2, ""), (2, b"model"), (2, "m" * 200), (2, "a\nb"),
        (3, -1), (3, 10), (3, True), (3, 1.0), (4, 5000), (4, 0),
        (5, "happy"), (5, None), (6, 7),
        (7, math.nan), (7, math.inf), (7, -1.0), (7, 1), (7, "1"), (8, 1e9), (10, math.nan),
        (9, -1), (9, 2**60), (11, 1.5), (13, math.inf),
        (14, [1, 2, 3]), (14, [1, 2, -3, 0]), (14, None), (15, [3]), (15, [5, 5]), (15, None),
        (16, -1), (17, math.nan), (17, 1), (18, 0),
    ],
)  # fmt: skip
def test_a_field_out_of_range_spoils_the_record(index: int, bad: object) -> None:
    identity = Identity.ephemeral()
    fields = fields_of(identity)
    assert decode_announcement(identity.peer_id, signed(identity, fields)) is not None
    fields[index] = bad
    assert decode_announcement(identity.peer_id, signed(identity, fields)) is None


def test_what_placement_and_policy_need_comes_back() -> None:
    identity = Identity.ephemeral()
    rich = announcement(
        identity,
        capacity=Capacity(8, 2, 1, whole=True),
        moving_to=LayerRange(4, 12),
        memory_mb=16_000,
        gflops=1234.5,
        gpu=True,
    )
    record = encode_announcement(rich, identity)
    assert decode_announcement(identity.peer_id, record) == rich
    assert len(record) < 400
    old = decode_announcement(identity.peer_id, signed(identity, fields_of(identity)[:14]))
    assert old is not None
    assert (old.capacity, old.moving_to, old.memory_mb) == (None, None, 0)


def test_fields_of_newer_versions_are_let_pass() -> None:
    identity = Identity.ephemeral()
    assert decode_announcement(identity.peer_id, signed(identity, [*fields_of(identity), "new"])) is not None
    assert decode_announcement(identity.peer_id, signed(identity, fields_of(identity)[:13])) is None


def test_nesting_and_extensions_are_refused_before_the_signature_counts() -> None:
    identity = Identity.ephemeral()
    nested = b"\xc0"
    for _ in range(200):
        nested = msgpack.packb(msgpack.ExtType(0x40, b"\x91" + nested))
    for payload in (nested, b"\x91" * 600 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xc1"):
        assert decode_announcement(identity.peer_id, payload) is None
        assert decode_announcement(identity.peer_id, signed(identity, payload)) is None
    assert decode_announcement(identity.peer_id, bytes(MAX_RECORD_BYTES + 1)) is None


@given(st.binary() | st.none() | st.text())
def test_junk_is_none(junk: Any) -> None:
    assert decode_announcement("12D3KooWGRUa3oF5zB3nGW4v5Q9zZVQ8sJZKvYbHhXo4v7x6w2dL", junk) is None
    assert decode_announcement(junk, b"junk") is None


@given(st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.floats() | st.text() | st.binary(), st.lists))
def test_signed_junk_is_none(fields: Any) -> None:
    identity = Identity(bytes(32))
    assert decode_announcement(identity.peer_id, signed(identity, msgpack.packb(fields))) is None


def test_what_nobody_would_accept_is_refused_at_the_source() -> None:
    identity = Identity.ephemeral()
    with pytest.raises(ValueError, match="nobody would accept"):
        encode_announcement(announcement(identity, decode_s_per_layer=math.nan), identity)


def test_every_bucket_of_a_model_is_read() -> None:
    assert keys_of(MODEL, 30, 8) == [f"swarm:{MODEL}:{bucket}" for bucket in range(4)]
    assert keys_of(MODEL, 8, 8) == [f"swarm:{MODEL}:0"]


def test_a_voucher_counts_only_for_whom_what_and_which_layers_it_was_signed() -> None:
    identity, verifier = Identity.ephemeral(), Identity.ephemeral()
    good = vouch(verifier, identity.peer_id, MODEL, LayerRange(0, 10))

    def read(voucher: Voucher, layers: str = "0:10") -> Voucher | None:
        decoded = decode_announcement(
            identity.peer_id, encode_announcement(announcement(identity, layers, voucher=voucher), identity)
        )
        assert decoded is not None, "a bad voucher does not spoil the announcement"
        return decoded.voucher

    assert read(good) == good
    assert read(good, "0:11") is None
    assert read(replace(good, at=good.at + 1)) is None
    assert read(replace(good, verifier=identity.peer_id)) is None
    assert read(replace(good, signature=bytes(64))) is None
    assert read(vouch(verifier, verifier.peer_id, MODEL, LayerRange(0, 10))) is None, "somebody else's"
    assert read(vouch(verifier, identity.peer_id, ModelId("other@0"), LayerRange(0, 10))) is None


@pytest.mark.parametrize("skew_s", [-300.0, 300.0])
async def test_a_wrong_clock_is_warned_of_at_once_and_the_swarms_time_helps(
    skew_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Other nodes refuse the record: too far in the future, or expired already."""

    class Refusing(MemoryDht):
        async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
            expiration = self.clock() + ttl_s
            return others < expiration <= others + 120.0 and await super().store(key, subkey, value, ttl_s)

    clock, identity = Clock(1.8e9), Identity.ephemeral()
    others = clock() - skew_s
    async with Announcer(Refusing(clock), identity, DiscoverySettings(), clock) as announcer:
        assert not await announcer.update(announcement(identity))
        assert any("is our clock right?" in line for line in caplog.messages)
    put_right = DhtTime(clock)
    put_right.agree([-skew_s])
    async with Announcer(Refusing(put_right), identity, DiscoverySettings(), put_right) as announcer:
        assert await announcer.update(announcement(identity))


# --- announcer and view ----------------------------------------------------------------------------------------------


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # the condition is somebody else's state
            await asyncio.sleep(0.005)


async def test_an_announcer_renews_and_leaves() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with Announcer(dht, identity, FAST, clock) as announcer:
        assert await announcer.update(announcement(identity))
        clock.now += 15
        await eventually(lambda: dht.stores >= 3)
        view = view_of(dht, clock)
        assert [a.layers for a in await view.refresh()] == [LayerRange(0, 10)]
    assert await view.refresh() == []
    stores = dht.stores
    await asyncio.sleep(0.06)
    assert dht.stores == stores


async def test_who_knows_only_a_models_name_finds_its_peers() -> None:
    """Those with the first layer, who serve; of several models that share it, that of most peers first."""
    clock = Clock()
    dht = MemoryDht(clock)
    other = ModelId(f"{name_of(MODEL)}@{'f' * 16}")
    facts: list[dict[str, Any]] = [
        {"model": other},
        {},
        {},
        {"layers": LayerRange(10, 20)},
        {"state": PeerState.JOINING},
        {"model": ModelId("another@" + "0" * 16)},
    ]
    async with contextlib.AsyncExitStack() as stack:
        peers: list[PeerId] = []
        for fact in facts:
            identity = Identity.ephemeral()
            announcer = await stack.enter_async_context(Announcer(dht, identity, DiscoverySettings(), clock))
            assert await announcer.update(replace(announcement(identity), **fact))
            peers.append(identity.peer_id)

        async def found(*names: str) -> list[set[PeerId]]:
            return [{peer.peer_id for peer in of_model} for of_model in await peers_by_name(dht, names)]

        assert await found(name_of(MODEL)) == [{peers[1], peers[2]}, {peers[0]}]
        assert await found(other) == [{peers[0]}]
        assert await found("nobody's", "") == []
        assert await found("another", other) in ([{peers[5]}, {peers[0]}], [{peers[0]}, {peers[5]}])
    assert await peers_by_name(dht, [name_of(MODEL)]) == [], "they have left"


async def test_renewing_at_once_after_a_restart() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        await announcer.renew()
        assert dht.stores == 0, "nothing to say yet"
        await announcer.update(announcement(identity))
        dht.records.clear()
        await announcer.renew()
        assert len(await view_of(dht, clock).refresh()) == 1


async def test_who_stores_an_announcement_once_more_for_longer_keeps_none_of_the_next_ones_out() -> None:
    """The DHT keeps the latest expiration, which is no part of what a peer signs."""
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        assert await announcer.update(announcement(identity))
        key = keys_of(MODEL, 30, 8)[0]
        record, expiration = dht.records[key][identity.peer_id]
        clock.now += 10
        assert not await dht.store(key, identity.peer_id, record, expiration + MAX_LIFETIME_S - 45 - clock())
        clock.now += 5
        assert await announcer.update(announcement(identity))


async def test_a_tombstone_wins_even_if_the_clock_was_set_back() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        assert await announcer.update(announcement(identity))
        clock.now -= 20
        assert await announcer.update(announcement(identity))
    assert await view_of(dht, clock).refresh() == []


async def test_a_peer_whose_clock_is_put_right_is_there_at_once() -> None:
    """What it said by the wrong one was in the others' future: nobody has taken that."""
    now, wrong_s, identity = Clock(1.8e9), 3600.0, Identity.ephemeral()

    class OfOthers(MemoryDht):
        async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
            return now() < self.clock() + ttl_s <= now() + 120 and await super().store(key, subkey, value, ttl_s)

    def clock() -> float:
        return now() + wrong_s

    dht = OfOthers(clock)
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        assert not await announcer.update(announcement(identity))
        wrong_s = 0.0
        assert await announcer.update(announcement(identity))
        assert len(await view_of(dht, now).refresh()) == 1


async def test_a_range_that_moves_is_seen_once() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    view = view_of(dht, clock)
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        for layers in ("0:10", "2:12", "20:30", "8:30", "0:30"):
            assert await announcer.update(announcement(identity, layers))
            assert [str(a.layers) for a in await view.refresh()] == [layers]
            assert [str(a.layers) for a in await view_of(dht, clock).refresh()] == [layers]


async def test_a_bad_announcement_changes_nothing() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with Announcer(dht, identity, FAST, clock) as announcer:
        assert await announcer.update(announcement(identity))
        with pytest.raises(ValueError, match="nobody"):
            await announcer.update(announcement(identity, queue_s=math.inf))
        await asyncio.sleep(0.05)
        assert len(await view_of(dht, clock).refresh()) == 1


async def test_the_view_leaves_out_the_silent_the_foreign_and_the_failed() -> None:
    clock = Clock()
    dht = MemoryDht(clock)
    alive, foreign, beyond = (Identity.ephemeral() for _ in range(3))
    key = keys_of(MODEL, 30, 8)[0]
    for identity, changes in (
        (alive, {}),
        (foreign, {"model": ModelId("other@0")}),
        (beyond, {"layers": "0:31"}),
    ):
        record = encode_announcement(announcement(identity, **changes), identity)
        dht.records.setdefault(key, {})[identity.peer_id] = (record, 1045.0)
    view = view_of(dht, clock)
    assert view.age() == math.inf
    assert [a.peer.peer_id for a in await view.refresh()] == [alive.peer_id]
    view.forget(alive.peer_id)
    assert view.announcements() == []
    assert await view.refresh() == [], "the same record again is no sign of life"
    clock.now += 1
    dht.records[key][alive.peer_id] = (encode_announcement(announcement(alive, sent_at=1001.0), alive), 1046.0)
    assert len(await view.refresh()) == 1
    clock.now += 30
    await view.refresh()
    assert view.age(alive.peer_id) == 30
    assert view.age() == 0
    clock.now += 16
    assert await view.refresh() == []
    assert view.age(alive.peer_id) == 46


async def test_a_view_that_could_not_be_read_grows_old_and_keeps_what_it_knows() -> None:
    clock, identity = Clock(), Identity.ephemeral()
    dht = MemoryDht(clock)
    view = view_of(dht, clock)
    await dht.store(
        keys_of(MODEL, 30, 8)[0], identity.peer_id, encode_announcement(announcement(identity), identity), 45
    )
    assert len(await view.refresh()) == 1
    clock.now += 20
    assert (view.age(), view.since_look()) == (20, 20)
    dht.dead = True
    assert len(await view.refresh()) == 1
    assert (view.age(), view.since_look()) == (20, 0)
    dht.dead = False
    await view.refresh()
    assert (view.age(), view.since_look()) == (0, 0)


async def test_nobody_is_believed_to_go_to_layers_that_the_model_lacks() -> None:
    """Whoever places itself counts the peers of each layer, those included that are on their way there."""
    clock, identity, me = Clock(), Identity.ephemeral(), Identity.ephemeral()
    dht, capacity = MemoryDht(clock), Capacity(10, 10, 10)
    async with Announcer(dht, identity, DiscoverySettings(), clock) as announcer:
        await announcer.update(announcement(identity, moving_to=LayerRange(0, 4096)))
        seen = await view_of(dht, clock).refresh()
    joining = announcement(me, "0:1", state=PeerState.JOINING, capacity=capacity)
    assert choose_range(seen, joining, 30, PlacementSettings()) is not None
    assert seen == []


@pytest.mark.parametrize("skew_s", [-40.0, 40.0, -4000.0, 4000.0])
async def test_ages_do_not_depend_on_foreign_clocks(skew_s: float, caplog: pytest.LogCaptureFixture) -> None:
    ours, wall = Clock(0.0), Clock(1000.0 + skew_s)
    dht, identity = MemoryDht(Clock()), Identity.ephemeral()
    view = view_of(dht, ours, wall)
    key = keys_of(MODEL, 30, 8)[0]
    dht.records[key] = {identity.peer_id: (encode_announcement(announcement(identity), identity), 1045.0)}
    await view.refresh()
    ours.now, wall.now = 15.0, wall.now + 15
    dht.records[key] = {
        identity.peer_id: (encode_announcement(announcement(identity, sent_at=1015.0), identity), 1060.0)
    }
    assert len(await view.refresh()) == 1
    assert view.age(identity.peer_id) == 0
    ours.now += 46
    assert view.announcements() == []
    assert any("clock" in line for line in caplog.messages) == (skew_s != 40.0)


@pytest.mark.parametrize("wrong_s", [80.0, 300.0, 1e7])
async def test_after_our_clock_was_put_right_our_own_view_has_us_at_once(wrong_s: float) -> None:
    ours, wall, identity = Clock(0.0), Clock(1000.0 + wrong_s), Identity.ephemeral()
    dht = MemoryDht(wall)
    view = view_of(dht, ours, wall)
    async with Announcer(dht, identity, DiscoverySettings(), wall) as announcer:
        await announcer.update(announcement(identity))
        assert len(await view.refresh()) == 1
        wall.now -= wrong_s
        dht.records.clear()  # as dht_node does with what ends too late
        ours.now, wall.now = ours.now + 15, wall.now + 15
        await announcer.renew()
        await view.refresh()
        assert view.age(identity.peer_id) == 0


async def test_an_announcement_from_the_future_is_news_but_once() -> None:
    ours, wall, identity = Clock(0.0), Clock(1000.0), Identity.ephemeral()
    dht = MemoryDht(wall)
    view = view_of(dht, ours, wall)
    record = encode_announcement(announcement(identity, sent_at=1e9), identity)
    dht.records[keys_of(MODEL, 30, 8)[0]] = {identity.peer_id: (record, 1045.0)}
    for age_s in (0, 30, 60):
        ours.now = age_s
        await view.refresh()
        assert view.age(identity.peer_id) == age_s
    assert view.announcements() == []


async def test_the_view_refreshes_itself_and_tells_of_live_peers() -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    seen: list[PeerAddress] = []
    async with SwarmView(dht, MODEL, 30, FAST, on_seen=seen.append, clock=clock, wall_clock=clock) as view:
        assert view.announcements() == []
        await dht.store(
            keys_of(MODEL, 30, 8)[0], identity.peer_id, encode_announcement(announcement(identity), identity), 45
        )
        await eventually(lambda: len(view.announcements()) == 1)
        assert seen[0].peer_id == identity.peer_id


async def test_a_view_outlives_a_failing_dht(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    dht, identity = MemoryDht(clock), Identity.ephemeral()
    async with SwarmView(dht, MODEL, 30, FAST, clock=clock, wall_clock=clock) as view:
        with monkeypatch.context() as patch:
            patch.setattr(discovery, "keys_of", lambda *_: 1 / 0)
            await asyncio.sleep(0.05)
        await dht.store(
            keys_of(MODEL, 30, 8)[0], identity.peer_id, encode_announcement(announcement(identity), identity), 45
        )
        await eventually(lambda: len(view.announcements()) == 1)


async def test_the_view_knows_the_link_times_that_peers_announce() -> None:
    clock = Clock()
    dht = MemoryDht(clock)
    one, other = Identity.ephemeral(), Identity.ephemeral()
    view = view_of(dht, clock)
    await view.refresh()
    assert view.links().seconds(one.peer_id, other.peer_id) == PlannerSettings().link_s
    report = LinkReport(other.peer_id[-LINK_SUFFIX:], 0.03, 0.0)
    for told in (announcement(one, links=(report,)), announcement(other)):
        identity = one if told.links else other
        await dht.store(keys_of(MODEL, 30, 8)[0], identity.peer_id, encode_announcement(told, identity), 45.0)
    await view.refresh()
    assert view.links().seconds(one.peer_id, other.peer_id) == pytest.approx(0.03)
    assert view.links().seconds(other.peer_id, one.peer_id) == pytest.approx(0.03)
    assert view.links() is view.links(), "worked out once"
