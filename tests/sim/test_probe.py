"""Peers are used once somebody has probed their layers: the real prober and joiner on the network in memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine

import pytest

from peers.executor import Executor
from peers.probe import Vouching, obtain_voucher
from peers.service import PeerService
from swarm.admission import check_announcement, is_signed
from swarm.config import PolicySettings
from swarm.errors import NotAdmitted, Unreachable
from swarm.identity import Identity
from swarm.testing import SimTransport, ToyDecoder
from swarm.types import LayerRange, PeerAddress, PeerState, Voucher
from tests.sim.world import NUM_LAYERS, PROFILE, SETTINGS, SimPeer, ToyExecutor, World, run_virtual

WHOLE = LayerRange(0, NUM_LAYERS)


class ProbedWorld(World):
    """Peers have real keys, vouch for each other, and planners look at it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.directory.check = lambda a: check_announcement(PolicySettings(), a)
        self.identities: dict[str, Identity] = {}
        self.knock_fails = False
        self.borrowed: list[LayerRange] = []

    async def join(self, layers: LayerRange, *, weights_seed: int | None = None) -> SimPeer:
        """As ``peers.tenure`` does: announced as joining, probed, serving. Raises ``NotAdmitted``."""
        identity = Identity.ephemeral()
        self.identities[identity.peer_id] = identity
        node = self.network.add(identity.peer_id)
        seed = self.seed if weights_seed is None else weights_seed
        executor = ToyExecutor(node, ToyDecoder(NUM_LAYERS, 64, seed), layers, self.rng)
        honest = ToyDecoder(NUM_LAYERS, 64, self.seed)

        @contextlib.asynccontextmanager
        async def borrow(wanted: LayerRange) -> AsyncIterator[Executor]:
            self.borrowed.append(wanted)
            yield ToyExecutor(node, honest, wanted, self.rng)

        async def knock(peer: PeerAddress) -> None:
            if self.knock_fails:
                raise Unreachable("nothing listens there")

        vouching = Vouching(identity, borrow, knock)
        service = PeerService(SimTransport(node), executor, self.directory, SETTINGS, None, vouching)
        peer = await self.start(node, executor, service)
        self.announce(peer, PeerState.JOINING)
        voucher = await obtain_voucher(
            SimTransport(node), self.directory.announcements(), PROFILE, layers, identity, SETTINGS
        )
        self.announce(peer, voucher=voucher)
        return peer

    def voucher_of(self, peer: SimPeer) -> Voucher:
        voucher = self.directory.known[peer.node.address.peer_id].voucher
        assert voucher is not None
        return voucher

    async def tokens(self, count: int = 8) -> tuple[list[int], set[str]]:
        """A generation, and the peers that took part."""
        outcome = await self.generate([3, 1, 4], count)
        if outcome.error is not None:
            raise outcome.error
        return outcome.tokens, {hop.peer.peer_id for route in outcome.routes for hop in route.route.hops}


def in_world(test: Callable[[ProbedWorld], Coroutine[None, None, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def wrapped() -> None:
        async def body() -> None:
            world = ProbedWorld(seed=5)
            await test(world)
            await world.settle()

        run_virtual(body)

    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped


@in_world
async def test_the_first_peer_vouches_for_itself_and_the_next_is_vouched_for_by_the_first(world: ProbedWorld) -> None:
    first = await world.join(WHOLE)
    second = await world.join(LayerRange(2, 5))
    assert world.voucher_of(first).verifier == first.node.address.peer_id
    assert world.voucher_of(second).verifier == first.node.address.peer_id
    assert world.borrowed == [], "the first has those layers itself"
    for peer, layers in ((first, WHOLE), (second, LayerRange(2, 5))):
        subject = peer.node.address.peer_id
        assert is_signed(world.voucher_of(peer), subject, PROFILE.model_id, layers)
        assert not is_signed(world.voucher_of(peer), subject, PROFILE.model_id, LayerRange(0, 2))
    assert not is_signed(world.voucher_of(second), first.node.address.peer_id, PROFILE.model_id, LayerRange(2, 5))


@in_world
async def test_a_verifier_without_the_layers_borrows_one_of_them(world: ProbedWorld) -> None:
    first = await world.join(LayerRange(0, 3))
    second = await world.join(LayerRange(3, 6))
    assert world.voucher_of(second).verifier == first.node.address.peer_id
    assert [len(layers) for layers in world.borrowed] == [1]
    assert LayerRange(3, 5).covers(world.borrowed[0]), "not the last layer, whose table is large"
    assert first.service.table.budget.used_bytes == 0, "the room for it was given back"


@pytest.mark.parametrize("layers", [WHOLE, LayerRange(1, 4), LayerRange(3, 5)])
def test_wrong_weights_never_enter_a_route(layers: LayerRange) -> None:
    @in_world
    async def body(world: ProbedWorld) -> None:
        honest = [await world.join(part) for part in (LayerRange(0, 3), LayerRange(3, 6))]
        with pytest.raises(NotAdmitted, match="other numbers than this model's"):
            await world.join(layers, weights_seed=99)
        for peer in honest:
            peer.executor.layer_s = 1.0  # the wrong one would be much faster
            world.announce(peer, voucher=world.voucher_of(peer))
        tokens, used = await world.tokens()
        assert tokens == world.decoder.generate([3, 1, 4], 8, world.seed, frozenset())
        assert used == {peer.node.address.peer_id for peer in honest}

    body()


@in_world
async def test_a_ghost_never_enters_a_route(world: ProbedWorld) -> None:
    """It announces itself, even as serving, and does not answer."""
    honest = await world.join(WHOLE)
    ghost = await world.add_peer(LayerRange(0, 6))
    ghost.executor.layer_s = 1e-6
    ghost.node.kill()
    world.announce(ghost)
    _, used = await world.tokens()
    assert used == {honest.node.address.peer_id}


@in_world
async def test_who_can_not_be_reached_is_told_so(world: ProbedWorld) -> None:
    await world.join(WHOLE)
    world.knock_fails = True
    with pytest.raises(NotAdmitted, match="can't be reached where it says it is"):
        await world.join(LayerRange(2, 5))


@in_world
async def test_a_peer_that_finds_only_dead_verifiers_vouches_for_itself(world: ProbedWorld) -> None:
    first = await world.join(WHOLE)
    first.node.kill()
    second = await world.join(WHOLE)
    assert world.voucher_of(second).verifier == second.node.address.peer_id


@in_world
async def test_one_stranger_does_not_end_a_peer_that_vouched_for_itself_and_two_do(world: ProbedWorld) -> None:
    first = await world.join(WHOLE)
    identity = world.identities[first.node.address.peer_id]

    async def probed_by_stranger(number: int) -> Voucher:
        with pytest.raises(NotAdmitted):
            await world.join(WHOLE, weights_seed=90 + number)
        world.announce(world.peers[-1])  # as if it had been admitted
        given = world.directory.announcements(), PROFILE, WHOLE, identity, SETTINGS
        return await obtain_voucher(SimTransport(first.node), *given, serving=True)

    assert (await probed_by_stranger(1)).verifier == identity.peer_id
    with pytest.raises(NotAdmitted, match="other numbers than this model's"):
        await probed_by_stranger(2)


@in_world
async def test_ten_joiners_at_once_are_all_vouched_for(world: ProbedWorld) -> None:
    first = await world.join(WHOLE)
    joined = await asyncio.gather(*(world.join(LayerRange(1, 4)) for _ in range(10)))
    others = {world.voucher_of(peer).verifier for peer in joined} - {first.node.address.peer_id}
    assert others <= {peer.node.address.peer_id for peer in joined}
    assert sum(world.voucher_of(peer).verifier == first.node.address.peer_id for peer in joined) >= 8
