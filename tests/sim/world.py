"""A simulated swarm: the real session and stage code on the network, clock and decoder of ``swarm.testing``."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace

import swarm.config as config
from peers import drafting
from peers.executor import Cache, Done, StepReply, StepRequest
from peers.service import PeerService
from swarm import kv
from swarm.errors import BadTensor, Cancelled, SwarmError
from swarm.health import Health
from swarm.models import ModelProfile
from swarm.sampling import SampleResult, SamplingParams
from swarm.session import Generated, GenerationRequest, RouteChanged, Session
from swarm.testing import (
    BROKEN_ROW,
    Directory,
    Faults,
    SimNetwork,
    SimNode,
    SimTransport,
    ToyCache,
    ToyDecoder,
    run_virtual,
)
from swarm.types import Announcement, LayerRange, ModelId, PeerState, Voucher
from swarm.wire import MODEL, encoding_of, row_bytes

NUM_LAYERS = 6
VOCAB = 64
SETTINGS = replace(
    config.Settings(),
    engine=config.EngineSettings(prefill_chunk_tokens=4, replay_chunk_tokens=6),
    timeouts=replace(config.TimeoutSettings(), session_idle_s=60.0),
    recovery=config.RecoverySettings(wait_s=30.0, max_rebuilds=32),
)
PROFILE = ModelProfile(
    model_id=ModelId("toy@0"),
    name="toy",
    architecture="toy",
    num_layers=NUM_LAYERS,
    hidden_size=2,
    vocab_size=VOCAB,
    num_kv_heads=1,
    head_dim=1,
    max_positions=512,
    dtype="float32",
    end_ids=(),
    layer_bytes=1,
    embedding_bytes=1,
    head_bytes=1,
)


def toy_sample(token_id: int, position: int) -> SampleResult:
    """With log-probabilities that tell token and position."""
    value = -(token_id + 64 * (position % 32)) / 8
    return SampleResult(token_id, value, ((token_id, value), ((token_id + 1) % VOCAB, value - 1)))


class ToyExecutor:
    """One simulated device: steps run one after another and take virtual time."""

    def __init__(self, node: SimNode, decoder: ToyDecoder, layers: LayerRange, rng: random.Random) -> None:
        self.node, self.decoder, self.layers, self.rng = node, decoder, layers, rng
        self.profile = PROFILE
        self.layer_s = rng.uniform(0.001, 0.01)
        self.lies = False
        self.drafts_right = self.passes = 0
        self.positions_run: dict[int, Counter[tuple[int, int]]] = {}
        """For each cache, how often each position was computed after the same tokens."""
        self.kinds: list[str] = []
        """How sessions had their keys and values kept here."""
        self._device = asyncio.Lock()
        self._waiting: dict[asyncio.Task[None], tuple[Cache, Done]] = {}

    @property
    def kv_block(self) -> int:
        return 4

    def new_cache(self, layers: LayerRange, capacity: int, kind: str = kv.MODEL) -> ToyCache:
        self.kinds.append(kind)
        return ToyCache(layers, capacity)

    def copy_cache(self, cache: Cache, length: int, capacity: int) -> ToyCache:
        assert isinstance(cache, ToyCache)
        columns = {layer: column[:length] for layer, column in cache.prefix.items()}
        return ToyCache(cache.layers, capacity, length, prefix=columns)

    def cache_bytes(self, layers: LayerRange, positions: int, kind: str = kv.MODEL) -> int:
        return 16 * len(layers) * -(-positions // self.kv_block) * self.kv_block

    def forget(self, cache: Cache) -> None:
        for task, (held, done) in list(self._waiting.items()):
            if held is cache:
                del self._waiting[task]
                task.cancel()
                done(Cancelled("forgotten"))

    def submit(self, step: StepRequest, done: Done) -> None:
        task = asyncio.ensure_future(self._answer(step, done))
        self._waiting[task] = step.cache, done
        self.node.tasks.add(task)
        task.add_done_callback(self.node.tasks.discard)

    async def _answer(self, step: StepRequest, done: Done) -> None:
        try:
            reply: StepReply | SwarmError = await self._run(step)
        except SwarmError as error:
            reply = error
        done(reply)

    async def _run(self, step: StepRequest) -> StepReply:
        async with self._device:
            del self._waiting[asyncio.current_task()]  # type: ignore[arg-type]
            await asyncio.sleep(self.layer_s * len(step.layers) * (1 + step.rows / 8))
            await self.node.awake()
        self.passes += 1
        return self.computed(step)

    async def hang(self) -> None:
        """Compute nothing more; the peer beats as before."""
        await self._device.acquire()

    def computed(self, step: StepRequest) -> StepReply:
        assert isinstance(step.cache, ToyCache)
        came, goes = (row_bytes(encoding_of(wire, "float32"), 2) for wire in (step.input_wire, step.output_wire))
        if step.hidden is not None and BROKEN_ROW[:came] in step.hidden:
            raise BadTensor("hidden states that are not finite")
        if step.token_ids is not None:
            rows = list(step.token_ids)
        else:
            assert step.hidden is not None
            rows = ToyDecoder.from_wire(step.hidden, came)
        states = self.decoder.run(step.layers, step.cache, step.start, rows)
        column = step.cache.prefix[step.layers.start]
        done = [(position, column[position]) for position in range(step.start, step.start + len(rows))]
        self.positions_run.setdefault(step.cache.serial, Counter()).update(done)
        tokens: tuple[SampleResult, ...] = ()
        if step.sample is not None:
            wanted, first = step.sample, len(rows) - step.sample.rows
            assert len(wanted.history) == step.start + first + 1, "the sampler must know every token before"
            tokens = drafting.verified(
                wanted,
                lambda row, known: toy_sample(
                    self.decoder.token(states[first + row], wanted.params.seed, known), len(known)
                ),
            )
            self.drafts_right += len(tokens) - 1
        last = step.layers.end == NUM_LAYERS
        hidden = b"" if last and not step.want_hidden else ToyDecoder.to_wire(states, goes)
        logits = self.decoder.logits(states[-step.logit_rows :]) if step.logit_rows else b""
        if self.lies and hidden:
            hidden = hidden[:-goes] + BROKEN_ROW[:goes]
        return StepReply(hidden, tokens, logits, 0.0, 0.0, 1)


@dataclass
class SimPeer:
    node: SimNode
    executor: ToyExecutor
    service: PeerService
    life: asyncio.Task[None]


@dataclass
class Outcome:
    tokens: list[int]
    routes: list[RouteChanged]
    session: Session
    no_kv_cache: bool
    error: SwarmError | None = None
    drafts_right: int = 0
    """Tokens that were guessed before they were sampled."""

    @property
    def cuts(self) -> list[int]:
        """Layers before which rows were rounded: those between the hops of the first route, if any."""
        request = self.session.transcript.request
        return [hop.layers.start for hop in self.routes[0].route.hops[1:]] if request.wire.name != MODEL else []


@dataclass
class World:
    """One swarm and one owner; ``at_token`` maps an index of a generated token to what happens then."""

    seed: int
    faults: Faults = field(default_factory=Faults)
    settings: config.Settings = SETTINGS
    echo: float = 0.0
    """How repetitive the text is."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.decoder = ToyDecoder(NUM_LAYERS, VOCAB, self.seed, self.echo)
        self.network = SimNetwork(self.rng, self.faults)
        self.directory = Directory()
        self.peers: list[SimPeer] = []
        self.owner = self.network.add("owner")
        self._tasks: set[asyncio.Task[None]] = set()
        self.health = Health(self.settings.recovery.max_penalty_s)

    async def add_peer(self, layers: LayerRange) -> SimPeer:
        node = self.network.add(f"peer{len(self.peers)}")
        executor = ToyExecutor(node, self.decoder, layers, self.rng)
        service = PeerService(SimTransport(node), executor, self.directory, self.settings)
        peer = await self.start(node, executor, service)
        self.announce(peer)
        return peer

    async def start(self, node: SimNode, executor: ToyExecutor, service: PeerService) -> SimPeer:
        """A peer that nobody knows yet."""
        started = asyncio.Event()

        async def live() -> None:
            async with service:
                started.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(live())
        node.tasks.add(task)
        await started.wait()
        peer = SimPeer(node, executor, service, task)
        self.peers.append(peer)
        return peer

    def announce(self, peer: SimPeer, state: PeerState = PeerState.SERVING, voucher: Voucher | None = None) -> None:
        self.directory.known[peer.node.address.peer_id] = Announcement(
            peer=peer.node.address,
            model=PROFILE.model_id,
            layers=peer.executor.layers,
            state=state,
            version="0",
            decode_s_per_layer=peer.executor.layer_s,
            prefill_s_per_token_layer=peer.executor.layer_s / 8,
            kv_tokens_free=10000,
            voucher=voucher,
        )

    def later(self, delay_s: float, action: Coroutine[None, None, object]) -> None:
        """Do ``action`` after a while."""

        async def act() -> None:
            await asyncio.sleep(delay_s)
            await action

        task = asyncio.create_task(act())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def peer_of(self, session: Session, index: int) -> SimPeer:
        hops = session.route.hops
        hop = hops[index % len(hops)]
        return next(peer for peer in self.peers if peer.node.address == hop.peer)

    def kill(self, peer: SimPeer, *, forget: bool) -> None:
        peer.node.kill()
        if forget:
            self.directory.known.pop(peer.node.address.peer_id, None)

    def drain(self, peer: SimPeer) -> None:
        peer.service.drain()
        self.announce(peer, PeerState.DRAINING)

    async def generate(self, prompt: list[int], max_tokens: int, schedule: object = None, **extra: object) -> Outcome:
        """``schedule(session, index)`` is called before token ``index`` is looked at; index -1: at the first route."""
        request = GenerationRequest(
            prompt=tuple(prompt),
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0.0, seed=self.seed, logprobs=2),
            end_ids=frozenset(),
            **extra,  # type: ignore[arg-type]
        )
        tokens: list[int] = []
        routes: list[RouteChanged] = []
        transport = SimTransport(self.owner)
        session = Session(transport, self.directory, PROFILE, request, self.settings, self.health)
        error = None
        try:
            async with session:
                async for event in session.events():
                    if isinstance(event, Generated):
                        assert event.index == len(tokens), "tokens come once and in order"
                        tokens.append(event.token_id)
                        told = toy_sample(event.token_id, len(prompt) + event.index)
                        assert (event.logprob, event.top_logprobs) == (told.logprob, told.top), "of this very token"
                    else:
                        routes.append(event)
                    if callable(schedule):
                        schedule(session, len(tokens) - 1)
        except SwarmError as caught:
            error = caught
        right = sum(peer.executor.drafts_right for peer in self.peers)
        return Outcome(tokens, routes, session, request.no_kv_cache, error, right)

    async def settle(self) -> None:
        """Everything that was reserved is released, on every peer that lives."""
        for peer in self.peers:
            peer.node.resume()
        for a, b in [tuple(pair) for pair in self.network.cut]:
            self.network.heal(a, b)
        await asyncio.sleep(2 * self.settings.timeouts.owner_grace_s + 2 * self.settings.timeouts.connect_s)
        for peer in self.peers:
            if peer.node.alive:
                assert not peer.service.table.runners, f"{peer.node.address.peer_id} still holds stages"
                assert peer.service.table.budget.used_bytes == 0, "reserved bytes were not released"
        for peer in self.peers:
            peer.life.cancel()
        await asyncio.gather(*(peer.life for peer in self.peers), return_exceptions=True)


__all__ = ["NUM_LAYERS", "Faults", "LayerRange", "Outcome", "SimPeer", "World", "run_virtual"]
