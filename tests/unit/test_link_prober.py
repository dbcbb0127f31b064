"""Whom a peer measures, when, and what it tells of it, on a network in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import pytest

from peers.line import FEWEST_ROWS, FIRST_BYTES, FRAME_S, LEAD_S, RATE_S, SAMPLES, Measured
from peers.link_prober import AGAIN_S, MOST_REPORTS, LinkProber, worth_measuring
from peers.links import MOST_MEASURED, Links
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import DeadlineExceeded, StreamLost, Unreachable
from swarm.protocol import decode
from swarm.testing import Directory, Faults, SimNetwork, SimTransport, run_virtual
from swarm.transport import LINK, Stream
from swarm.types import Announcement, LayerRange, ModelId, PeerAddress, PeerId, PeerState

T = TypeVar("T")
ONE_WAY_S = 0.02
SETTINGS = Settings()
OWN = PeerId("own")


def announced(name: str, layers: str, state: PeerState = PeerState.SERVING) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(name)),
        model=ModelId("toy@0"),
        layers=LayerRange.parse(layers),
        state=state,
        version="0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=1000,
    )


async def answer_pings(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(pb.LinkMessage(pong=decode(pb.LinkMessage, frame).ping).SerializeToString())


async def stay_silent(stream: Stream) -> None:
    while await stream.receive() is not None:
        pass


def with_links(work: Callable[[Links, SimNetwork], Awaitable[T]]) -> T:
    """Our own links in a network with two peers that answer and one that doesn't; virtual time."""

    async def main() -> T:
        network = SimNetwork(random.Random(1), Faults(latency_s=(ONE_WAY_S, ONE_WAY_S)))
        own = SimTransport(network.add(OWN))
        for name, handler in (("near", answer_pings), ("far", answer_pings), ("silent", stay_silent)):
            await SimTransport(network.add(name)).serve(LINK, handler)
        async with asyncio.TaskGroup() as tasks:
            links = Links(own, tasks, SETTINGS.timeouts, lambda *_: None, lambda *_: None)
            try:
                return await work(links, network)
            finally:
                await links.aclose()

    return run_virtual(main)


def test_a_probe_measures_the_link_and_keeps_it_open() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        near = network.nodes[PeerId("near")]
        await links.probe(near.address)
        assert links.one_way_s(PeerId("near")) == pytest.approx(ONE_WAY_S)
        assert links.measured[PeerId("near")].jitter_s == pytest.approx(0.0, abs=1e-6)
        assert links.used_at(PeerId("near")) == 0.0, "a probe is no use"
        assert len(near.streams) == 1
        await asyncio.sleep(SETTINGS.timeouts.link_idle_s + 2)
        assert not near.streams, "it is closed when nobody wants it"
        assert links.one_way_s(PeerId("near")) == pytest.approx(ONE_WAY_S), "but remembered"

    with_links(work)


def test_pings_that_met_a_busy_process_say_nothing_of_the_link() -> None:
    measured = Measured()
    for at, round_trip_s in enumerate((0.05, 0.03, 0.002, 0.04, 0.002, 0.002, 0.06, 0.03)):
        measured.add(round_trip_s, float(at))
    assert measured.one_way_s == 0.001
    for at in range(SAMPLES):
        measured.add(0.1, 10.0 + at)
    assert measured.one_way_s == 0.05, "but one that is slow is slow"


def test_a_probe_of_a_silent_peer_ends() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        with pytest.raises(DeadlineExceeded):
            await links.probe(network.nodes[PeerId("silent")].address)
        with pytest.raises(Unreachable):
            await links.probe(PeerAddress(PeerId("nobody")))
        assert not links.measured

    with_links(work)


def frame_of(size_bytes: int) -> pb.LinkMessage:
    return pb.LinkMessage(frame=pb.Frame(want_ack=True, hidden=pb.Tensor(data=bytes(size_bytes))))


def test_frames_of_a_prompt_tell_how_fast_a_line_is_and_fill_it_no_more_than_that_takes() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        near, clock = network.nodes[PeerId("near")], asyncio.get_running_loop().time
        network.bytes_per_s[OWN, PeerId("near")] = rate = 100_000.0
        await links.probe(near.address)
        began, size = clock(), 25_000
        assert links.frame_rows(PeerId("near"), 1000) == FIRST_BYTES // 1000
        for _ in range(20):
            await links.send(near.address, frame_of(size))
            link = links._links[PeerId("near")]
            assert link.line.under_way_bytes <= max(FIRST_BYTES, (LEAD_S + 2 * ONE_WAY_S) * rate * 1.1)
        known = links.measured[PeerId("near")]
        assert known.bytes_per_s == pytest.approx(rate, rel=0.05)
        assert known.one_way_s == pytest.approx(ONE_WAY_S, rel=0.05), "pings behind frames say nothing of the way"
        assert links.frame_rows(PeerId("near"), 1000) == int(FRAME_S * known.bytes_per_s) // 1000
        assert links.frame_rows(PeerId("near"), 10**6) == FEWEST_ROWS
        directory = Directory({near.address.peer_id: announced("near", "0:6")})
        [report] = LinkProber(links, directory, OWN, LayerRange(0, 3), 6, SETTINGS).reports()
        assert report.bytes_per_s == known.bytes_per_s
        assert clock() - began > 20 * size / rate - LEAD_S - 1, "they waited for their turns"
        await asyncio.sleep(1)
        assert not link.line.under_way_bytes
        assert clock() - began < 20 * size / rate + 2, "and the line was never idle"

    with_links(work)


@pytest.mark.parametrize(
    ("taken_s", "told"),
    [
        pytest.param([0.25] * 3, 100e3, id="slow"),
        pytest.param([0.25, 0.0, 0.25, 0.3], 100e3, id="two pongs at once"),
        pytest.param([0.01, 0.05, 0.02], 0.0, id="fast, or a busy process"),
        pytest.param([0.25, *[0.01] * 8], 0.0, id="faster by now"),
    ],
)
def test_a_line_is_told_to_be_slow_when_its_frames_took_long(taken_s: list[float], told: float) -> None:
    measured = Measured()
    for at, frame_s in enumerate(taken_s):
        measured.add_rate(25_000, frame_s, float(at))
    assert measured.told_bytes_per_s(now=10.0) == pytest.approx(told)
    assert measured.bytes_per_s >= told
    assert measured.told_bytes_per_s(now=10.0 + RATE_S) == 0.0, "it may be faster by now"


def test_a_frame_whose_sender_goes_while_it_is_written_holds_nobody_up() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        near = network.nodes[PeerId("near")]
        await links.reach(near.address)
        stream = links._links[PeerId("near")].stream
        works = stream.send

        async def write_and_wait(frame: bytes) -> None:
            await works(frame)
            await asyncio.sleep(9)

        stream.send = write_and_wait  # type: ignore[method-assign]
        sender = asyncio.create_task(links.send(near.address, frame_of(FIRST_BYTES)))
        await asyncio.sleep(3)
        stream.send = works  # type: ignore[method-assign]
        sender.cancel()
        async with asyncio.timeout(1):
            await links.send(near.address, frame_of(FIRST_BYTES))

    with_links(work)


def test_who_waits_for_a_line_that_is_lost_hears_of_it() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        silent = network.nodes[PeerId("silent")]
        sending = [asyncio.create_task(links.send(silent.address, frame_of(FIRST_BYTES))) for _ in range(3)]
        results = await asyncio.gather(*sending, return_exceptions=True)
        assert [type(result) for result in results] == [type(None), StreamLost, StreamLost]

    with_links(work)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.links.MOST_MEASURED", 1)

    async def work(links: Links, network: SimNetwork) -> None:
        for name in ("near", "far"):
            await links.probe(network.nodes[PeerId(name)].address)
        assert set(links.measured) == {"far"}

    with_links(work)
    assert MOST_MEASURED >= 8 * MOST_REPORTS


def test_newcomers_are_measured_within_seconds_and_everybody_again_after_the_period() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        view = Directory()
        prober = LinkProber(links, view, OWN, LayerRange(0, 5), 10, SETTINGS)
        running = asyncio.create_task(prober.run())
        await asyncio.sleep(3)
        assert prober.reports() == ()
        for name in ("near", "silent"):
            view.known[PeerId(name)] = announced(name, "5:10")
        async with asyncio.timeout(5):
            await prober.news.wait()
        assert [(r.peer, r.seconds) for r in prober.reports()] == [("near", pytest.approx(ONE_WAY_S))]
        first = links.measured[PeerId("near")].at
        await asyncio.sleep(AGAIN_S + 3)
        second = links.measured[PeerId("near")].at
        assert second > first + AGAIN_S - 0.1, "once more when it has started"
        await asyncio.sleep(SETTINGS.discovery.ping_period_s)
        assert links.measured[PeerId("near")].at > second + SETTINGS.discovery.ping_period_s - 0.1
        network.nodes[PeerId("near")].kill()
        await asyncio.sleep(2 * SETTINGS.discovery.ping_period_s)
        assert prober.reports() == (), "what is old is not told"
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    with_links(work)


def test_who_is_gone_is_not_told_of() -> None:
    async def work(links: Links, network: SimNetwork) -> None:
        view = Directory({PeerId(name): announced(name, "5:10") for name in ("near", "far")})
        prober = LinkProber(links, view, OWN, LayerRange(0, 5), 10, SETTINGS)
        await prober.look()
        assert {report.peer for report in prober.reports()} == {"near", "far"}
        del view.known[PeerId("far")]
        assert {report.peer for report in prober.reports()} == {"near"}

    with_links(work)


def test_followers_come_first_others_are_not_forgotten_and_the_number_is_bounded() -> None:
    followers = [announced(f"follower {n}", "3:9") for n in range(20)]
    others = [announced(f"other {n}", "0:5") for n in range(20)]
    leaving = [announced("leaving", "5:10", PeerState.DRAINING)]
    for own in ("a", "b"):
        chosen = worth_measuring(PeerId(own), LayerRange(0, 5), 10, [*others, *leaving, *followers])
        names = [peer.peer_id for peer in chosen]
        assert [name.split()[0] for name in names] == ["follower"] * 6 + ["other"] * 2
        assert chosen == worth_measuring(PeerId(own), LayerRange(0, 5), 10, [*followers, *others])
    assert len(worth_measuring(OWN, LayerRange(0, 5), 10, followers)) == MOST_REPORTS
    ring = worth_measuring(OWN, LayerRange(5, 10), 10, [announced("first", "0:5"), announced(OWN, "5:10")])
    assert [peer.peer_id for peer in ring] == ["first"]
