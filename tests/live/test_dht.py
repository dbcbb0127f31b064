"""The DHT over real p2pd daemons: healing, and what strangers can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from swarm import _hivemind, dht_node
from swarm.announcement_record import check_record, encode_announcement
from swarm.config import DiscoverySettings, NetworkSettings, Settings, TimeoutSettings
from swarm.dht import Dht
from swarm.dht_node import MAX_SUBKEYS, RecordValidator, SwarmDHTProtocol, node_id_of
from swarm.discovery import Announcer, SwarmView, keys_of
from swarm.errors import ConfigError, Unreachable
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.types import Announcement, LayerRange, ModelId, PeerAddress, PeerState

pytestmark = [pytest.mark.live, pytest.mark.timeout(30)]

pb: Any = _hivemind.load("hivemind.proto.dht_pb2")
DHTID: Any = _hivemind.load("hivemind.dht.routing").DHTID
PeerID: Any = _hivemind.load("hivemind.p2p").PeerID

MODEL = ModelId("smollm2-135m@0123456789abcdef")
KEY = keys_of(MODEL, 30, 8)[0]
SETTINGS = Settings(
    timeouts=replace(TimeoutSettings(), connect_s=1.5, dht_s=5.0, daemon_start_s=20.0),
    discovery=replace(DiscoverySettings(), ping_period_s=0.3, announce_period_s=0.5, view_period_s=0.5),
)


def announcement(peer: PeerAddress, layers: str = "0:10") -> Announcement:
    return Announcement(
        peer=peer,
        model=MODEL,
        layers=LayerRange.parse(layers),
        state=PeerState.SERVING,
        version="0.1.0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=10_000,
        sent_at=time.time(),
    )


def record_of(node: Dht) -> bytes:
    transport = node._transport
    return encode_announcement(announcement(transport.local), transport.identity)


@contextlib.asynccontextmanager
async def node(listen: bool = True, settings: Settings = SETTINGS, book: str = "") -> AsyncIterator[Dht]:
    async with (
        Libp2pTransport(Identity.ephemeral(), settings, listen) as transport,
        Dht(transport, settings, check_record, book) as dht,
    ):
        yield dht


def addresses(dht: Dht) -> tuple[str, ...]:
    return dht._transport.local.multiaddrs


def peer_id(dht: Dht) -> str:
    return dht._transport.local.peer_id


async def seen_by(reader: Dht) -> set[str]:
    try:
        return set(await reader.get(KEY))
    except Unreachable:
        return set()


async def eventually(condition: Callable[[], bool], limit_s: float = 12.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # the condition is somebody else's state
            await asyncio.sleep(0.02)


# --- records ---------------------------------------------------------------------------------------------------------


async def test_records_are_found_by_full_nodes_and_by_clients() -> None:
    async with node() as one, node() as two, node() as three, node(listen=False) as client:
        for other in (two, three, client):
            assert await other.connect(addresses(one)) == 1
        for dht in (one, two, three):
            assert await dht.store(KEY, peer_id(dht), record_of(dht), 45.0)
        found = [await dht.get(KEY) for dht in (one, two, three, client)]
        for records in found:
            assert set(records) == {peer_id(one), peer_id(two), peer_id(three)}
        value, expiration = found[3][peer_id(one)]
        assert check_record(peer_id(one), value, expiration)
        assert abs(expiration - time.time() - 45) < 5
        both = await client.get_many([KEY, "swarm:nothing:0"])
        assert both["swarm:nothing:0"] == {}
        assert len(both[KEY]) == 3
        assert await one.store(KEY, peer_id(one), record_of(one), 30.0) is False, (
            "an earlier expiration is not the latest"
        )
        assert await one.store(KEY, peer_id(one), bytes(2000), 45.0) is False
        assert await one.store(KEY, peer_id(one), record_of(one), 1000.0) is False
        assert await one.store(KEY, peer_id(two), record_of(one), 50.0) is False


async def test_a_node_works_alone_and_a_client_says_who_was_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{Identity.ephemeral().peer_id}"
    async with node() as alone, node(listen=False) as client:
        assert await alone.connect([dead]) == 0
        assert await alone.store(KEY, peer_id(alone), record_of(alone), 45.0)
        assert set(await alone.get(KEY)) == {peer_id(alone)}
        with pytest.raises(Unreachable, match="the initial peer has not answered") as caught:
            await client.connect([dead])
        assert dead in str(caught.value)
        assert await client.store(KEY, peer_id(alone), record_of(alone), 45.0) is False
        with pytest.raises(Unreachable, match="can't be read"):
            await client.get(KEY)
        with pytest.raises(ConfigError, match="bad peer address"):
            await client.connect(["junk"])
        assert await client.connect([dead, *addresses(alone)]) == 1
        assert set(await client.get(KEY)) == {peer_id(alone)}


async def test_announcer_and_view_meet_on_it() -> None:
    async with node() as one, node() as two, node(listen=False) as client:
        await two.connect(addresses(one))
        await client.connect(addresses(one))
        discovery = SETTINGS.discovery
        async with SwarmView(client, MODEL, 30, discovery, on_seen=client.remember) as view:
            async with Announcer(two, two._transport.identity, discovery) as announcer:
                assert await announcer.update(announcement(two._transport.local, "0:10"))
                await eventually(lambda: [str(a.layers) for a in view.announcements()] == ["0:10"])
                assert view.announcements()[0].peer == two._transport.local
                assert await announcer.update(announcement(two._transport.local, "20:30"))
                await eventually(lambda: [str(a.layers) for a in view.announcements()] == ["20:30"])
                await asyncio.sleep(0.6)
                assert view.age(two._transport.local.peer_id) < 1.5
            await eventually(lambda: view.announcements() == [])


# --- healing ---------------------------------------------------------------------------------------------------------


async def test_a_restarted_bootstrap_peer_is_found_again() -> None:
    identity = Identity.ephemeral()
    async with contextlib.AsyncExitStack() as first:
        transport = await first.enter_async_context(Libp2pTransport(identity, SETTINGS))
        await first.enter_async_context(Dht(transport, SETTINGS, check_record))
        address = transport.local.multiaddrs[0]
        async with node() as one, node() as two:
            await one.connect([address])
            await two.connect([address])
            await first.aclose()
            await asyncio.sleep(0.7)
            host = address.split("/p2p/")[0]
            same_port = replace(SETTINGS, network=NetworkSettings(host_maddrs=(host,)))
            async with (
                Libp2pTransport(identity, same_port) as transport,
                Dht(transport, SETTINGS, check_record) as bootstrap,
                node(listen=False) as newcomer,
            ):
                await eventually(lambda: bootstrap.peers == 2)
                assert await one.store(KEY, peer_id(one), record_of(one), 45.0)
                await newcomer.connect([address])
                assert set(await newcomer.get(KEY)) == {peer_id(one)}
                assert two.peers == 2


async def test_the_dht_goes_on_after_its_daemon_was_killed() -> None:
    async with node() as one, node() as two, node(listen=False) as client:
        await two.connect(addresses(one))
        await client.connect(addresses(one))
        transport = one._transport
        os.kill(transport.daemon_pid, signal.SIGKILL)
        await eventually(lambda: not transport.alive)
        assert await one.store(KEY, peer_id(one), record_of(one), 45.0) is False, "stored nowhere but here"
        with pytest.raises(Unreachable, match="can't be read"):
            await one.get(KEY)
        await eventually(lambda: transport.restarts == 1)
        assert await one.store(KEY, peer_id(one), record_of(one), 45.0)
        async with asyncio.timeout(12):  # the others dial again when libp2p's back-off from the dead address ends
            for reader in (two, client):
                while await seen_by(reader) != {peer_id(one)}:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)


async def test_a_peer_book_brings_a_node_back_without_initial_peers(tmp_path: Path) -> None:
    book = str(tmp_path / "deep" / "peers.json")
    async with node() as one:
        async with node(book=book) as two:
            two.remember(one._transport.local)
            await eventually(lambda: one.peers == 1 and two.peers == 1)
        async with node(book=book) as three:
            assert await three.connect([]) == 1, "at once"
            assert three.peers == 1
    for junk in ("", "{", '{"a": 1}', "[[1]]", '["junk"]'):
        Path(book).write_text(junk)  # noqa: ASYNC240
        async with node(book=book) as four:
            assert four.peers == 0


async def test_frozen_peers_cost_a_deadline_and_no_more() -> None:
    async with node() as one, node() as two, node() as frozen:
        await two.connect(addresses(one))
        await frozen.connect(addresses(one))
        await eventually(lambda: two.peers >= 1)
        pid = frozen._transport.daemon_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            start = time.monotonic()
            assert await two.store(KEY, peer_id(two), record_of(two), 45.0)
            assert set(await two.get(KEY)) == {peer_id(two)}
            assert time.monotonic() - start < 8
        finally:
            os.kill(pid, signal.SIGCONT)


# --- strangers -------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """hivemind's tuple extension, nested: 1.4 KiB that overflow the C stack of a stock node at 200."""
    data: bytes = msgpack.packb([])
    for _ in range(depth):
        data = msgpack.packb([msgpack.ExtType(0x40, data)])
    return data


def dictionary(entries: list[Any]) -> bytes:
    return bytes(msgpack.packb(msgpack.ExtType(0x50, msgpack.packb([None, math.inf, entries]))))


async def test_strangers_can_store_nothing_but_what_they_signed_themselves() -> None:
    async with node() as honest, node() as victim, node() as attacker:
        await attacker.connect(addresses(honest))
        await victim.connect(addresses(honest))
        assert await victim.store(KEY, peer_id(victim), record_of(victim), 45.0)
        now, key = time.time(), DHTID.generate(KEY).to_bytes()
        own, foreign = peer_id(attacker), peer_id(victim)
        good = msgpack.packb(record_of(attacker))
        stolen = msgpack.packb(record_of(victim))
        attacks: dict[str, tuple[bytes, bytes, float]] = {
            "nested value": (msgpack.packb(own), nested(200), now + 45),
            "nested subkey": (nested(200), good, now + 45),
            "nested dictionary": (b"", nested(200), now + 45),
            "nested in dictionary": (b"", dictionary([[own, nested(200), now + 45]]), now + 45),
            "extension in dictionary": (b"", msgpack.packb(msgpack.ExtType(0x50, nested(200))), now + 45),
            "one undecodable byte": (msgpack.packb(own), b"\xc1", now + 45),
            "plain value": (msgpack.packb(None), good, now + 45),
            "foreign subkey": (msgpack.packb(foreign), good, now + 100),
            "junk subkey": (b"\xff\xff", good, now + 45),
            "number as subkey": (msgpack.packb(7), good, now + 45),
            "stolen value": (msgpack.packb(own), stolen, now + 45),
            "kept alive for ever": (msgpack.packb(foreign), stolen, now + 3600),
            "infinite": (msgpack.packb(own), good, math.inf),
            "not a number": (msgpack.packb(own), good, math.nan),
            "far": (msgpack.packb(own), good, now + 200),
            "large": (msgpack.packb(own), msgpack.packb(bytes(900_000)), now + 45),
            "huge dictionary": (b"", dictionary([["x", b"", now + 45]] * (MAX_SUBKEYS + 1)), now + 45),
        }
        stub = attacker._dht.protocol.get_stub(PeerID.from_base58(peer_id(honest)))

        async def attack(keys: list[bytes], subkey: bytes, value: bytes, expiration: float) -> list[bool]:
            request = pb.StoreRequest(
                keys=keys,
                subkeys=[subkey] * len(keys),
                values=[value] * len(keys),
                expiration_time=[expiration] * len(keys),
                in_cache=[False] * len(keys),
                peer=attacker._dht.protocol.node_info,
            )
            try:
                return list((await stub.rpc_store(request, timeout=3)).store_ok)
            except Exception:  # refused as a whole: hivemind sends the error's text back
                return [False]

        for name, (subkey, value, expiration) in attacks.items():
            assert True not in await attack([key], subkey, value, expiration), name
        assert True not in await attack([key] * 300, msgpack.packb(own), good, now + 45), "too many at once"
        assert True not in await attack([b"x" * 40], msgpack.packb(own), good, now + 45), "malformed key"
        # of a dictionary with one good entry, the good entry is kept
        mixed = dictionary([[own, good, now + 45], [foreign, good, now + 99], ["junk", b"\xc1", now + 45]])
        await attack([key], b"", mixed, now + 45)
        start = time.monotonic()
        for reader in (honest, victim):
            assert set(await reader.get(KEY)) == {own, foreign}
        assert time.monotonic() - start < 2
        assert all(len(value) < 1000 for value, _ in (await victim.get(KEY)).values())


@pytest.mark.parametrize("junk", ["nested", "undecodable", "infinite", "plain", "crowd"])
async def test_a_replica_that_serves_junk_hides_nothing(junk: str) -> None:
    async with node() as honest, node() as liar, node(listen=False) as reader:
        await liar.connect(addresses(honest))
        assert await honest.store(KEY, peer_id(honest), record_of(honest), 45.0)
        now, own = time.time(), peer_id(liar)
        values = {
            "nested": nested(200),
            "undecodable": dictionary([[own, b"\xc1", now + 45]]),
            "infinite": dictionary([]),
            "plain": msgpack.packb(b"x"),
            "crowd": dictionary([[own, b"x", now + 45]] * (MAX_SUBKEYS + 1)),
        }

        async def rpc_find(request: Any, context: Any) -> Any:
            kind = pb.FOUND_REGULAR if junk == "plain" else pb.FOUND_DICTIONARY
            fakes = [PeerID.from_base58(Identity.ephemeral().peer_id) for _ in range(20)]
            result = pb.FindResult(
                type=kind,
                value=values[junk],
                expiration_time=math.inf,
                nearest_node_ids=[
                    (int.from_bytes(key, "big") ^ i).to_bytes(20, "big") for key in request.keys for i in range(20)
                ],
                nearest_peer_ids=[fake.to_bytes() for fake in fakes],
            )
            return pb.FindResponse(results=[result for _ in request.keys], peer=liar._dht.protocol.node_info)

        handlers = liar._transport.p2p._client.control.unary_handlers
        name = next(name for name in handlers if name.endswith("rpc_find"))

        async def unary(request: bytes, remote: Any) -> bytes:
            return bytes((await rpc_find(pb.FindRequest.FromString(request), None)).SerializeToString())

        handlers[name] = unary
        await reader.connect([*addresses(honest), *addresses(liar)])
        for _ in range(3):
            start = time.monotonic()
            assert set(await reader.get(KEY)) == {peer_id(honest)}
            assert time.monotonic() - start < 2.5


async def test_made_up_node_ids_are_ignored() -> None:
    async with node() as honest, node(listen=False) as attacker:
        await attacker.connect(addresses(honest))
        stub = attacker._dht.protocol.get_stub(PeerID.from_base58(peer_id(honest)))
        key = int.from_bytes(DHTID.generate(KEY).to_bytes(), "big")
        for i in range(20):
            await stub.rpc_ping(pb.PingRequest(peer=pb.NodeInfo(node_id=(key ^ i).to_bytes(20, "big"))), timeout=3)
        await asyncio.sleep(0.1)
        assert honest.peers == 0
        own = node_id_of(PeerID.from_base58(peer_id(attacker)).to_bytes())
        await stub.rpc_ping(pb.PingRequest(peer=pb.NodeInfo(node_id=own.to_bytes())), timeout=3)
        await eventually(lambda: honest.peers == 1)


async def test_a_key_takes_no_more_peers_than_fit_into_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_node, "MAX_SUBKEYS", 3)
    async with node() as one:
        crowd = [Identity.ephemeral() for _ in range(4)]
        records = [(i.peer_id, encode_announcement(announcement(PeerAddress(i.peer_id)), i)) for i in crowd]
        assert [await one.store(KEY, who, record, 45.0) for who, record in records] == [True, True, True, False]
        assert await one.store(KEY, records[0][0], records[0][1], 46.0), "those that are in may renew"
        assert len(await one.get(KEY)) == 3


def test_the_validator_never_raises_and_knows_its_clock() -> None:
    class Record:
        key, subkey, value, expiration_time = b"", msgpack.packb("x"), b"\xc1", 1.0

    validator = RecordValidator(lambda *_: 1 / 0 > 0, clock=lambda: 0.0)
    assert not validator.validate(Record())
    assert not validator.validate(None)
    identity = Identity.ephemeral()
    record = Record()
    record.subkey, record.value = msgpack.packb(identity.peer_id), msgpack.packb(b"v")
    assert not validator.validate(record)
    accept = RecordValidator(lambda *_: True, clock=lambda: 0.0)
    for expiration, good in ((119.0, True), (121.0, False), (math.nan, False), (math.inf, False)):
        record.expiration_time = expiration
        assert accept.validate(record) is good


def test_our_rpcs_have_a_name_of_their_own() -> None:
    assert SwarmDHTProtocol._get_handle_name(None, "rpc_find") == "SwarmDHTProtocol.rpc_find"
