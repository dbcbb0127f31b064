"""The gateway's application over a client whose sessions are scripted: real requests, real sampler, no network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx
import numpy as np
import openai
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from swarm import protocol_pb2 as pb
from swarm.client import AsyncClient
from swarm.config import Settings
from swarm.coverage import Coverage
from swarm.errors import BadRequest, NoRoute, PortInUse, SwarmError
from swarm.gateway.app import create_app
from swarm.gateway.bodies import Body, ChatBody, CompletionBody
from swarm.gateway.hub import Began, Ended, RouteTaken, TokenOut
from swarm.gateway.serve import Server, listen
from swarm.gateway.state import Access, GatewayState
from swarm.logs import JsonFormatter
from swarm.models import load_profile, resolve, tokenizer_files
from swarm.protocol import logprobs_to_wire, timing_to_wire
from swarm.sampling import SampleResult, SamplingParams, sample
from swarm.session import RouteChanged
from swarm.telemetry import MetricsServer
from swarm.tokenizer import TextTokenizer
from swarm.transcript import Generated, GenerationRequest, Transcript
from swarm.types import (
    Announcement,
    Hop,
    HopTiming,
    LayerRange,
    ModelId,
    PeerAddress,
    PeerId,
    PeerState,
    Route,
)

PEER = PeerAddress(PeerId("12D3KooWscripted"))
WHOLE = LayerRange(0, 30)
MODEL = "smollm2-135m"
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 8}


def logits_after(tokens: list[int], vocab_size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Plain words, and the end of text now and then."""
    rng = np.random.default_rng([tokens[-1], len(tokens)])
    logits = np.full(vocab_size, -20.0, dtype=np.float32)
    logits[200:1200] = rng.normal(0.0, 2.0, 1000)
    return logits


def next_token(tokens: list[int], prompt: int, params: SamplingParams, vocab_size: int) -> SampleResult:
    return sample(logits_after(tokens, vocab_size), params, len(tokens), tokens, prompt)


@dataclass
class Script:
    """What sessions do, and what was seen of them."""

    token_s: float = 0.0
    rebuild_at: int | None = None
    fail_at: int | None = None
    refuse: SwarmError | None = None
    choose: Callable[[list[int]], int] | None = None
    hold: asyncio.Event | None = None
    """Sessions wait for it before their first token."""
    open: int = 0
    most_open: int = 0
    requests: list[GenerationRequest] = field(default_factory=list)


class ScriptedSession:
    def __init__(self, request: GenerationRequest, script: Script, vocab_size: int) -> None:
        stop_at = len(request.prompt) + request.max_tokens
        self.transcript = Transcript(request, stop_at, vocab_size)
        self.rebuilds: list[Any] = []
        self.reused = len(request.prompt) // 2
        self._script = script
        self._vocab_size = vocab_size
        script.requests.append(request)

    @property
    def finish_reason(self) -> str | None:
        return self.transcript.finish_reason

    async def __aenter__(self) -> Self:
        self._script.open += 1
        self._script.most_open = max(self._script.most_open, self._script.open)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._script.open -= 1

    async def events(self) -> AsyncGenerator[RouteChanged | Generated, None]:
        script, transcript = self._script, self.transcript
        request, route = transcript.request, Route((Hop(PEER, WHOLE),))
        await asyncio.sleep(0)
        if script.refuse is not None:
            raise script.refuse
        yield RouteChanged(0, route, "opened")
        if script.hold is not None:
            await script.hold.wait()
        while transcript.finish_reason is None:
            await asyncio.sleep(script.token_s)
            done = transcript.generated
            if done == script.fail_at:
                raise NoRoute("nobody serves layers 10:20")
            if done == script.rebuild_at and not self.rebuilds:
                self.rebuilds.append("rebuild")
                yield RouteChanged(1, route, "lost a peer", "peer_lost")
            found = next_token(transcript.tokens, len(request.prompt), request.sampling, self._vocab_size)
            if script.choose is not None:
                found = replace(found, token_id=script.choose(transcript.tokens[len(request.prompt) :]))
            output = pb.Output(start=len(transcript) - 1, token_ids=[found.token_id])
            output.hops.append(timing_to_wire(HopTiming(PEER.peer_id, WHOLE, 0.001, 0.002, 3, 0.0005)))
            if request.sampling.logprobs:
                output.logprobs.append(pb.Logprobs.FromString(logprobs_to_wire(found)))
            transcript.commit(output)
            while transcript.fresh:
                yield transcript.fresh.popleft()


class ScriptedView:
    def __init__(self, layers: LayerRange) -> None:
        self.layers = layers

    def check(self, announcement: Announcement) -> None:
        """Anybody is used."""

    def announcements(self) -> list[Announcement]:
        return [
            Announcement(
                peer=PEER,
                model=ModelId("m@0"),
                layers=self.layers,
                state=PeerState.SERVING,
                version="0",
                decode_s_per_layer=0.001,
                prefill_s_per_token_layer=0.001,
                kv_tokens_free=1000,
            )
        ]

    def age(self, peer_id: PeerId | None = None) -> float:
        return 0.0

    def since_look(self) -> float:
        return 0.0


class ScriptedClient(AsyncClient):
    def __init__(self, settings: Settings, script: Script, layers: LayerRange = WHOLE) -> None:
        super().__init__(["/ip4/127.0.0.1/tcp/1"], None, settings)
        self.script = script
        self.profile = PROFILE
        self.tokenizer = TOKENIZER
        self.view = ScriptedView(layers)  # type: ignore[assignment]

    def predict(self, route: Route, request: GenerationRequest) -> tuple[()]:
        return ()

    def session(self, request: GenerationRequest) -> Any:
        return ScriptedSession(request, self.script, self.profile.vocab_size)


REFERENCE = resolve(MODEL)
PROFILE = load_profile(REFERENCE)
TOKENIZER = TextTokenizer(tokenizer_files(REFERENCE))


@dataclass
class Gateway:
    http: httpx.AsyncClient
    script: Script
    state: GatewayState

    async def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def completion(self, **fields: Any) -> dict[str, Any]:
        response = await self.post("/v1/completions", GREEDY | {"prompt": "Once"} | fields)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def chat(self, text: str = "Hello", **fields: Any) -> dict[str, Any]:
        body = GREEDY | {"messages": [{"role": "user", "content": text}]} | fields
        response = await self.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def chunks(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All but ``[DONE]``, which has to be there."""
        events = await self.events(path, body)
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    async def events(self, path: str, body: dict[str, Any]) -> list[str]:
        response = await self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = response.text.split("\n\n")
        assert parts[-1] == ""
        assert all(part.startswith("data: ") for part in parts[:-1])
        return [part.removeprefix("data: ") for part in parts[:-1]]


Make = Callable[..., Gateway]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[Gateway] = []

    def build(
        access: Access | None = None, layers: LayerRange = WHOLE, *, raising: bool = True, **limits: Any
    ) -> Gateway:
        settings = Settings()
        settings = replace(settings, gateway=replace(settings.gateway, **limits))
        script = Script()
        state = GatewayState.of(ScriptedClient(settings, script, layers), settings, access or Access())
        transport = httpx.ASGITransport(create_app(state), raise_app_exceptions=raising)
        gateway = Gateway(httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1"), script, state)
        made.append(gateway)
        return gateway

    yield build
    for gateway in made:
        await gateway.http.aclose()
        assert gateway.script.open == 0, "a session was left open"
        assert gateway.state.generations.gate.taken == 0, "a place was not given back"


@pytest.fixture
def gateway(make: Make) -> Gateway:
    return make()


def expected(prompt: list[int], count: int, **options: Any) -> list[int]:
    tokens = list(prompt)
    params = SamplingParams(**options)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(tokens, len(prompt), params, PROFILE.vocab_size).token_id)
    return tokens[len(prompt) :]


def text_of(prompt: str, count: int, **options: Any) -> str:
    return TOKENIZER.decode(expected(TOKENIZER.encode(prompt), count, **options))


# ---- models -------------------------------------------------------------------------------------------------


async def test_models(gateway: Gateway) -> None:
    listed = (await gateway.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [(m["id"], m["object"], m["owned_by"]) for m in listed["data"]] == [(MODEL, "model", "swarm")]
    assert (await gateway.http.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
    assert (await gateway.http.get(f"/v1/models/{PROFILE.model_id}")).status_code == 200
    missing = await gateway.http.get("/v1/models/gpt-5")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_which_of_the_models_of_a_name_is_served_is_told(gateway: Gateway) -> None:
    (model,) = (await gateway.http.get("/v1/models")).json()["data"]
    assert (model["identity"], model["precision"]) == (PROFILE.model_id, PROFILE.precision)
    other = await gateway.http.get(f"/v1/models/{MODEL}@1234567890abcdef")
    assert f"'{MODEL}' ({PROFILE.model_id}, {PROFILE.precision})" in other.json()["error"]["message"]


# ---- completions --------------------------------------------------------------------------------------------


async def test_a_completion_has_every_field_of_openais(gateway: Gateway) -> None:
    answer = await gateway.completion(prompt="Once upon")
    ids = TOKENIZER.encode("Once upon")
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("cmpl-")
    assert isinstance(answer["created"], int)
    [choice] = answer["choices"]
    assert choice == {"text": text_of("Once upon", 8), "index": 0, "logprobs": None, "finish_reason": "length"}
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(ids), 8, len(ids) + 8)


async def test_sixteen_tokens_are_the_default_of_completions(gateway: Gateway) -> None:
    assert (await gateway.completion(max_tokens=None))["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("as_ids", [False, True])
async def test_several_prompts_and_several_texts(gateway: Gateway, as_ids: bool) -> None:
    texts = ["Once", "The cat sat"]
    prompt: Any = [TOKENIZER.encode(text) for text in texts] if as_ids else texts
    answer = await gateway.completion(prompt=prompt, n=2, temperature=1, seed=7, max_tokens=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    wanted = [text_of(text, 5, temperature=1.0, seed=seed) for text in texts for seed in (7, 8)]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert len(set(wanted)) == 4
    assert answer["usage"]["completion_tokens"] == 20
    lengths = [len(TOKENIZER.encode(text)) for text in texts]
    assert answer["usage"]["prompt_tokens"] == sum(lengths)
    # each prompt counts once, and what the peers had of it from before
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(length // 2 for length in lengths)


async def test_one_prompt_as_token_ids(gateway: Gateway) -> None:
    ids = TOKENIZER.encode("Once upon")
    assert (await gateway.completion(prompt=ids))["choices"][0]["text"] == text_of("Once upon", 8)


async def test_a_long_conversation_keeps_nobody_waiting(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short its messages are."""
    threads: list[threading.Thread] = []
    works = TextTokenizer.apply_chat_template

    def apply(self: TextTokenizer, *arguments: Any, **options: Any) -> list[int]:
        threads.append(threading.current_thread())
        return works(self, *arguments, **options)

    monkeypatch.setattr(TextTokenizer, "apply_chat_template", apply)
    for messages, here in (([*USER], True), ([{"role": "user", "content": ""}] * 500, False)):
        await gateway.post("/v1/chat/completions", GREEDY | {"messages": messages, "max_tokens": 1})
        assert (threads.pop() is threading.current_thread()) is here


async def test_echo_repeats_the_prompt(gateway: Gateway) -> None:
    whole = "Once upon" + text_of("Once upon", 3)
    assert (await gateway.completion(prompt="Once upon", echo=True, max_tokens=3))["choices"][0]["text"] == whole
    ids = TOKENIZER.encode("Once upon")
    assert (await gateway.completion(prompt=ids, echo=True, max_tokens=3))["choices"][0]["text"] == whole
    nothing = await gateway.completion(prompt="Once upon", echo=True, max_tokens=0)
    assert nothing["choices"][0] == {"text": "Once upon", "index": 0, "logprobs": None, "finish_reason": "length"}
    assert nothing["usage"]["completion_tokens"] == 0
    none = {"prompt": ["Once", "upon", "a"], "echo": True, "max_tokens": 0}
    for fields, n in (({}, 1), ({"best_of": 2}, 1), ({"n": 2}, 2), ({"n": 2, "best_of": 3}, 2)):
        texts = [choice["text"] for choice in (await gateway.completion(**none, **fields))["choices"]]
        assert texts == [text for text in none["prompt"] for _ in range(n)]
        if "best_of" not in fields:
            chunks = await gateway.chunks("/v1/completions", GREEDY | none | fields)
            assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["text"]] == texts
    body = GREEDY | {"prompt": "Once upon", "echo": True, "max_tokens": 3}
    chunks = await gateway.chunks("/v1/completions", body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


async def test_best_of_keeps_the_likeliest(gateway: Gateway) -> None:
    fields = {"temperature": 1.5, "seed": 1, "max_tokens": 4}
    all_of_them = await gateway.completion(n=4, logprobs=0, **fields)

    def likelihood(choice: dict[str, Any]) -> float:
        return sum(choice["logprobs"]["token_logprobs"])

    best = max(all_of_them["choices"], key=likelihood)
    answer = await gateway.completion(best_of=4, **fields)
    assert [choice["text"] for choice in answer["choices"]] == [best["text"]]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 16, "what was thrown away was generated, too"


async def test_stop_texts_end_a_text_and_are_left_out(gateway: Gateway) -> None:
    whole = text_of("Once", 8)
    middle = whole[5:8]
    for stop in (middle, ["\u2603", middle]):
        [choice] = (await gateway.completion(stop=stop))["choices"]
        assert choice["text"] == whole[: whole.index(middle)]
        assert choice["finish_reason"] == "stop"
    chunks = await gateway.chunks("/v1/completions", GREEDY | {"prompt": "Once", "stop": middle})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole[: whole.index(middle)]


async def test_the_end_of_text_ends_it_without_showing(gateway: Gateway) -> None:
    gateway.script.choose = lambda generated: [300, 301, *PROFILE.end_ids][min(len(generated), 2)]
    answer = await gateway.completion(logprobs=1)
    assert answer["choices"][0]["text"] == TOKENIZER.decode([300, 301])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 2


async def test_penalties_bias_and_the_rest_reach_the_sampler(gateway: Gateway) -> None:
    await gateway.completion(
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"300": 5, "301": -100},
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        temperature=0.7,
        seed=-1,
        user="somebody",
        something_new={"a": 1},
    )
    params = gateway.script.requests[0].sampling
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.25)
    assert params.logit_bias == {300: 5.0, 301: -100.0}
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (0.9, 40, 0.05, 1.1)
    assert (params.temperature, params.seed, params.logprobs) == (0.7, 2**64 - 1, 0)
    await gateway.completion(temperature=None, top_p=0, top_k=-1)
    params = gateway.script.requests[1].sampling
    assert (params.temperature, params.top_k) == (1.0, 0)
    assert 0 < params.top_p < 1e-3


async def test_forced_and_forbidden_tokens(gateway: Gateway) -> None:
    forced = await gateway.completion(logit_bias={"321": 100}, max_tokens=3)
    assert forced["choices"][0]["text"] == TOKENIZER.decode([321] * 3)
    first = expected(TOKENIZER.encode("Once"), 1)[0]
    other = await gateway.completion(logit_bias={str(first): -100}, max_tokens=1)
    assert other["choices"][0]["text"] != TOKENIZER.decode([first])


async def test_logprobs_of_completions(gateway: Gateway) -> None:
    [choice] = (await gateway.completion(logprobs=2, max_tokens=3))["choices"]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"]
    assert told["text_offset"] == [0, len(told["tokens"][0]), len(told["tokens"][0] + told["tokens"][1])]
    for token, value, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) == 2
        assert top[token] == value == max(top.values()), "greedy takes the likeliest"
    tokens = TOKENIZER.encode("Once")
    result = next_token(tokens, len(tokens), SamplingParams(logprobs=2), PROFILE.vocab_size)
    assert told["token_logprobs"][0] == pytest.approx(result.logprob, abs=1e-5)
    chunks = await gateway.chunks("/v1/completions", GREEDY | {"prompt": "Once", "logprobs": 2, "max_tokens": 3})
    found = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for part in found for item in part[key]] == told[key]


async def test_a_token_that_is_a_part_of_a_character(gateway: Gateway) -> None:
    smile = TOKENIZER.encode("\u4e9c")  # three bytes, several tokens
    assert len(smile) > 1
    gateway.script.choose = lambda generated: smile[min(len(generated), len(smile) - 1)]
    [choice] = (await gateway.completion(logprobs=0, max_tokens=len(smile)))["choices"]
    assert choice["text"] == "\u4e9c"
    assert all(name.startswith("bytes:\\x") for name in choice["logprobs"]["tokens"])
    chat = await gateway.chat(logprobs=True, max_tokens=len(smile))
    entries = chat["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "\u4e9c"


# ---- chat ---------------------------------------------------------------------------------------------------


async def test_chat_goes_through_the_models_template(gateway: Gateway) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Hello", "name": "Ann"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    response = await gateway.post("/v1/chat/completions", GREEDY | {"messages": messages})
    answer = response.json()
    told = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi."), ("user", "And now?")]
    prompt = TOKENIZER.apply_chat_template([{"role": role, "content": text} for role, text in told])
    assert list(gateway.script.requests[0].prompt) == prompt
    assert answer["object"] == "chat.completion"
    assert response.headers["x-request-id"] in answer["id"]
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == TOKENIZER.decode(expected(prompt, 8))
    assert (choice["finish_reason"], choice["logprobs"], choice["index"]) == ("length", None, 0)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


async def test_chat_streams_role_text_end_and_usage(gateway: Gateway) -> None:
    body = GREEDY | {"messages": [{"role": "user", "content": "Hello"}], "n": 2, "temperature": 1, "seed": 3}
    whole = (await gateway.post("/v1/chat/completions", body)).json()
    chunks = await gateway.chunks("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" in chunk for chunk in chunks)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index in range(2):
        mine = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [m["finish_reason"] for m in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1]["delta"] == {}
        text = "".join(m["delta"].get("content", "") for m in mine)
        assert text == whole["choices"][index]["message"]["content"]
    without = await gateway.chunks("/v1/chat/completions", body)
    assert all("usage" not in chunk for chunk in without)


async def test_logprobs_of_chat(gateway: Gateway) -> None:
    body = GREEDY | {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 3}
    whole = (await gateway.post("/v1/chat/completions", body)).json()["choices"][0]
    entries = whole["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == whole["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in entries)
    chunks = await gateway.chunks("/v1/chat/completions", body)
    streamed = [c["choices"][0]["logprobs"]["content"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [entry for part in streamed for entry in part] == entries
    alone = await gateway.chat(logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in alone["choices"][0]["logprobs"]["content"])


async def test_chat_without_a_limit_gets_the_settings(make: Make) -> None:
    gateway = make(chat_tokens=21)
    await gateway.chat(max_tokens=None)
    await gateway.chat(max_tokens=5, max_completion_tokens=6)
    assert [request.max_tokens for request in gateway.script.requests] == [21, 6]


async def test_a_rebuild_is_not_seen_in_the_stream(gateway: Gateway) -> None:
    body = GREEDY | {"messages": [{"role": "user", "content": "Hello"}], "seed": 1}
    quiet = await gateway.chunks("/v1/chat/completions", body)
    gateway.script.rebuild_at = 4
    broken = await gateway.chunks("/v1/chat/completions", body)
    assert [chunk["choices"] for chunk in broken] == [chunk["choices"] for chunk in quiet]


# ---- wrong requests -----------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "x"}]


MANY = 1000


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionBody, {"prompt": [0.5] * MANY}),
        (CompletionBody, {"prompt": [[0.5] * MANY]}),
        (CompletionBody, {"prompt": "x", "stop": [0] * MANY}),
        (ChatBody, {"messages": [{}] * MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatBody, {"messages": USER, "modalities": [0] * MANY}),
    ],
)
def test_of_many_wrong_items_the_first_one_is_told(kind: type[Body], fields: dict[str, Any]) -> None:
    """All those of a megabyte took seconds and most of a gigabyte, while everybody else waited for their tokens."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": MODEL} | fields)
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        ("completions", {"prompt": None}, "prompt", ""),
        ("completions", {"prompt": ""}, "prompt", "empty"),
        ("completions", {"prompt": []}, "prompt", ""),
        ("completions", {"prompt": [[]]}, "prompt[0]", ""),
        ("completions", {"prompt": [1, "a"]}, "prompt[1]", ""),
        ("completions", {"prompt": [10**8]}, "prompt", "vocabulary"),
        ("completions", {"prompt": {"a": 1}}, "prompt", ""),
        ("completions", {"temperature": 3}, "temperature", "2"),
        ("completions", {"temperature": "1"}, "temperature", "number"),
        ("completions", {"top_p": 1.5}, "top_p", ""),
        ("completions", {"n": 0}, "n", ""),
        ("completions", {"n": True}, "n", ""),
        ("completions", {"n": 17}, "n", "max_choices"),
        ("completions", {"best_of": 2, "n": 3}, "best_of", ""),
        ("completions", {"best_of": 2, "stream": True}, "best_of", ""),
        ("completions", {"max_tokens": -1}, "max_tokens", ""),
        ("completions", {"max_tokens": 10**4300 - 1}, "max_tokens", ""),
        ("chat/completions", {"max_completion_tokens": 10**4300 - 1}, "max_completion_tokens", ""),
        ("completions", {"stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
        ("completions", {"stop": [""]}, "stop[0]", ""),
        ("completions", {"presence_penalty": 2.1}, "presence_penalty", ""),
        ("completions", {"frequency_penalty": -2.1}, "frequency_penalty", ""),
        ("completions", {"logit_bias": {"1": 101}}, "logit_bias.1", "100"),
        ("completions", {"logit_bias": {"cat": 1}}, "logit_bias.cat", ""),
        ("completions", {"logit_bias": {f"cat{i}": 1 for i in range(1025)}}, "logit_bias", "1025 entries"),
        ("completions", {"prompt": [[1]] * 2048 + ["x"]}, "prompt", "2049 prompts; the limit is 2048"),
        ("completions", {"logit_bias": {"99999999": 1}}, "logit_bias", "vocabulary"),
        ("completions", {"logprobs": 6}, "logprobs", ""),
        ("completions", {"logprobs": 1, "echo": True}, "logprobs", "echo"),
        ("completions", {"suffix": "x"}, "suffix", ""),
        ("completions", {"seed": 1.5}, "seed", ""),
        ("completions", {"seed": 2**63}, "seed", ""),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ("completions", {"model": 1}, "model", ""),
        ("chat/completions", {"messages": []}, "messages", ""),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages[0].role", "Missing"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ""),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        ("chat/completions", {"messages": [*USER, {"role": "user", "content": 5}]}, "messages[1].content", ""),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "only text",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "Missing",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
            "",
        ),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ("chat/completions", {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "20"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens", ""),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools", ""),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format", ""),
        ("chat/completions", {"response_format": "text"}, "response_format", "': Input should be an object."),
        ("completions", {"logit_bias": [1]}, "logit_bias", "': Input should be an object."),
        ("chat/completions", {"stop": 5}, "stop", ""),
    ],
)
async def test_what_is_wrong_is_named(
    gateway: Gateway, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    given = {"prompt": "x"} if path == "completions" else {"messages": USER}
    response = await gateway.post(f"/v1/{path}", GREEDY | given | fields)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]
    assert not gateway.script.requests, "nothing was begun"


async def test_missing_fields_are_named(gateway: Gateway) -> None:
    for path, body, param in (
        ("completions", {"model": MODEL}, "prompt"),
        ("chat/completions", {"model": MODEL}, "messages"),
        ("chat/completions", {"messages": USER}, "model"),
    ):
        error = (await gateway.post(f"/v1/{path}", body)).json()["error"]
        assert (error["param"], error["code"]) == (param, "missing_required_parameter")


async def test_an_unknown_model_is_404(gateway: Gateway) -> None:
    response = await gateway.post("/v1/completions", {"model": "gpt-5", "prompt": "x"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert MODEL in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b"1" * 5000, b'{"model":"\\ud800"}'],
)
async def test_what_is_no_request_is_400(gateway: Gateway, data: bytes) -> None:
    response = await gateway.http.post(
        "/v1/completions", content=data, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"prompt": "Once", "model": "\ud800"}, "model"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ],
)
async def test_text_that_is_not_unicode_is_refused(
    gateway: Gateway, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await gateway.http.post(
        f"/v1/{path}", content=json.dumps(GREEDY | fields), headers={"content-type": "application/json"}
    )
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


async def test_only_json_is_taken(gateway: Gateway) -> None:
    """A page of another site can make a browser send a form or plain text here, but not JSON without asking."""
    response = await gateway.http.post("/v1/completions", content=json.dumps(GREEDY | {"prompt": "x"}))
    assert response.status_code == 415


async def test_a_foreign_host_name_is_refused(gateway: Gateway) -> None:
    response = await gateway.http.get("/v1/models", headers={"host": "evil.example"})
    assert response.status_code == 403
    assert (await gateway.http.get("/v1/models", headers={"host": "localhost:8000"})).status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/static/console.css"]
)
async def test_head_is_answered_as_get_is(gateway: Gateway, path: str) -> None:
    got, head = await gateway.http.get(path), await gateway.http.head(path)
    assert head.status_code == got.status_code < 400
    assert head.headers["content-type"] == got.headers["content-type"]


async def test_head_begins_no_feed_and_changes_nothing(gateway: Gateway) -> None:
    for path in ("/live/swarm", "/v1/completions", "/peers/start"):
        assert (await gateway.http.head(path)).status_code == 405


PAGE = {"origin": "https://chat.example"}
PREFLIGHT = PAGE | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


async def test_pages_of_other_sites_are_allowed_nothing_by_themselves(gateway: Gateway) -> None:
    for asked in (
        gateway.http.options("/v1/completions", headers=PREFLIGHT),
        gateway.http.get("/v1/models", headers=PAGE),
    ):
        assert not [name for name in (await asked).headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [("https://chat.example", "http://localhost:3000"), ("*",)])
async def test_pages_of_chosen_sites_may_use_openais_routes_and_no_others(make: Make, origins: tuple[str, ...]) -> None:
    http = make(Access(api_key="s3cret"), cors_origins=origins).http
    asked = await http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, "authorization")
    for answer in (asked, await http.get("/v1/models", headers=PAGE), await http.get("/v1/none", headers=PAGE)):
        assert answer.headers["access-control-allow-origin"] in (PAGE["origin"], "*")
    assert "retry-after" in answer.headers["access-control-expose-headers"]
    for path in ("/api/token", "/api/status", "/", "/health"):
        answers = await http.get(path, headers=PAGE), await http.options(path, headers=PREFLIGHT)
        assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]
    stranger = await http.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": "https://evil.example"})
    assert stranger.status_code == (200 if origins == ("*",) else 400)


async def test_unknown_paths_and_methods(gateway: Gateway) -> None:
    missing = await gateway.http.post("/v1/embeddings", json={})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, None)
    assert "/v1/embeddings" in missing.json()["error"]["message"]
    wrong = await gateway.http.get("/v1/completions")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["type"] == "invalid_request_error"


# ---- limits -------------------------------------------------------------------------------------------------


async def test_a_key_is_asked_for_first(make: Make) -> None:
    gateway = make(Access(api_key="s3cret"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/api/traces")):
            response = await gateway.http.request(method, path, headers=headers, content=b"not even JSON")
            assert response.status_code == 401
            if path.startswith("/v1"):
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
    good = {"authorization": "Bearer s3cret", "host": "swarm.example"}
    assert (await gateway.http.get("/v1/models", headers=good)).status_code == 200
    assert (await gateway.http.get("/health")).status_code == 200


async def test_a_large_body_is_413(make: Make) -> None:
    gateway = make(max_body_bytes=2000)
    response = await gateway.post("/v1/completions", {"prompt": "x" * 3000})
    assert response.status_code == 413
    assert "2000" in response.json()["error"]["message"]

    async def drops() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    unannounced = await gateway.http.post(
        "/v1/completions", content=drops(), headers={"content-type": "application/json"}
    )
    assert unannounced.status_code == 413


async def test_too_many_tokens_are_400_with_the_limit(gateway: Gateway) -> None:
    limit = min(PROFILE.max_positions, Settings().peer.max_cache_tokens_per_session)
    for path, fields, param in (
        ("completions", {"prompt": [300] * 10, "max_tokens": limit}, "prompt"),
        ("completions", {"prompt": [300] * limit, "max_tokens": 1}, "prompt"),
        ("chat/completions", {"messages": USER, "max_tokens": limit}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "word " * limit}]}, "messages"),
    ):
        response = await gateway.post(f"/v1/{path}", {"model": MODEL} | fields)
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["code"], error["param"]) == ("context_length_exceeded", param)
        assert str(limit) in error["message"]


async def test_a_full_queue_is_429_and_a_place_serves_the_next(make: Make) -> None:
    gateway = make(max_concurrent=2, max_queue=1)
    gateway.script.hold = asyncio.Event()
    body = GREEDY | {"prompt": "Once"}
    running = [asyncio.create_task(gateway.post("/v1/completions", body)) for _ in range(3)]
    gate = gateway.state.generations.gate
    await until(lambda: gate.waiting == 1)
    refused = await gateway.post("/v1/completions", body)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "max_queue" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    gateway.script.hold.set()
    assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 3
    assert gateway.script.most_open == 2


@pytest.mark.parametrize(
    ("path", "body"), [("completions", {"prompt": ["x"] * 1000}), ("chat/completions", {"messages": USER, "n": 17})]
)
async def test_texts_are_counted_before_any_is_tokenised(
    gateway: Gateway, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte of short prompts held up everybody's tokens for seconds."""
    for name in ("encode", "apply_chat_template"):
        monkeypatch.delattr(TextTokenizer, name)
    response = await gateway.post(f"/v1/{path}", GREEDY | body)
    assert response.status_code == 400
    assert "max_choices" in response.json()["error"]["message"]


async def test_waiting_too_long_is_429(make: Make) -> None:
    gateway = make(max_concurrent=1, queue_wait_s=0.05)
    gateway.script.hold = asyncio.Event()
    first = asyncio.create_task(gateway.post("/v1/completions", GREEDY | {"prompt": "Once"}))
    await until(lambda: gateway.script.open == 1)
    refused = await gateway.post("/v1/completions", GREEDY | {"prompt": "Once", "stream": True})
    assert refused.status_code == 429
    assert "queue_wait_s" in refused.json()["error"]["message"]
    gateway.script.hold.set()
    assert (await first).status_code == 200


async def test_the_limit_of_texts_is_named_by_the_setting_that_sets_it(make: Make) -> None:
    for limits, name in (
        ({"max_concurrent": 2}, "gateway.max_concurrent"),
        ({"max_choices": 2}, "gateway.max_choices"),
    ):
        response = await make(**limits).post("/v1/completions", GREEDY | {"prompt": "Once", "n": 3})
        assert response.status_code == 400
        assert f"the limit is 2 ({name})" in response.json()["error"]["message"]


async def test_missing_layers_are_503(make: Make) -> None:
    gateway = make(layers=LayerRange(0, 20))
    response = await gateway.post("/v1/chat/completions", GREEDY | {"messages": USER, "stream": True})
    assert response.status_code == 503
    error = response.json()["error"]
    assert "20:30" in error["message"]
    assert error["code"] == "no_route"
    assert "retry-after" in response.headers
    health = await gateway.http.get("/health")
    assert (health.status_code, health.json()["missing"]) == (503, [[20, 30]])
    assert (await gateway.http.head("/health")).status_code == 503, "as some load balancers ask"
    gateway.state.client.view.layers = WHOLE  # type: ignore[attr-defined]
    assert (await gateway.post("/v1/completions", GREEDY | {"prompt": "x"})).status_code == 200
    assert (await gateway.http.get("/health")).status_code == 200


async def test_an_error_before_the_first_token_has_its_status(gateway: Gateway) -> None:
    gateway.script.refuse = NoRoute("nobody serves layers 3:4")
    for stream in (True, False):
        response = await gateway.post("/v1/completions", GREEDY | {"prompt": "x", "stream": stream})
        assert response.status_code == 503
        assert "3:4" in response.json()["error"]["message"]


async def test_an_error_in_the_middle_is_the_last_event(gateway: Gateway) -> None:
    gateway.script.fail_at = 3
    events = await gateway.events("/v1/completions", GREEDY | {"prompt": "x"})
    assert json.loads(events[-1])["error"]["code"] == "no_route"
    assert "[DONE]" not in events
    response = await gateway.post("/v1/completions", GREEDY | {"prompt": "x", "n": 3})
    assert response.status_code == 503


async def test_a_bug_is_500_and_tells_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = make(raising=False)

    def broken(*_: object, **__: object) -> Coverage:
        raise RuntimeError("a secret of the gateway")

    monkeypatch.setattr(gateway.state.generations, "coverage", broken)
    response = await gateway.post("/v1/completions", GREEDY | {"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


# ---- clients that go away, or read slowly ---------------------------------------------------------------------


class Wire:
    """One request to the application, as a server sees it: what the client takes, and when it leaves."""

    def __init__(self, gateway: Gateway, body: dict[str, Any]) -> None:
        self._app = create_app(gateway.state)
        self._data = json.dumps(body).encode()
        self._left = asyncio.Event()
        self.taking = asyncio.Event()
        self.taking.set()
        self.taken: list[bytes] = []
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": headers,
            "http_version": "1.1",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._data:
            data, self._data = self._data, b""
            return {"type": "http.request", "body": data, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.taking.wait()
        self.taken.append(message.get("body", b""))

    def leave(self) -> None:
        self._left.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - of other tasks, which set no event
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_sessions(gateway: Gateway, stream: bool) -> None:
    gateway.script.token_s = 0.01
    wire = Wire(gateway, GREEDY | {"prompt": "Once", "max_tokens": 4000, "n": 3, "stream": stream})
    with gateway.state.hub.watch() as watch:
        await until(lambda: gateway.script.open == 3)
        if stream:
            await until(lambda: len(wire.taken) > 5)
        wire.leave()
        await until(lambda: gateway.script.open == 0 and gateway.state.generations.gate.taken == 0)
        await wire.task
        watch.close()
        ended = [event async for event in watch if isinstance(event, Ended)]
    assert [event.finish_reason for event in ended] == ["cancelled"] * 3


async def test_a_client_that_goes_away_while_it_sends_leaves_no_traceback(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    async with on_a_socket(gateway) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        _, half = await asyncio.open_connection(host, int(port))
        half.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        half.write(b"Content-Type: application/json\r\n\r\n{")
        await asyncio.sleep(0.1)
        half.close()
        await half.wait_closed()
        await asyncio.sleep(0.1)
    assert all(record.exc_info is None for record in caplog.records)


async def test_a_client_that_goes_away_leaves_the_queue(make: Make) -> None:
    gateway = make(max_concurrent=1)
    gateway.script.hold = asyncio.Event()
    first = Wire(gateway, GREEDY | {"prompt": "Once"})
    gate = gateway.state.generations.gate
    await until(lambda: gateway.script.open == 1)
    second, third = (Wire(gateway, GREEDY | {"prompt": "Once"}) for _ in range(2))
    await until(lambda: gate.waiting == 2)
    second.leave()
    await until(lambda: gate.waiting == 1)
    gateway.script.hold.set()
    await asyncio.gather(first.task, second.task, third.task)
    assert b"text_completion" in b"".join(third.taken)


async def test_a_slow_reader_holds_nobody_up(make: Make) -> None:
    gateway = make(max_concurrent=1)
    slow = Wire(gateway, GREEDY | {"prompt": "Once", "max_tokens": 50, "stream": True})
    slow.taking.clear()
    answer = await gateway.completion(prompt="The", max_tokens=5)
    assert answer["choices"][0]["text"] == text_of("The", 5)
    slow.taking.set()
    await slow.task
    assert b"[DONE]" in slow.taken[-2]


async def test_a_reader_that_never_reads_is_given_up(make: Make) -> None:
    gateway = make(max_buffered_tokens=5, slow_reader_s=0.05)
    never = Wire(gateway, GREEDY | {"prompt": "Once", "max_tokens": 4000, "stream": True})
    never.taking.clear()
    async with asyncio.timeout(10):
        await never.task
    assert gateway.script.open == 0
    assert not never.taken


async def test_a_stream_that_waits_sends_comments(make: Make) -> None:
    gateway = make(keep_alive_s=0.02)
    gateway.script.hold = asyncio.Event()
    wire = Wire(gateway, GREEDY | {"prompt": "Once", "stream": True})
    await until(lambda: wire.taken[-2:] == [b": still here\n\n"] * 2)
    gateway.script.hold.set()
    await wire.task
    said = b"".join(wire.taken).decode().replace(": still here\n\n", "").removesuffix("data: [DONE]\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in said.split("\n\n") if event]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of("Once", 8)


async def test_openais_client_passes_over_comments(make: Make) -> None:
    gateway = make(keep_alive_s=0.001)
    gateway.script.token_s = 0.02
    async with on_a_socket(gateway) as url, openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
        stream = await client.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=0, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == text_of("Once", 8)


async def test_answers_end_with_an_error_when_the_gateway_ends(gateway: Gateway) -> None:
    gateway.script.token_s = 0.01
    body = GREEDY | {"prompt": "Once", "max_tokens": 4000}
    streams = [asyncio.create_task(gateway.events("/v1/completions", body)) for _ in range(2)]
    whole = asyncio.create_task(gateway.post("/v1/completions", body))
    await until(lambda: gateway.script.open == 3)
    await asyncio.sleep(0.05)
    gateway.state.end()
    async with asyncio.timeout(2):
        for stream in streams:
            events = await stream
            assert len(events) > 1
            assert json.loads(events[-1])["error"]["code"] == "gateway_ends"
        for answer in (await whole, await gateway.post("/v1/completions", body)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gateway_ends")


async def test_a_request_that_is_cut_off_leaves_no_traceback(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async with on_a_socket(make(finish_s=0.0)) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        _, half = await asyncio.open_connection(host, int(port))
        half.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        half.write(b"Content-Type: application/json\r\n\r\n{")
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.1)
    half.close()
    assert "Cancel 1 running task" in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


@asynccontextmanager
async def on_a_socket(gateway: Gateway) -> AsyncIterator[str]:
    """The application behind a real server and a real connection."""
    ready = asyncio.Event()
    with listen("127.0.0.1", 0) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # as little as a slow reader leaves room for
        server = Server(create_app(gateway.state), gateway.state.settings.gateway, ready.set, gateway.state.end)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await ready.wait()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        server.should_exit = True
        await serving


async def test_a_connection_that_sends_no_request_is_closed(make: Make) -> None:
    """Not one whose request is under way, however long that takes."""
    gateway = make(body_s=0.3)
    gateway.script.hold = asyncio.Event()
    body = json.dumps(GREEDY | {"prompt": "Once"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    async with on_a_socket(gateway) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        made = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        (idle, _), (half, half_to), (whole, whole_to) = made
        half_to.write(head)
        whole_to.write(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(5):
            assert [await idle.read(), await half.read()] == [b"", b""]
            await asyncio.sleep(0.4)
            gateway.script.hold.set()
            assert b"200 OK" in await whole.readline()
            whole_to.write(head)
            assert (await whole.read()).endswith(b"}"), "and again after an answer"
        for _, writer in made:
            writer.close()


async def test_a_body_that_nobody_waits_for_keeps_no_connection_open(make: Make) -> None:
    """However slowly it comes, once the request is answered."""
    async with on_a_socket(make(body_s=0.3)) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        answer, drip = await asyncio.open_connection(host, int(port))
        drip.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n")
        assert b"415" in await answer.readline()
        async with asyncio.timeout(5):
            while not answer.at_eof():
                with contextlib.suppress(ConnectionError):
                    drip.write(b"x")
                    await drip.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(answer.read(1000), 0.1)
        drip.close()


async def test_openais_client_leaves_a_real_connection(gateway: Gateway) -> None:
    gateway.script.token_s = 0.01
    async with on_a_socket(gateway) as url, openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
        stream = await client.completions.create(model=MODEL, prompt="Once", max_tokens=4000, stream=True)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        assert gateway.script.open == 1
        await stream.close()
        await until(lambda: gateway.script.open == 0)
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model=MODEL, prompt="Once", max_tokens=4000, timeout=0.3)
        await until(lambda: gateway.script.open == 0)
        listed = await client.models.list()
        assert [model.id for model in listed.data] == [MODEL]


async def test_fifty_streams_on_real_connections(gateway: Gateway) -> None:
    prompts = [f"Number {number}" for number in range(50)]
    async with on_a_socket(gateway) as url, openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:

        async def one(prompt: str) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        said = await asyncio.gather(*map(one, prompts))
    assert said == [text_of(prompt, 8) for prompt in prompts]


async def test_a_real_reader_that_never_reads_is_given_up(make: Make) -> None:
    gateway = make(slow_reader_s=0.1, max_buffered_tokens=5, finish_s=0.0)
    async with on_a_socket(gateway) as url:
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        body = json.dumps(GREEDY | {"prompt": "Once", "max_tokens": 4000, "stream": True, "logprobs": 5}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        await until(lambda: gateway.script.open == 1)
        await until(lambda: gateway.script.open == 0)
        assert len(gateway.script.requests) == 1
        client.close()


# ---- what the console sees ----------------------------------------------------------------------------------


async def test_the_hub_tells_a_generations_story(gateway: Gateway) -> None:
    gateway.script.rebuild_at = 2
    with gateway.state.hub.watch() as watch:
        answer = await gateway.completion(max_tokens=4)
        watch.close()
        events = [event async for event in watch]
    kinds = [type(event) for event in events]
    assert kinds == [Began, RouteTaken, TokenOut, TokenOut, RouteTaken, TokenOut, TokenOut, Ended]
    name = answer["id"].removeprefix("cmpl-")
    assert {event.generation for event in events} == {name}  # type: ignore[union-attr]
    rebuilt, ended = events[4], events[-1]
    assert isinstance(rebuilt, RouteTaken)
    assert (rebuilt.reason, rebuilt.index) == ("lost a peer", 2)
    assert isinstance(ended, Ended)
    assert (ended.finish_reason, ended.tokens, ended.rebuilds) == ("length", 4, 1)


async def test_a_slow_watcher_loses_the_oldest_and_is_told(make: Make) -> None:
    gateway = make(watch_events=3)
    with gateway.state.hub.watch() as watch:
        await gateway.completion(max_tokens=6)
        watch.close()
        events = [event async for event in watch]
    assert getattr(events[0], "events", None) == 1 + 1 + 6 + 1 - 3
    assert isinstance(events[-1], Ended)


async def test_traces_open_in_chromes_viewer(make: Make) -> None:
    gateway = make(kept_traces=2)
    answers = [await gateway.completion(max_tokens=3) for _ in range(3)]
    listed = (await gateway.http.get("/api/traces")).json()["traces"]
    names = [answer["id"].removeprefix("cmpl-") for answer in answers]
    assert listed == [names[2], names[1]]
    forgotten = await gateway.http.get(f"/api/traces/{names[0]}")
    assert (forgotten.status_code, forgotten.json()["error"]["code"]) == (404, "no_trace")
    assert "/api/traces names those that are kept" in forgotten.json()["error"]["message"]
    trace = (await gateway.http.get(f"/api/traces/{answers[2]['id']}")).json()
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [bar["name"] for bar in bars if bar["tid"] == 0] == ["prompt and first token", "token 1", "token 2"]
    assert [bar["name"] for bar in bars if bar["tid"] == 1] == ["queue", "compute", "link"] * 3
    assert all({"ts", "dur", "pid", "tid", "args"} <= set(bar) for bar in bars)
    plain = (await gateway.http.get(f"/api/traces/{names[2]}?format=swarm")).json()
    assert len(plain["tokens"]) == 3


# ---- metrics ------------------------------------------------------------------------------------------------


async def scraped(gateway: Gateway) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = await gateway.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("swarm_") and family.documentation for family in families)
    return {
        (item.name, tuple(sorted(item.labels.items()))): item.value for family in families for item in family.samples
    }


async def test_metrics_are_what_happened(gateway: Gateway) -> None:
    gateway.script.rebuild_at = 2
    answer = await gateway.completion(max_tokens=4)
    gateway.script.rebuild_at, gateway.script.fail_at = None, 1
    await gateway.post("/v1/completions", GREEDY | {"prompt": "x"})
    await gateway.post("/v1/completions", {"prompt": "x"})
    found = await scraped(gateway)

    def value(name: str, **labels: str) -> float:
        return found[f"swarm_{name}", tuple(sorted(labels.items()))]

    route = "/v1/completions"
    assert [value("gateway_answers_total", route=route, status=s) for s in ("200", "503", "400")] == [1, 1, 1]
    assert value("gateway_generations_total", source="completions", finish_reason="length") == 1
    assert value("gateway_generations_total", source="completions", finish_reason="error") == 1
    assert value("gateway_tokens_total", kind="completion") == 5
    assert value("gateway_tokens_total", kind="prompt") == answer["usage"]["prompt_tokens"] + 1
    assert value("gateway_rebuilds_total", cause="peer_lost") == 1
    assert value("gateway_rebuild_seconds_count") == 1
    assert value("gateway_first_token_seconds_count") == 2
    assert value("gateway_token_gap_seconds_count") == 3
    assert value("gateway_hop_seconds_count", part="compute") == 5
    assert value("gateway_hop_seconds_sum", part="compute") == pytest.approx(5 * 0.002)
    assert value("gateway_hop_batch_sessions_sum") == 5 * 3
    assert value("gateway_running_generations") == value("gateway_waiting_requests") == 0
    assert value("view_peers") == 1
    assert value("view_missing_layers") == value("view_age_seconds") == 0


async def test_a_stopped_scrape_leaves_the_metrics_server_alone() -> None:
    registry = CollectorRegistry()
    Gauge("swarm_test", "A number", registry=registry).set(3)
    async with MetricsServer(registry, "127.0.0.1", 0) as server, httpx.AsyncClient() as http:
        url = f"http://127.0.0.1:{server.port}"
        _, half = await asyncio.open_connection("127.0.0.1", server.port)
        half.write(b"GET /met")
        [family] = text_string_to_metric_families((await http.get(f"{url}/metrics")).text)
        assert [(item.name, item.value) for item in family.samples] == [("swarm_test", 3.0)]
        assert (await http.get(f"{url}/other")).status_code == 404
        assert (await http.post(f"{url}/metrics", content=b"x")).status_code == 404
        half.close()
        with pytest.raises(PortInUse):
            await MetricsServer(registry, "127.0.0.1", server.port).__aenter__()


def test_an_address_that_cannot_be_listened_on_is_told_once() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as told:
            listen("127.0.0.1", port)
    assert str(told.value) == f"can't listen on 127.0.0.1 port {port}: Address already in use"
    with pytest.raises(BadRequest, match=r"can't listen on 203\.0\.113\.1 port 0: Cannot assign requested address$"):
        listen("203.0.113.1", 0)


def test_json_logs_are_one_object_a_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("swarm.x", logging.WARNING, "", 1, "it %s\n!", ("broke",), sys.exc_info())
    record.fields = {"tokens": 7}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["level"], told["logger"], told["message"]) == ("warning", "swarm.x", "it broke\n!")
    assert told["tokens"] == 7
    assert "ValueError" in told["exception"]
