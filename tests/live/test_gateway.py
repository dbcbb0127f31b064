"""The gateway as a process over real peers, used by OpenAI's own client and by hand-made requests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from swarm.children import Child, Guard
from swarm.client import AsyncClient
from swarm.local import LocalSwarm
from swarm.models import TextTokenizer, load_profile, resolve, tokenizer_files
from swarm.types import LayerRange
from tests.live.helpers import MODEL, SETTINGS, Reference, descriptions, index_of, only_thirds, released
from tests.processes import eventually

pytestmark = [pytest.mark.live, pytest.mark.timeout(280)]

TOKENIZER = TextTokenizer(tokenizer_files(resolve(MODEL)))
READY_S = 60.0


class Gateway:
    def __init__(self, child: Child) -> None:
        ready = child.event("ready", READY_S)
        assert ready is not None, child.tail()
        self.child = child
        self.url: str = ready["url"]
        self.options: Any = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
        self.openai = openai.OpenAI(**self.options)

    def running(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["running"])


@pytest.fixture(scope="module")
def gateway(thirds: LocalSwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    joins = [part for address in thirds.initial_peers for part in ("--initial-peers", address)]
    command = [sys.executable, "-m", "swarm.cli", "gateway", "--port", "0", "--json", *joins]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    with Guard() as guard:
        child = Child.spawn("the gateway", command, guard, log, inherited)
        try:
            started = Gateway(child)
            yield started
            started.openai.close()
            child.signal(signal.SIGTERM, alone=True)
            assert child.wait(15) == 0, child.tail()
        finally:
            child.bury()


@pytest.fixture
async def asynchronous(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(**gateway.options) as entered:
        yield entered


@pytest.fixture
async def client(thirds: LocalSwarm) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(thirds.initial_peers, None, SETTINGS) as entered:
        yield entered


def greedy_text(reference: Reference, prompt: str | list[int], count: int) -> str:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return TOKENIZER.decode(reference.greedy(ids, count))


def test_models(gateway: Gateway) -> None:
    assert [model.id for model in gateway.openai.models.list()] == [MODEL]
    assert gateway.openai.models.retrieve(MODEL).owned_by == "swarm"


def test_a_completion_is_the_text_of_transformers(gateway: Gateway, reference: Reference) -> None:
    prompt = "The capital of France is"
    answer = gateway.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
    assert answer.choices[0].text == greedy_text(reference, prompt, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TOKENIZER.encode(prompt)), 12)


def test_chat_whole_and_streamed(gateway: Gateway, reference: Reference) -> None:
    messages: list[Any] = [{"role": "user", "content": "Name a colour."}]
    expected = greedy_text(reference, TOKENIZER.apply_chat_template(messages), 16)
    answer = gateway.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == expected
    chunks = list(
        gateway.openai.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_completion_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    usage = chunks[-1].usage
    assert usage is not None
    assert answer.usage is not None
    # but for what the peers kept of the first
    assert usage.model_copy(update={"prompt_tokens_details": answer.usage.prompt_tokens_details}) == answer.usage


def test_logprobs_are_those_of_transformers(gateway: Gateway, reference: Reference) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say something."}]
    prompt = TOKENIZER.apply_chat_template(messages)
    answer = gateway.openai.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=6, temperature=1.3, seed=5, logprobs=True, top_logprobs=4
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    ids = list(prompt)
    with torch.inference_mode():
        for entry in told.content:
            scores = reference.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = scores.topk(4)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=2e-3)
            likely = ((scores - entry.logprob).abs() < 2e-3).nonzero().flatten().tolist()
            chosen = [i for i in likely if TOKENIZER.token_bytes(i) == bytes(entry.bytes or [])]
            assert len(chosen) == 1
            ids.append(chosen[0])


def test_a_seed_repeats_and_n_texts_differ(gateway: Gateway) -> None:
    def texts(n: int) -> list[str]:
        answer = gateway.openai.completions.create(
            model=MODEL, prompt="Once upon a time", n=n, max_tokens=10, temperature=1.0, seed=42
        )
        return [choice.text for choice in answer.choices]

    three = texts(3)
    assert len(set(three)) == 3
    assert texts(1) == three[:1]


def test_errors_are_those_that_the_client_knows(gateway: Gateway) -> None:
    create = gateway.openai.chat.completions.create
    messages: list[Any] = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-5", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model=MODEL, messages=messages, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        create(model=MODEL, messages=messages, max_tokens=10**6)
    assert long.value.code == "context_length_exceeded"


async def test_a_client_that_goes_away_frees_its_stages(
    gateway: Gateway, asynchronous: openai.AsyncOpenAI, thirds: LocalSwarm, client: AsyncClient
) -> None:
    long: Any = {"model": MODEL, "prompt": "Tell a story.", "max_tokens": 1000, "temperature": 0}
    ends = load_profile(resolve(MODEL)).end_ids
    long["logit_bias"] = {str(token_id): -100 for token_id in ends}  # it never ends by itself
    stream = await asynchronous.completions.create(**long, stream=True)
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            break
    await stream.close()
    await released(client, thirds)
    assert eventually(lambda: gateway.running() == 0)
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ReadTimeout):
            await http.post(f"{gateway.url}/v1/completions", json=long, timeout=1.5)
    await released(client, thirds)
    assert eventually(lambda: gateway.running() == 0)


async def test_a_rebuild_is_not_seen_in_the_stream(
    gateway: Gateway,
    asynchronous: openai.AsyncOpenAI,
    thirds: LocalSwarm,
    client: AsyncClient,
    reference: Reference,
) -> None:
    prompt, count = "The history of the railway began", 24
    expected = greedy_text(reference, prompt, count)
    spare = thirds.add(LayerRange(10, 20))
    try:
        async with asyncio.timeout(60):
            while spare.peer_id not in {a.peer.peer_id for a in await client.peers()}:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await asyncio.sleep(SETTINGS.discovery.view_period_s)  # the gateway reads the DHT no oftener
        said: list[str] = []
        name = ""
        stream = await asynchronous.completions.create(
            model=MODEL, prompt=prompt, max_tokens=count, temperature=0, stream=True
        )
        async for chunk in stream:
            said.append(chunk.choices[0].text)
            name = chunk.id
            if len(said) == 8:
                told = await descriptions(client, thirds)
                used = next(d for d in told if d.sessions and d.layers == LayerRange(10, 20))
                thirds.kill(index_of(thirds, used.peer.peer_id))
        assert "".join(said) == expected
        async with httpx.AsyncClient() as http:
            trace = (await http.get(f"{gateway.url}/api/traces/{name}?format=swarm")).json()
        middle = {hop["peer_id"] for token in trace["tokens"] for hop in token["hops"] if hop["layers"]["start"] == 10}
        assert len(middle) == 2, "another peer went on"
        await released(client, thirds)
    finally:
        only_thirds(thirds)


async def test_fifty_streams_at_once(
    gateway: Gateway,
    asynchronous: openai.AsyncOpenAI,
    thirds: LocalSwarm,
    client: AsyncClient,
    reference: Reference,
) -> None:
    """None lost, none mixed up, and nothing is left of them."""
    prompts = [
        f"{word} number {number} is" for number in range(10) for word in ("Horse", "City", "Ship", "Year", "Song")
    ]
    count = 4
    expected = [greedy_text(reference, prompt, count) for prompt in prompts]
    process = psutil.Process(gateway.child.pid)

    async def one(prompt: str) -> str:
        stream = await asynchronous.completions.create(
            model=MODEL, prompt=prompt, max_tokens=count, temperature=0, stream=True
        )
        parts = []
        finish_reason = None
        async for chunk in stream:
            parts.append(chunk.choices[0].text)
            finish_reason = chunk.choices[0].finish_reason
        assert finish_reason in ("length", "stop")
        return "".join(parts)

    memory = []
    for _ in range(2):
        said = await asyncio.gather(*(one(prompt) for prompt in prompts))
        assert said == expected
        await released(client, thirds)
        assert eventually(lambda: gateway.running() == 0)
        memory.append(process.memory_info().rss)
    assert memory[1] < memory[0] + 32 * 2**20, "the second round needs nothing more"
