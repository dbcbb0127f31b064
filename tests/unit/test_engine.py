"""The compute thread: prompts in pieces between the decode steps of others, with the results of the whole."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peers import piece_size
from peers.engine import MOST_FAILURES, Engine
from peers.executor import SampleRequest, StepReply, StepRequest, run
from peers.kv_cache import SequenceCache
from peers.machine import measure
from peers.shard import Shard, StepOutput
from swarm.config import EngineSettings, Settings
from swarm.errors import BadRequest, Cancelled, Internal, ModelError, SwarmError
from swarm.sampling import SamplingParams
from swarm.types import LayerRange
from tests.reference import ModelSource, profile_of

LAYERS = LayerRange(0, 2)
PROMPT = [(7 * i) % 90 + 1 for i in range(50)]
GREEDY = SamplingParams(temperature=0.0)


def whole() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def shard_of(model: LlamaForCausalLM) -> Shard:
    return Shard.load(profile_of(model.config), model.config.to_dict(), ModelSource(model), LAYERS)


@pytest.fixture(scope="module")
def shard() -> Shard:
    return shard_of(whole())


@pytest.fixture
async def engine(shard: Shard) -> AsyncIterator[Engine]:
    settings = replace(Settings(), engine=EngineSettings(max_batch_tokens=64, mixed_prefill_tokens=8))
    async with Engine(shard, settings) as engine:
        yield engine


def step(engine: Engine, tokens: list[int], prompt: list[int] | None = None, start: int = 0) -> StepRequest:
    history = [*(prompt or []), *tokens]
    sample = SampleRequest(GREEDY, history, len(history), 1, ())
    return StepRequest(LAYERS, engine.new_cache(LAYERS, 128), start, len(tokens), tokens, None, sample)


async def test_a_prompt_runs_whole_when_nobody_decodes_and_in_pieces_when_somebody_does(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_size, "LEAST_SEEN", 1000)
    batches: list[list[int]] = []
    engine.pace.observe = lambda rows, waits_s, compute_s: batches.append(list(rows))
    alone = await run(engine, step(engine, PROMPT))
    decoding = step(engine, [3])
    first = await run(engine, decoding)
    assert batches[0] == [50], "it is noted once it is answered, before the next one is run"

    batches.clear()
    prompt = asyncio.create_task(run(engine, step(engine, PROMPT)))
    await asyncio.sleep(0)
    token, history = first.tokens[0].token_id, [3]
    while not prompt.done():
        history.append(token)
        sample = SampleRequest(GREEDY, history, 1, 1, ())
        reply = await run(engine, replace(decoding, start=len(history) - 1, token_ids=[token], sample=sample))
        token = reply.tokens[0].token_id
    mixed = await prompt
    await run(engine, step(engine, [3]))
    assert sum(rows for batch in batches for rows in batch if rows > 1) == 50, "each row once"
    assert max(rows for batch in batches for rows in batch) == 8
    assert mixed.tokens[0].token_id == alone.tokens[0].token_id


async def test_what_is_submitted_in_one_turn_of_the_loop_is_run_together(engine: Engine) -> None:
    for _ in range(20):
        replies = await asyncio.gather(*[run(engine, step(engine, [number])) for number in range(1, 7)])
        assert [reply.batch for reply in replies] == [6] * 6
    assert engine.queue_length == 0


async def test_hidden_states_of_pieces_are_those_of_the_whole(shard: Shard) -> None:
    first = LayerRange(0, 1)
    answers: list[StepReply] = []
    for pieces in (64, 8):
        settings = replace(Settings(), engine=EngineSettings(max_batch_tokens=pieces))
        async with Engine(shard, settings) as engine:
            cache = engine.new_cache(first, 64)
            answers.append(await run(engine, StepRequest(first, cache, 0, 50, PROMPT, None)))
            assert cache.length == 50
    whole, cut = (torch.frombuffer(bytearray(answer.hidden), dtype=torch.float32) for answer in answers)
    assert torch.allclose(whole, cut, atol=1e-5)


async def test_a_long_input_is_computed_in_pieces_whose_logits_are_those_of_the_whole(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame of another peer may have thousands of rows, and logits of all of them would be more than there is memory
    for."""
    ids, answers = [*PROMPT, *PROMPT], []
    for most in (100, 64):
        settings = replace(Settings(), engine=EngineSettings(max_batch_tokens=most))
        async with Engine(shard, settings) as engine:
            batches: list[int] = []
            engine.pace.observe = lambda rows, waits_s, compute_s, batches=batches: batches.extend(rows)
            request = StepRequest(LAYERS, engine.new_cache(LAYERS, 128), 0, 100, ids, None, want_hidden=True)
            answers.append(await run(engine, replace(request, logit_rows=60)))
        assert max(batches) <= most
    monkeypatch.setattr("peers.engine.MOST_LOGITS_BYTES", 64 * 4 * shard.profile.vocab_size)
    with pytest.raises(BadRequest, match="logits of 65 rows at once; the limit is 64"):
        async with Engine(shard, settings) as engine:
            await run(engine, replace(request, cache=engine.new_cache(LAYERS, 128), logit_rows=65))
    for whole, cut in ((answers[0].hidden, answers[1].hidden), (answers[0].logits, answers[1].logits)):
        one, other = (torch.frombuffer(bytearray(data), dtype=torch.float32) for data in (whole, cut))
        assert torch.allclose(one, other, atol=1e-5)


async def test_a_piece_that_fails_fails_its_request_once(engine: Engine) -> None:
    await run(engine, step(engine, [3]))  # somebody decodes
    request = replace(step(engine, PROMPT), cache=engine.new_cache(LAYERS, 20))
    with pytest.raises(SwarmError, match="exceed the 20"):
        await run(engine, request)
    assert engine.queue_length == 0
    assert (await run(engine, step(engine, [3]))).tokens


@pytest.mark.parametrize("kind", ["model", "int8"])
async def test_a_replay_in_other_pieces_gives_the_same_tokens(engine: Engine, kind: str) -> None:
    """Over the ends of blocks; the first time token by token, then from all of them."""
    cache, text = engine.new_cache(LAYERS, 200, kind), list(PROMPT)
    start = 0
    while len(text) < 150:
        reply = await run(engine, replace(step(engine, text[start:]), cache=cache, start=start, sample=sampled(text)))
        start = len(text)
        text.append(reply.tokens[0].token_id)
    for pieces in (150, 64, 7):
        again = engine.new_cache(LAYERS, 200, kind)
        for start in range(0, 149, pieces):
            end = min(start + pieces, 149)
            request = replace(step(engine, text[start:end]), cache=again, start=start, sample=sampled(text[:end]))
            reply = await run(engine, request)
        assert reply.tokens[0].token_id == text[149]
        assert engine.cache_bytes(LAYERS, 149, kind) == again.size_bytes == cache.size_bytes


def sampled(history: list[int]) -> SampleRequest:
    return SampleRequest(GREEDY, history, len(history), 1, ())


async def test_the_thread_that_waits_holds_no_session(engine: Engine) -> None:
    """Memory of a session that ended would otherwise be held until the next one has a step."""

    class Watched(SequenceCache):
        __slots__ = ("__weakref__",)

    cache = Watched(LAYERS, 2, 8, 128, torch.float32)
    await run(engine, step(engine, [3]))  # somebody decodes, so the prompt comes in pieces
    await run(engine, replace(step(engine, PROMPT), cache=cache))
    left = weakref.ref(cache)
    del cache
    for _ in range(100):
        if left() is None:
            break
        await asyncio.sleep(0.01)
    assert left() is None


@pytest.mark.parametrize("pause_s", [0.01, 0.0], ids=["it is handed over", "it is to be handed over"])
async def test_steps_that_wait_and_that_nobody_wants_any_more_are_not_run(engine: Engine, pause_s: float) -> None:
    computed, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        computed.set()
        go_on.wait(5)

    engine.pace.observe = hold
    running, unwanted = step(engine, [3]), step(engine, PROMPT)
    first = asyncio.create_task(run(engine, running))
    assert await asyncio.to_thread(computed.wait, 5)
    second = asyncio.create_task(run(engine, unwanted))
    await asyncio.sleep(pause_s)
    for request in (running, unwanted):
        engine.forget(request.cache)
    go_on.set()
    assert (await first).tokens
    with pytest.raises(Cancelled):
        async with asyncio.timeout(5):
            await second
    assert (engine.queue_length, unwanted.cache.length) == (0, 0)


async def test_an_engine_says_when_its_device_is_lost(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    works = Shard.run

    def lost(self: Shard, steps: object) -> list[StepOutput]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = asyncio.create_task(engine.broken())
    for batches in (MOST_FAILURES - 1, 1):
        monkeypatch.setattr(Shard, "run", lost)
        for _ in range(batches):
            with pytest.raises(Internal, match="RuntimeError"):
                await run(engine, step(engine, [1, 2]))
        monkeypatch.setattr(Shard, "run", works)
        assert (await run(engine, step(engine, [1, 2]))).tokens  # one that does not fail begins the count anew
    monkeypatch.setattr(Shard, "run", lost)
    for _ in range(MOST_FAILURES):
        with pytest.raises(Internal, match="RuntimeError"):
            await run(engine, step(engine, [1, 2]))
    with pytest.raises(Internal, match="the engine has stopped"):
        async with asyncio.timeout(5):
            await broken


async def test_a_session_that_fails_over_its_answer_leaves_the_others_theirs(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("a bug of one session")

    engine.submit(step(engine, [1, 2]), fail)
    async with asyncio.timeout(5):
        await run(engine, step(engine, [1, 2]))
    assert "a bug of one session" in caplog.text


async def test_weights_that_are_not_finite_are_an_error_of_the_model() -> None:
    """The peer ended as if by a bug of its own."""
    model = whole()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    async with Engine(shard_of(model), Settings()) as engine:
        with pytest.raises(ModelError, match=r"layers 0:2 gave values that are not finite in float32: the weights of"):
            await measure(engine)


@pytest.mark.parametrize("place", ["use_device", "Batching.take", "Waiting.take"])
async def test_whoever_waits_for_a_step_hears_that_the_engine_has_stopped(
    shard: Shard, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first batch, with steps that wait, and with a batch that was run: a peer that starts has nobody else
    who looks."""

    def fail(*_: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(f"peers.engine.{place}", fail)
    async with Engine(shard, Settings()) as engine, asyncio.timeout(5):
        steps = [run(engine, step(engine, [1, 2])) for _ in range(2)]
        for found in await asyncio.gather(*steps, return_exceptions=True):
            assert isinstance(found, Internal)
        with pytest.raises(Internal, match="the engine has stopped"):
            await measure(engine)
