"""Peers killed, frozen, drained in the middle of a generation: the route is mended and the tokens are the same."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest

from swarm.client import AsyncClient, connect_async
from swarm.config import RecoverySettings, Settings
from swarm.errors import NoRoute
from swarm.info import describe
from swarm.local import LocalSwarm
from swarm.multiaddrs import peer_address
from swarm.sampling import SamplingParams
from swarm.types import Hop, LayerRange, PeerId
from tests.live.helpers import (
    FROM_ELSEWHERE,
    MODEL,
    STORY,
    THIRDS,
    Reference,
    Watched,
    daemon_of,
    index_of,
    living,
    local_swarm,
    released,
    until,
    watch,
)
from tests.processes import is_gone

pytestmark = [pytest.mark.live, pytest.mark.timeout(90, func_only=True)]

TOKENS = 24
LAST_BUT_ONE = TOKENS - 2
GREEDY = {"temperature": 0.0, "seed": 0}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 31337}


@pytest.fixture(scope="module")
def swarm_of_six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    apart = {"SWARM_NETWORK_UNIX_SOCKETS": "false"}  # `swarm chaos` and the commands' tests break swarms of one machine
    with local_swarm(MODEL, [*THIRDS, *THIRDS], tmp_path_factory.mktemp("spares"), env=apart) as swarm:
        yield swarm


def restock(swarm: LocalSwarm, each: int) -> LocalSwarm:
    """At least so many living peers for each third, whatever the test before did."""
    missing = list(THIRDS) * each
    for peer in living(swarm):
        if peer.layers in missing:
            missing.remove(peer.layers)
    if missing:
        swarm.add(*missing)
    return swarm


@pytest.fixture
def spares(swarm_of_six: LocalSwarm) -> LocalSwarm:
    return restock(swarm_of_six, 2)


@pytest.fixture
def at_least_three(swarm_of_six: LocalSwarm) -> LocalSwarm:
    return restock(swarm_of_six, 1)


class Undisturbed:
    """What the whole model gives, in this process."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def tokens(self, prompt: Sequence[int], options: dict[str, float], count: int = TOKENS) -> list[int]:
        if not options["temperature"]:
            return self._reference.greedy(prompt, count)
        return self._reference.sampled(prompt, count, SamplingParams(**options))  # type: ignore[arg-type]


@pytest.fixture
def undisturbed(reference: Reference) -> Undisturbed:
    return Undisturbed(reference)


def story(client: AsyncClient, length: int = 100) -> list[int]:
    return client.tokenizer.encode(STORY)[:length]


def covered(ranges: Iterable[LayerRange]) -> list[int]:
    return sorted(layer for layers in ranges for layer in range(layers.start, layers.end))


def kill_process(swarm: LocalSwarm, peer_id: PeerId) -> int:
    """``kill -9`` to the peer alone, not to its daemon; the daemon's pid."""
    peer = swarm.peers[index_of(swarm, peer_id)]
    daemon = daemon_of(peer.pid)
    os.kill(peer.pid, signal.SIGKILL)
    return daemon


async def nothing_left(client: AsyncClient, swarm: LocalSwarm, daemons: Sequence[int]) -> None:
    await until(lambda: all(is_gone(daemon) for daemon in daemons), "daemons of killed peers ended", limit_s=10)
    await released(client, swarm)


async def test_a_frozen_peer_is_replaced_and_its_late_frames_do_no_harm(
    spares: LocalSwarm, undisturbed: Undisturbed
) -> None:
    frozen: list[int] = []

    def strike(index: int, seen: Watched) -> None:
        if index == 5:
            frozen.append(index_of(spares, seen.hops[1]))
            spares.freeze(frozen[0])
        if index == 12:
            spares.resume(frozen[0])

    try:
        async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
            prompt = story(client)
            seen = await watch(client, prompt, strike, max_tokens=TOKENS, **SAMPLED)
            assert seen.token_ids == undisturbed.tokens(prompt, SAMPLED)
            assert spares.peers[frozen[0]].peer_id not in seen.hops
            await released(client, spares)
    finally:
        for index in frozen:
            spares.resume(index)
    assert len(living(spares)) == 6


async def test_the_own_daemon_killed(spares: LocalSwarm, undisturbed: Undisturbed) -> None:
    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:

        def strike(index: int, seen: Watched) -> None:
            if index in (3, 12):
                os.kill(client.transport.daemon_pid, signal.SIGKILL)

        prompt = story(client)
        seen = await watch(client, prompt, strike, max_tokens=TOKENS, **GREEDY)
        assert seen.token_ids == undisturbed.tokens(prompt, GREEDY)
        assert client.transport.restarts == 2
        await released(client, spares)


async def test_the_daemon_of_a_peer_killed(spares: LocalSwarm, undisturbed: Undisturbed) -> None:
    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
        hit: list[PeerId] = []

        def strike(index: int, seen: Watched) -> None:
            if index == 5:
                hit.append(seen.hops[1])
                os.kill(daemon_of(spares.peers[index_of(spares, hit[0])].pid), signal.SIGKILL)

        prompt = story(client)
        seen = await watch(client, prompt, strike, max_tokens=TOKENS, **SAMPLED)
        assert seen.token_ids == undisturbed.tokens(prompt, SAMPLED)
        await released(client, spares)
        peer = spares.peers[index_of(spares, hit[0])]
        assert peer.alive
        description = await describe(client.transport, peer_address(peer.addresses[0]), FROM_ELSEWHERE)
        assert description.layers == peer.layers, "it is back under its old address"


@pytest.mark.parametrize(
    ("order", "options"),
    [((0, 1, 2), GREEDY), ((1, 2, 0), SAMPLED), ((2, 0, 1), GREEDY)],
    ids=["first-middle-last", "middle-last-first", "last-first-middle"],
)
async def test_every_position_killed_at_the_first_a_middle_and_the_last_but_one_token(
    spares: LocalSwarm, undisturbed: Undisturbed, order: tuple[int, ...], options: dict[str, float]
) -> None:
    moments = dict(zip((0, TOKENS // 2, LAST_BUT_ONE), order, strict=True))
    daemons: list[int] = []
    struck: list[Hop] = []

    def strike(index: int, seen: Watched) -> None:
        if index in moments:
            # by layer: where the ways between peers differ much, two may share one's layers, and the spare be in use
            layer = 5 + 10 * moments[index]
            struck.append(next(hop for hop in seen.route.hops if hop.layers.start <= layer < hop.layers.end))
            daemons.append(kill_process(spares, struck[-1].peer.peer_id))

    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
        prompt = story(client)
        # one token a round: with drafts, the last ones may come together and leave no work for a third route
        seen = await watch(client, prompt, strike, max_tokens=TOKENS, speculation="off", **options)
        assert seen.token_ids == undisturbed.tokens(prompt, options)
        assert seen.result is not None
        rebuilds = seen.result.rebuilds
        # The ring does not wait for its owner: when the last but one is heard of, the last may be past who dies then.
        past = struck[-1].peer.peer_id in {hop.peer_id for hop in seen.result.trace.last_hops}
        assert len(rebuilds) == 3 or (past and len(rebuilds) == 2)
        for rebuild, hop in zip(rebuilds, struck, strict=False):
            assert hop in rebuild.lost
            lost = [hop.layers for hop in rebuild.lost]
            replayed = [layers for layers, _ in rebuild.replayed]
            assert covered(replayed) == covered(lost), "only what was lost is computed again"
        await nothing_left(client, spares, daemons)
    assert len(living(spares)) == 3


async def test_every_position_killed_during_a_long_prefill(spares: LocalSwarm, undisturbed: Undisturbed) -> None:
    daemons: list[int] = []

    async def strike(index: int, seen: Watched) -> None:
        if index == -1 and len(daemons) < 3:  # a new route: the next position goes
            await asyncio.sleep(0.3)
            daemons.append(kill_process(spares, seen.hops[len(daemons)]))

    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
        prompt = story(client, 1000)
        seen = await watch(client, prompt, strike, max_tokens=6, **GREEDY)
        assert seen.token_ids == undisturbed.tokens(prompt, GREEDY, 6)
        assert seen.result is not None
        assert len(seen.result.rebuilds) == 3
        assert [rebuild.token_index for rebuild in seen.result.rebuilds] == [0, 0, 0], "all before the first token"
        await nothing_left(client, spares, daemons)


def interrupt(swarm: LocalSwarm, index: int) -> int | None:
    """Ctrl-C in the peer's terminal: SIGINT to its process group. Its exit code."""
    child = swarm.peers[index].child
    os.killpg(child.pid, signal.SIGINT)
    return child.wait(30)


async def test_peers_that_are_told_to_leave_hand_over(spares: LocalSwarm, undisturbed: Undisturbed) -> None:
    """The first of the route, which the ring leads to, by SIGTERM; and the last, which samples, by Ctrl-C."""
    moments = {3: (0, spares.drain), 40: (-1, partial(interrupt, spares))}
    count = 100
    leaving: list[asyncio.Task[int | None]] = []
    struck: list[Hop] = []
    daemons: list[int] = []

    def strike(index: int, seen: Watched) -> None:
        if index in moments:
            position, tell = moments[index]
            struck.append(seen.route.hops[position])
            victim = index_of(spares, struck[-1].peer.peer_id)
            daemons.append(daemon_of(spares.peers[victim].pid))
            leaving.append(asyncio.create_task(asyncio.to_thread(tell, victim)))

    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
        prompt = story(client)
        seen = await watch(client, prompt, strike, max_tokens=count, speculation="off", **GREEDY)
        assert seen.token_ids == undisturbed.tokens(prompt, GREEDY, count)
        assert await asyncio.gather(*leaving) == [0, 0]
        assert seen.result is not None
        first, second = seen.result.rebuilds
        assert struck[0] in first.lost
        assert struck[1] in second.lost
        assert all("leaving" in route.reason for route in seen.routes[1:])
        await nothing_left(client, spares, daemons)


async def test_two_neighbours_killed_at_once(spares: LocalSwarm, undisturbed: Undisturbed) -> None:
    daemons: list[int] = []

    def strike(index: int, seen: Watched) -> None:
        if index == 5:
            daemons.extend(kill_process(spares, seen.hops[position]) for position in (0, 1))

    async with connect_async(spares.initial_peers, settings=FROM_ELSEWHERE) as client:
        prompt = story(client)
        seen = await watch(client, prompt, strike, max_tokens=TOKENS, **SAMPLED)
        assert seen.token_ids == undisturbed.tokens(prompt, SAMPLED)
        assert len(seen.routes) > 1
        await nothing_left(client, spares, daemons)


async def test_a_session_waits_for_layers_that_nobody_has_and_says_so_in_the_end(
    at_least_three: LocalSwarm, undisturbed: Undisturbed
) -> None:
    """First with somebody who joins meanwhile, then without."""
    peers = at_least_three
    middle = THIRDS[1]
    joining: list[asyncio.Task[object]] = []

    def take_all(layers: LayerRange) -> None:
        for index, peer in enumerate(peers.peers):
            if peer.alive and peer.layers == layers:
                peers.kill(index)

    def strike(index: int, seen: Watched) -> None:
        if index == 3:
            take_all(middle)
            joining.append(asyncio.create_task(asyncio.to_thread(peers.add, middle)))

    async with connect_async(peers.initial_peers, settings=FROM_ELSEWHERE) as client:
        prompt = story(client)
        seen = await watch(client, prompt, strike, max_tokens=TOKENS, **GREEDY)
        assert seen.token_ids == undisturbed.tokens(prompt, GREEDY)
        await joining[0]

    impatient = replace(Settings(), recovery=RecoverySettings(wait_s=1.0))
    tokens: list[int] = []

    def strike_again(index: int, seen: Watched) -> None:
        tokens[:] = seen.token_ids
        if index == 3:
            take_all(middle)

    async with connect_async(peers.initial_peers, settings=impatient) as client:
        with pytest.raises(NoRoute, match="10:20"):
            await watch(client, prompt, strike_again, max_tokens=TOKENS, **GREEDY)
        assert tokens == undisturbed.tokens(prompt, GREEDY)[: len(tokens)]
        await released(client, peers)
    assert all(peer.layers != middle for peer in living(peers))
