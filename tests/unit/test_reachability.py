"""Whether a machine can be dialled: what a peer dials when asked, and what the asker says of it, in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import pytest

from peers.answers import Answers
from peers.dial_back import PER_MINUTE, Connect, DialBack, candidates
from peers.reachability import Reachability, find_out
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import Busy, NotAllowed, ProtocolError, Unreachable
from swarm.identity import Identity
from swarm.info import ask_to_dial_back
from swarm.protocol import decode, error_from_wire
from swarm.testing import Faults, SimNetwork, SimNode, SimTransport, run_virtual
from swarm.transport import INFO
from swarm.types import PeerAddress, PeerId

SETTINGS = Settings()
ME = Identity.ephemeral().peer_id
PUBLIC, INSIDE, ELSEWHERE = "/ip4/8.8.4.4/tcp", "/ip4/192.168.1.7/tcp", "/ip4/9.9.9.9/tcp"
RELAYED = f"/ip4/9.9.9.9/tcp/4001/p2p/{Identity.ephemeral().peer_id}/p2p-circuit"


class Dialled:
    """A dialler for which somebody answers at ``open_at``, and which remembers what it dialled."""

    def __init__(self, open_at: Sequence[str]) -> None:
        self.open_at, self.tried = open_at, list[str]()
        self.release = asyncio.Event()
        self.release.set()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Connect]:
        async def connect(peer: PeerAddress) -> None:
            await self.release.wait()
            assert peer.peer_id == ME
            self.tried.extend(peer.multiaddrs)
            if not set(peer.multiaddrs) <= set(self.open_at):
                raise Unreachable(f"can't reach peer {ME}: connection refused")

        yield connect


def asked(
    work: Callable[[SimTransport, SimNode, Dialled], Awaitable[None]],
    seen_at: str,
    announced: Sequence[str],
    open_at: Sequence[str],
) -> None:
    """``work`` with our transport, and a peer that dials back."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, other = network.add(ME), network.add(Identity.ephemeral().peer_id)
        own.seen_at, own.address = seen_at, PeerAddress(PeerId(ME), tuple(f"{a}/p2p/{ME}" for a in announced))
        dialled = Dialled(open_at)
        dial_back = DialBack(dialled, asyncio.get_running_loop().time)
        answers = Answers(pb.Description, lambda request: pb.RouteNews(), {}, None, dial_back, SETTINGS.timeouts)
        await SimTransport(other).serve(INFO, answers.handle)
        await work(SimTransport(own), other, dialled)

    run_virtual(main)


def told(seen_at: str, announced: Sequence[str], open_at: Sequence[str] = ()) -> Reachability:
    found: list[Reachability] = []

    async def work(transport: SimTransport, other: SimNode, dialled: Dialled) -> None:
        found.append(await find_out(transport, [other.address], SETTINGS))

    asked(work, seen_at, announced, open_at)
    return found[0]


def test_a_public_address_that_answers_can_be_dialled() -> None:
    found = told(f"{PUBLIC}/31330", [f"{PUBLIC}/31330"], [f"{PUBLIC}/31330"])
    assert found.dialled
    assert found.sentence.startswith(f"can be dialled at {PUBLIC}/31330: peer ")
    assert "announce" not in found.sentence
    assert "network" not in found.sentence


def test_a_port_that_works_and_is_not_announced_is_told() -> None:
    found = told(f"{PUBLIC}/50123", [f"{INSIDE}/31330"], [f"{PUBLIC}/31330"])
    assert found.dialled
    assert f"add --announce-maddrs {PUBLIC}/31330" in found.sentence


def test_a_name_is_announced_that_stands_for_the_address() -> None:
    found = told(f"{PUBLIC}/50123", ["/dns4/home.example/tcp/31330"], [f"{PUBLIC}/31330"])
    assert found.dialled
    assert "add --announce-maddrs" not in found.sentence


def test_behind_a_nat_the_port_to_forward_is_named() -> None:
    found = told(f"{PUBLIC}/50123", ["/ip4/127.0.0.1/tcp/31330", f"{INSIDE}/31330"])
    assert found.dialled is False
    assert "behind a NAT (router): forward tcp port 31330" in found.sentence
    assert f"--announce-maddrs {PUBLIC}/31330; or try --nat-port-map, or --use-relay" in found.sentence
    assert f"dialled {PUBLIC}/31330: can't reach it: connection refused. " in found.sentence


def test_a_public_address_that_does_not_answer_is_behind_a_firewall() -> None:
    found = told(f"{PUBLIC}/50123", [f"{PUBLIC}/31330"])
    assert found.dialled is False
    assert "A firewall is in between" in found.sentence
    assert "open tcp port 31330" in found.sentence


def test_within_a_network_that_is_said() -> None:
    found = told(f"{INSIDE}/31330", [f"{INSIDE}/31330"], [f"{INSIDE}/31330"])
    assert found.dialled
    assert "is in the same network" in found.sentence


def test_who_listens_on_the_loopback_only_needs_nobody_to_ask() -> None:
    found = told(f"{PUBLIC}/50123", ["/ip4/127.0.0.1/tcp/31330", "/ip6/::1/tcp/31330"])
    assert found.dialled is False
    assert "listens on the loopback only" in found.sentence


def test_a_peer_on_the_same_machine_can_not_tell() -> None:
    announced = ["/ip4/127.0.0.1/tcp/31330", f"{PUBLIC}/31330"]
    assert told("/ip4/127.0.0.1/tcp/50123", announced, ["/ip4/127.0.0.1/tcp/31330"]).dialled is None


def test_nor_can_one_that_sees_it_through_a_relay() -> None:
    found = told(RELAYED, [f"{INSIDE}/31330", RELAYED])
    assert found.dialled is None
    assert "through a relay only" in found.sentence


def test_without_an_answer_the_reason_is_told() -> None:
    async def work(transport: SimTransport, other: SimNode, dialled: Dialled) -> None:
        assert (await find_out(transport, [], SETTINGS)).dialled is None
        other.kill()
        found = await find_out(transport, [other.address], SETTINGS)
        assert found.dialled is None
        assert "can't be dialled" in found.sentence

    asked(work, PUBLIC, [f"{PUBLIC}/31330"], [])


def test_nobody_but_the_asker_is_ever_dialled() -> None:
    async def work(transport: SimTransport, other: SimNode, dialled: Dialled) -> None:
        await ask_to_dial_back(transport, other.address, SETTINGS)
        assert dialled.tried == [f"{PUBLIC}/80", f"{PUBLIC}/81"]
        stream = await transport.open(other.address, INFO)
        stranger = pb.DialMe(peer=pb.Address(peer_id=other.address.peer_id, multiaddrs=[f"{PUBLIC}/80"]))
        await stream.send(pb.InfoRequest(dial_me=stranger).SerializeToString())
        frame = await stream.receive()
        assert frame is not None
        assert isinstance(error_from_wire(decode(pb.InfoReply, frame).error), NotAllowed)
        assert len(dialled.tried) == 2

    asked(work, f"{PUBLIC}/50123", [f"{ELSEWHERE}/{port}" for port in (80, 81, 82)], [])


def test_one_at_a_time_and_so_many_a_minute() -> None:
    async def work(transport: SimTransport, other: SimNode, dialled: Dialled) -> None:
        dialled.release.clear()
        first = asyncio.create_task(ask_to_dial_back(transport, other.address, SETTINGS))
        await asyncio.sleep(1)
        with pytest.raises(Busy):
            await ask_to_dial_back(transport, other.address, SETTINGS)
        dialled.release.set()
        await first
        for _ in range(PER_MINUTE - 1):
            await ask_to_dial_back(transport, other.address, SETTINGS)
        with pytest.raises(Busy):
            await ask_to_dial_back(transport, other.address, SETTINGS)
        await asyncio.sleep(60)
        await ask_to_dial_back(transport, other.address, SETTINGS)
        assert len(dialled.tried) == PER_MINUTE + 1

    asked(work, f"{PUBLIC}/50123", [f"{PUBLIC}/31330"], [f"{PUBLIC}/31330"])


@pytest.mark.parametrize(
    "reply",
    [
        pb.DialledBack(seen_at="\x1b[2J"),
        pb.DialledBack(seen_at=f"{PUBLIC}/1", dials=[pb.Dial(multiaddr="/unix/etc")]),
        pb.DialledBack(seen_at=f"{PUBLIC}/1", dials=[pb.Dial(multiaddr=f"{ELSEWHERE}/1")]),
        pb.DialledBack(seen_at="/dns4/a/tcp/1", dials=[pb.Dial(multiaddr="/dns4/a/tcp/1")]),
        pb.DialledBack(seen_at=f"{PUBLIC}/1", dials=[pb.Dial(multiaddr=f"{PUBLIC}/1", error="x")] * 50),
    ],
)
def test_what_is_no_address_is_not_believed(reply: pb.DialledBack) -> None:
    async def work(transport: SimTransport, other: SimNode, dialled: Dialled) -> None:
        async def lie(stream: object) -> None:
            await stream.send(pb.InfoReply(dialled_back=reply).SerializeToString())  # type: ignore[attr-defined]
            with suppress(Exception):
                await stream.receive()  # type: ignore[attr-defined]

        await SimTransport(other).serve(INFO, lie)
        with pytest.raises(ProtocolError):
            await ask_to_dial_back(transport, other.address, SETTINGS)

    asked(work, f"{PUBLIC}/1", [f"{PUBLIC}/1"], [])


def test_candidates_are_ports_at_one_host() -> None:
    announced = [f"{INSIDE}/31330/p2p/{ME}", f"{PUBLIC}/31330", f"/ip4/10.0.0.1/udp/7/quic-v1/p2p/{ME}", RELAYED]
    assert candidates("/ip6/2001:db8::1/tcp/9", announced) == [
        "/ip6/2001:db8::1/tcp/31330",
        "/ip6/2001:db8::1/udp/7/quic-v1",
    ]
    assert candidates(RELAYED, announced) == []
    with pytest.raises(ProtocolError):
        candidates(f"{PUBLIC}/1", ["/unix/etc"])
    with pytest.raises(ProtocolError):
        candidates("", announced)
