"""The transformers model over real stages and a small random model, on a network in memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
    pipeline,
)

from peers.engine import Engine
from peers.service import PeerService
from peers.shard import Shard
from swarm.blocking_client import Client
from swarm.client import AsyncClient
from swarm.config import Settings
from swarm.errors import BadRequest, NoRoute, TooLong
from swarm.health import Health
from swarm.huggingface import SwarmCache, SwarmForCausalLM
from swarm.stepping import StepSession
from swarm.testing import Directory, Faults, SimNetwork, SimNode, SimTransport
from swarm.types import Announcement, LayerRange, PeerState
from tests.reference import ModelSource, profile_of

VOCAB = 97
THIRDS = (LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6))
SETTINGS = replace(Settings(), recovery=replace(Settings().recovery, wait_s=1.0))


def whole_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,  # so that texts don't repeat themselves at once
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


class InMemory:
    """What :class:`Client` needs of an ``AsyncClient``, with its peers in the same process."""

    def __init__(self, model: Any, spares: int) -> None:
        self.model = model
        self.profile = replace(profile_of(model.config), end_ids=(2,))
        self.settings = SETTINGS
        self.tokenizer_files = {
            "generation_config.json": json.dumps({"eos_token_id": [2], "pad_token_id": 0}).encode(),
            "tokenizer_config.json": json.dumps({"pad_token": "t00", "eos_token": "t02"}).encode(),
            "tokenizer.json": word_tokenizer(),
        }
        self.health = Health(60.0)
        self.directory = Directory()
        self.ranges = THIRDS * (1 + spares)
        self.services: list[PeerService] = []
        self.nodes: list[SimNode] = []

    async def __aenter__(self) -> InMemory:
        self.network = SimNetwork(random.Random(1), Faults(latency_s=(0.0, 0.0002)))
        self.transport = SimTransport(self.network.add("owner"))
        self._exit = contextlib.AsyncExitStack()
        shards = {
            layers: Shard.load(self.profile, self.model.config.to_dict(), ModelSource(self.model), layers)
            for layers in THIRDS
        }
        for number, layers in enumerate(self.ranges):
            node = self.network.add(f"peer{number}")
            engine = await self._exit.enter_async_context(Engine(shards[layers], self.settings))
            service = PeerService(SimTransport(node), engine, self.directory, self.settings)
            await self._exit.enter_async_context(service)
            self.nodes.append(node)
            self.services.append(service)
            self.directory.known[node.address.peer_id] = Announcement(
                peer=node.address,
                model=self.profile.model_id,
                layers=layers,
                state=PeerState.SERVING,
                version="0",
                decode_s_per_layer=0.001 * (1 + number),
                prefill_s_per_token_layer=0.001,
                kv_tokens_free=100000,
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    def step_session(self, capacity: int) -> StepSession:
        return StepSession(self.transport, self.directory, self.profile, capacity, self.settings, self.health)

    async def kill(self, session: StepSession, hop: int) -> None:
        self.network.nodes[session.route.hops[hop].peer.peer_id].kill()

    async def stages(self) -> int:
        """How many are open; they end a moment after their owner has said so."""
        for _ in range(100):
            left = sum(len(s.table.runners) for s, n in zip(self.services, self.nodes, strict=True) if n.alive)
            if not left:
                break
            await asyncio.sleep(0.02)
        return left


@contextlib.contextmanager
def connected(local: Any, spares: int = 0) -> Iterator[tuple[SwarmForCausalLM, InMemory]]:
    world = InMemory(local, spares)
    with Client(cast(AsyncClient, world)) as client:
        yield SwarmForCausalLM.on(client), world


@pytest.fixture(scope="module")
def local() -> Any:
    return whole_model()


@pytest.fixture(scope="module")
def quiet(local: Any) -> Iterator[tuple[SwarmForCausalLM, InMemory]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with connected(local) as both:
        yield both
    torch.set_num_threads(threads)


@pytest.fixture
def model(quiet: tuple[SwarmForCausalLM, InMemory]) -> SwarmForCausalLM:
    return quiet[0]


PROMPT = torch.tensor([[5, 17, 23, 42, 5, 17, 88, 3, 64, 5, 17]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams_returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "num_return_sequences": 2},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "in_chunks": {"do_sample": False, "prefill_chunk_size": 4},
    "no_cache": {"do_sample": False, "use_cache": False},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
}


def word_tokenizer() -> bytes:
    """``t00 t01 ... t96``."""
    tokenizer = Tokenizer(WordLevel({f"t{number:02}": number for number in range(VOCAB)}, unk_token="t00"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer.to_str().encode()


def both_ways(model: SwarmForCausalLM, local: Any, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    found = []
    for either in (model, local):
        torch.manual_seed(7)
        with torch.no_grad():
            found.append(either.generate(*inputs, **{"max_new_tokens": 24, "eos_token_id": 2, **options}))
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_decoding_gives_what_the_whole_model_gives(
    quiet: tuple[SwarmForCausalLM, InMemory], local: Any, way: dict[str, Any]
) -> None:
    model, world = quiet
    ours, theirs = both_ways(model, local, PROMPT, pad_token_id=0, **way)
    assert ours.tolist() == theirs.tolist()
    assert model.client.run(world.stages()) == 0, "the sessions end with the call"


def test_generate_may_be_given_the_tokenizer_as_for_stop_strings(model: SwarmForCausalLM, local: Any) -> None:
    ours, theirs = both_ways(model, local, PROMPT, pad_token_id=0, do_sample=False, tokenizer=model.tokenizer())
    assert ours.tolist() == theirs.tolist()


def test_assisted_by_a_model_at_home(model: SwarmForCausalLM, local: Any) -> None:
    assistant = copy.deepcopy(local)
    ours, theirs = both_ways(model, local, PROMPT, pad_token_id=0, do_sample=False, assistant_model=assistant)
    assert ours.tolist() == theirs.tolist()


def test_the_sessions_of_an_assistant_end_with_the_call_that_it_assists(
    quiet: tuple[SwarmForCausalLM, InMemory], local: Any
) -> None:
    model, world = quiet
    assisted = model.generate(PROMPT, do_sample=False, max_new_tokens=24, assistant_model=model)
    assert assisted.tolist() == local.generate(PROMPT, do_sample=False, max_new_tokens=24, eos_token_id=2).tolist()
    assert model.client.run(world.stages()) == 0


def test_a_padded_batch_with_scores_and_hidden_states(model: SwarmForCausalLM, local: Any) -> None:
    ids = torch.tensor([[5, 17, 23, 42, 9], [0, 0, 0, 31, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    ours, theirs = both_ways(
        model,
        local,
        ids,
        attention_mask=mask,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for mine, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for cut, states in zip((2, 4, 6), mine, strict=True):
            torch.testing.assert_close(states[:, -1], other[cut][:, -1], rtol=1e-4, atol=1e-4)
    ours.past_key_values.close()


def test_hidden_states_at_the_cuts_are_those_of_the_whole_model(model: SwarmForCausalLM, local: Any) -> None:
    with torch.no_grad():
        expected = local(PROMPT, output_hidden_states=True).hidden_states
    found = model(PROMPT, output_hidden_states=True)
    assert found.cuts == (2, 4, 6)
    for cut, states in zip(found.cuts, found.hidden_states, strict=True):
        assert states.shape == (1, PROMPT.shape[1], 48)
        torch.testing.assert_close(states, expected[cut], rtol=1e-4, atol=1e-4)
    assert model(PROMPT).hidden_states is model(PROMPT).cuts is None


def test_logits_and_loss_of_all_positions(model: SwarmForCausalLM, local: Any) -> None:
    with torch.no_grad():
        expected = local(PROMPT, labels=PROMPT)
    found = model(PROMPT, labels=PROMPT)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
    assert found.past_key_values is None
    some = model(PROMPT, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(some, expected.logits[:, [1, 4]], rtol=1e-4, atol=1e-4)


def test_a_result_that_nobody_keeps_keeps_no_sessions(quiet: tuple[SwarmForCausalLM, InMemory]) -> None:
    """``return_dict_in_generate`` puts the cache into the result, where nobody looks for something to close."""
    model, world = quiet
    result = model.generate(PROMPT, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    assert len(result.past_key_values.sessions) == 1
    del result
    gc.collect()
    assert model.client.run(world.stages()) == 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_second_call_computes_only_what_is_new(model: SwarmForCausalLM, local: Any, name: str) -> None:
    cache = model.new_cache(64)
    given: dict[str, Any] = {"cache": None, "past_key_values": None, name: cache}
    first = model.generate(PROMPT, do_sample=False, max_new_tokens=10, eos_token_id=None, **given)
    assert cache.positions_computed == cache.get_seq_length() == first.shape[1] - 1
    second = torch.cat([first, torch.tensor([[9, 8, 7]])], dim=1)
    again = model.generate(second, do_sample=False, max_new_tokens=10, eos_token_id=None, **given)
    assert cache.positions_computed == again.shape[1] - 1
    with torch.no_grad():
        assert again.tolist() == local.generate(second, do_sample=False, max_new_tokens=10, eos_token_id=None).tolist()
    assert len(cache.sessions) == 1
    cache.close()


def test_beams_compute_only_what_differs(model: SwarmForCausalLM) -> None:
    cache = model.new_cache(64)
    new = 12
    model.generate(PROMPT, past_key_values=cache, num_beams=4, do_sample=False, max_new_tokens=new, eos_token_id=None)
    anew = 4 * (PROMPT.shape[1] + new) * new  # every step all over again
    assert cache.positions_computed < anew / 4
    cache.close()


def test_a_cache_can_be_cropped_reordered_repeated_and_copied(model: SwarmForCausalLM, local: Any) -> None:
    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return cast(torch.Tensor, local(torch.tensor([tokens])).logits[0, -1])

    cache = model.new_cache(8)  # too small: it grows
    model(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-1)
    twin = copy.deepcopy(cache)
    found = model(torch.tensor([[9], [10]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, torch.stack([logits([5, 6, 7, 9]), logits([5, 6, 7, 10])]), rtol=1e-4, atol=1e-4)
    twin.batch_repeat_interleave(2)
    twin.batch_select_indices(torch.tensor([0]))
    assert (twin.batch_size, twin.get_seq_length()) == (1, 3)
    rest = list(range(20, 40))
    found = model(torch.tensor([rest]), past_key_values=twin).logits[:, -1]
    torch.testing.assert_close(found[0], logits([5, 6, 7, *rest]), rtol=1e-4, atol=1e-4)
    cache.close()
    found = model(torch.tensor([[11], [11]]), past_key_values=cache).logits[:, -1]  # freed, not forgotten
    torch.testing.assert_close(found[1], logits([5, 6, 7, 10, 11]), rtol=1e-4, atol=1e-4)
    cache.close()
    twin.close()


class At(LogitsProcessor):
    """Changes nothing, and acts once, when the text is so long."""

    def __init__(self, length: int, act: Callable[[], object]) -> None:
        self.length, self.act = length, act

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if input_ids.shape[1] == self.length:
            self.act()
        return scores


@pytest.mark.parametrize("way", ["greedy", "beams", "sampling", "lookup"])
def test_peers_that_die_in_the_middle_are_not_seen(local: Any, way: str) -> None:
    with connected(local, spares=1) as (model, world):
        cache = model.new_cache(64)

        def strike() -> None:
            model.client.run(world.kill(cache.sessions[0], 1))

        options = {"pad_token_id": 0, **WAYS[way]}
        acting = LogitsProcessorList([At(PROMPT.shape[1] + 5, strike)])
        _, theirs = both_ways(model, local, PROMPT, **options)
        torch.manual_seed(7)
        ours = model.generate(
            PROMPT, past_key_values=cache, logits_processor=acting, max_new_tokens=24, eos_token_id=2, **options
        )
        assert ours.tolist() == theirs.tolist()
        assert sum(len(session.rebuilds) for session in cache.sessions) > 0
        cache.close()


def test_a_session_that_ended_is_replaced_by_the_next_call(local: Any) -> None:
    with connected(local) as (model, world):
        cache = model.new_cache(64)
        model(PROMPT, past_key_values=cache)
        gone = dict(world.directory.known)
        peer = cache.sessions[0].route.hops[1].peer
        del world.directory.known[peer.peer_id]
        model.client.run(world.kill(cache.sessions[0], 1))
        with pytest.raises(NoRoute, match="2:4"):
            model(torch.tensor([[3]]), past_key_values=cache)
        assert cache.get_seq_length() == PROMPT.shape[1], "what failed was not appended"
        world.directory.known.update(gone)
        world.network.nodes[peer.peer_id].alive = True
        found = model(torch.tensor([[3]]), past_key_values=cache).logits[0, -1]
        with torch.no_grad():
            expected = local(torch.cat([PROMPT, torch.tensor([[3]])], dim=1)).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        cache.close()


def test_a_text_ends_at_the_limit_of_tokens(model: SwarmForCausalLM, local: Any) -> None:
    """All of it was lost there."""
    long = PROMPT.repeat(1, 23)[:, :250]
    found = model.generate(long, do_sample=False, max_new_tokens=20, eos_token_id=None)
    with torch.no_grad():
        expected = local.generate(long, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    assert found.tolist() == expected.tolist()
    with pytest.raises(TooLong):
        model.generate(PROMPT.repeat(1, 24), max_new_tokens=2)


def test_pipelines_and_streamers(
    model: SwarmForCausalLM, local: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = model.tokenizer()
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    prompt = " ".join(f"t{token:02}" for token in PROMPT[0].tolist())
    assert tokenizer(prompt).input_ids == PROMPT[0].tolist()
    said = write(prompt, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    with torch.no_grad():
        expected = local.generate(PROMPT, do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=0)
    assert said.split() == [f"t{token:02}" for token in expected[0, PROMPT.shape[1] :].tolist()]
    capsys.readouterr()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(PROMPT, streamer=streamer, do_sample=False, max_new_tokens=8)
    assert capsys.readouterr().out.split() == said.split()


@pytest.mark.parametrize("kind", ["paged", "static", "quantized", "offloaded"])
def test_how_a_cache_at_home_is_to_be_kept_is_left_out_of_account(model: SwarmForCausalLM, kind: str) -> None:
    plain = model.generate(PROMPT, do_sample=False, max_new_tokens=4)
    assert (
        model.generate(PROMPT, do_sample=False, max_new_tokens=4, cache_implementation=kind).tolist() == plain.tolist()
    )


def test_what_can_not_be_is_refused_in_words(model: SwarmForCausalLM) -> None:
    with pytest.raises(BadRequest, match="inputs_embeds"):
        model(PROMPT, inputs_embeds=torch.zeros(1))
    with pytest.raises(BadRequest, match="output_attentions"):
        model(PROMPT, output_attentions=True)
    with pytest.raises(BadRequest, match="attention_mask"):
        model(PROMPT, attention_mask=torch.ones(1, 3))
    with pytest.raises(BadRequest, match=r"attention_mask is \[11\], not \[1, 11\]"):
        model(PROMPT, attention_mask=torch.ones(11))
    for strange in (PROMPT.float(), PROMPT.bool()):
        with pytest.raises(BadRequest, match="whole numbers"):
            model(strange)
    with pytest.raises(BadRequest, match="Call generate with several prompts"):
        model.generate_batch([[1, 2], [3]])
    with pytest.raises(BadRequest, match="DynamicCache"):
        model(PROMPT, past_key_values=DynamicCache())
    with pytest.raises(BadRequest, match="pad on the left"):
        model.generate(torch.tensor([[5, 17], [5, 0]]), attention_mask=torch.tensor([[1, 1], [1, 0]]), max_new_tokens=2)
    with pytest.raises(TooLong):
        model(torch.ones(1, 300, dtype=torch.long))
    cache: SwarmCache = model.new_cache()
    model(PROMPT, past_key_values=cache)
    with pytest.raises(BadRequest, match="batch"):
        model(PROMPT.repeat(2, 1), past_key_values=cache)
    cache.close()


def test_a_cache_may_be_closed_after_its_model(local: Any) -> None:
    with connected(local) as (model, _):
        with model.new_cache() as cache:
            model.generate(PROMPT, past_key_values=cache, max_new_tokens=2)
            model.close()
        assert cache.positions_computed == PROMPT.shape[1] + 1
