from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peers.checkpoints import CheckpointLog
from peers.kv_budget import KVBudget
from peers.prefix_cache import PrefixCache
from peers.shard import Shard, Step
from peers.stage import Stage
from swarm.prefix import BLOCK, NAME_BYTES, Prefixes, SessionPrefix, reckoned, shared_tokens
from swarm.sampling import SamplingParams
from swarm.transcript import GenerationRequest, Transcript
from swarm.types import Announcement, Hop, LayerRange, ModelId, PeerAddress, PeerId, PeerState, Route, SessionId
from tests.reference import ModelSource, profile_of

MODEL = ModelId("model")
NAMES = Prefixes(b"secret")
TEXT = list(range(100))


@dataclass
class Ended:
    """What the cache asks of a stage."""

    owner: PeerId
    layers: LayerRange
    settled: int
    cache: object = None
    log: object = None
    inputs: tuple[int, ...] = ()
    output_wire: str = "model"
    kv: str = "model"


@dataclass
class FakeCache:
    length: int

    def truncate(self, length: int) -> None:
        self.length = length


def ended(owner: str = "owner", settled: int = 200) -> Stage:
    return cast(Stage, Ended(PeerId(owner), LayerRange(0, 2), settled))


def copied(cache: object, length: int, capacity: int) -> FakeCache:
    return FakeCache(length)


def takes(size_bytes: int) -> Callable[[int], int]:
    return lambda positions: size_bytes


def test_a_name_depends_on_every_token_before_on_the_model_and_on_the_key() -> None:
    whole = NAMES.chain(MODEL, TEXT)
    assert len(whole) == 3 * NAME_BYTES
    assert NAMES.chain(MODEL, TEXT[:64]) == whole[: 2 * NAME_BYTES]
    changed = NAMES.chain(MODEL, [7, *TEXT[1:]])
    others = [changed, NAMES.chain(ModelId("other"), TEXT), Prefixes(b"another").chain(MODEL, TEXT)]
    for other in others:
        blocks = [slice(at, at + NAME_BYTES) for at in range(0, len(whole), NAME_BYTES)]
        assert not any(whole[block] == other[block] for block in blocks)


def test_texts_whose_keys_and_values_are_kept_otherwise_have_other_names() -> None:
    def named(kind: str) -> bytes:
        request = GenerationRequest(tuple(TEXT), 5, SamplingParams(), frozenset(), kv=kind)
        return SessionPrefix(NAMES, MODEL, Transcript(request, 200, 1000)).name()

    assert named("model") == NAMES.chain(MODEL, TEXT)
    assert shared_tokens(named("model"), named("int8")) == 0


def test_what_two_chains_share_is_counted_in_whole_blocks_from_the_beginning() -> None:
    whole = NAMES.chain(MODEL, TEXT)
    assert shared_tokens(whole, whole) == 96
    assert shared_tokens(whole, NAMES.chain(MODEL, [*TEXT[:70], 0, *TEXT[70:]])) == 64
    assert shared_tokens(whole, b"") == 0
    assert shared_tokens(whole, bytes(NAME_BYTES) + whole[NAME_BYTES:]) == 0


def test_an_owner_remembers_who_holds_a_text() -> None:
    names = Prefixes(b"secret")
    route = Route((Hop(PeerAddress(PeerId("a")), LayerRange(0, 2)), Hop(PeerAddress(PeerId("b")), LayerRange(2, 4))))
    names.remember(names.chain(MODEL, TEXT), route)
    assert names.held(names.chain(MODEL, TEXT[:64])) == {"a": 64, "b": 64}
    assert names.held(names.chain(MODEL, [9, *TEXT])) == {}


def test_a_peer_that_holds_most_of_the_prompt_is_reckoned_with_the_rest_only() -> None:
    announcement = Announcement(
        peer=PeerAddress(PeerId("a")),
        model=MODEL,
        layers=LayerRange(0, 2),
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=1.0,
        prefill_s_per_token_layer=0.5,
        kv_tokens_free=10,
    )
    assert reckoned(announcement, 75, 100).prefill_s_per_token_layer == 0.125
    assert reckoned(announcement, 0, 100) is announcement


def test_only_whole_settled_blocks_are_kept_and_only_for_the_owner() -> None:
    cache = PrefixCache(KVBudget(100, 4), 4, copied)
    chain = NAMES.chain(MODEL, TEXT)
    cache.keep(ended(settled=BLOCK - 1), chain, takes(10), 0.0)
    assert len(cache) == 0
    cache.keep(ended(settled=70), chain, takes(10), 0.0)
    found = cache.find(PeerId("owner"), LayerRange(0, 2), "model", "model", chain)
    assert found is not None
    assert found[1] == 64
    assert cache.find(PeerId("another"), LayerRange(0, 2), "model", "model", chain) is None
    assert cache.find(PeerId("owner"), LayerRange(0, 1), "model", "model", chain) is None
    assert cache.find(PeerId("owner"), LayerRange(0, 2), "int8", "model", chain) is None
    assert cache.find(PeerId("owner"), LayerRange(0, 2), "model", "int8", chain) is None


def test_a_longer_text_replaces_its_beginning_and_a_shorter_one_adds_nothing() -> None:
    budget = KVBudget(100, 4)
    cache = PrefixCache(budget, 4, copied)
    cache.keep(ended(), NAMES.chain(MODEL, TEXT[:64]), takes(10), 0.0)
    cache.keep(ended(), NAMES.chain(MODEL, TEXT), takes(20), 0.0)
    cache.keep(ended(), NAMES.chain(MODEL, TEXT[:64]), takes(10), 0.0)
    assert (len(cache), budget.kept_bytes) == (1, 20)


def test_what_is_kept_yields_to_sessions_the_oldest_first() -> None:
    budget = KVBudget(100, 4)
    cache = PrefixCache(budget, 4, copied)
    chains = [NAMES.chain(MODEL, [first, *TEXT]) for first in range(3)]
    for chain in chains:
        cache.keep(ended(), chain, takes(30), 0.0)
    assert (budget.used_bytes, budget.kept_bytes, budget.free_bytes) == (0, 90, 100)
    assert cache.find(PeerId("owner"), LayerRange(0, 2), "model", "model", chains[0]) is not None
    # Now the second is the oldest.
    budget.reserve(SessionId("s"), 40)
    found = [cache.find(PeerId("owner"), LayerRange(0, 2), "model", "model", chain) for chain in chains]
    assert [kept is not None for kept in found] == [True, False, True]
    budget.reserve(SessionId("s"), 100)
    assert (len(cache), budget.kept_bytes) == (0, 0)
    cache.keep(ended(), chains[0], takes(30), 0.0)
    assert len(cache) == 0


def test_entries_are_bounded_expire_and_go_when_the_peer_leaves() -> None:
    budget = KVBudget(100, 4)
    cache = PrefixCache(budget, 2, copied)
    for first in range(3):
        cache.keep(ended(), NAMES.chain(MODEL, [first, *TEXT]), takes(10), float(first))
    assert (len(cache), budget.kept_bytes) == (2, 20)
    cache.expire(2.0)
    assert (len(cache), budget.kept_bytes) == (1, 10)
    cache.close()
    cache.keep(ended(), NAMES.chain(MODEL, TEXT), takes(10), 0.0)
    assert (len(cache), budget.kept_bytes) == (0, 0)


def test_a_copied_log_has_the_same_rows_as_far_as_they_are_there() -> None:
    log = CheckpointLog(2)
    log.append(0, b"aabbcc")
    again = log.copy(2)
    assert (again.start, again.end, again.read(0, 2)) == (0, 2, b"aabb")
    again.append(2, b"xx")
    assert log.read(0, 3) == b"aabbcc"
    log.truncate(1)
    log.append(1, b"dd")
    assert log.read(0, 2) == b"aadd"
    log.append(2, b"ee")
    log.forget_before(3)
    assert (log.copy(2).start, log.copy(2).end) == (2, 2)


def test_a_model_goes_on_from_a_copied_cache_as_from_its_own() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    profile = profile_of(model.config)
    shard = Shard.load(profile, model.config.to_dict(), ModelSource(model), LayerRange(0, 2))
    text = torch.randint(0, 97, (50,)).tolist()
    own = shard.new_cache(shard.layers, 60)
    shard.run([Step(shard.layers, own, 0, token_ids=text[:40], head_rows=1)])
    copied = own.copy(32, 80)
    own.truncate(32)
    rest = text[32:]
    outputs = [shard.run([Step(shard.layers, cache, 32, token_ids=rest, head_rows=1)])[0] for cache in (own, copied)]
    assert outputs[0].logits is not None
    assert outputs[1].logits is not None
    assert torch.equal(outputs[0].logits, outputs[1].logits)
