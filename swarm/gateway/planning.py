"""What a checked body asks for, as generation requests; every limit is looked at here, before any work."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from swarm.client import AsyncClient
from swarm.config import Settings
from swarm.errors import BadRequest, UnknownModel
from swarm.gateway.bodies import COMPLETION_TOKENS, ChatBody, CompletionBody, GenerationBody, Message
from swarm.gateway.failures import BadField, TooManyTokens
from swarm.transcript import GenerationRequest

LEAST_TOP_P = 1e-6
"""OpenAI's API allows 0, which means the same: only the likeliest token."""
LONG_TEXT_CHARS = 8192
"""Tokenised on another thread, so that nobody else's tokens wait for it."""
MESSAGE_CHARS = 32
"""What a template adds to a message, about: many empty ones are a long text, too."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request asks for."""

    prompts: list[list[int]]
    texts: list[str]
    """What ``echo`` repeats, one for each prompt."""
    requests: list[GenerationRequest]
    """One for each text: all of the first prompt, then all of the second ..."""
    stops: Sequence[str]
    n: int
    """Texts of each prompt in the answer."""
    name: str = field(default_factory=lambda: secrets.token_hex(16))
    """Of the answer; its generations are called the same, with the number of the text after the first."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    def generation(self, index: int) -> str:
        return f"{self.name}-{index}" if index else self.name


async def plan_completion(body: CompletionBody, client: AsyncClient, settings: Settings) -> Asked:
    """Raises :class:`BadRequest`, :class:`UnknownModel` or :class:`TooLong`."""
    check_model(body.model, client)
    if body.suffix:
        raise BadField("suffix is not supported: the model does not fill in", "suffix", "unsupported_parameter")
    if body.echo and body.logprobs is not None:
        raise BadField("logprobs of an echoed prompt are not supported", "logprobs", "unsupported_parameter")
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise BadField(f"best_of ({best_of}) must not be smaller than n ({n})", "best_of")
    if body.stream and best_of > n:
        raise BadField("best_of can't be streamed", "best_of")
    each = _each_prompt(body.prompt)
    _check_choices(len(each) * best_of, "best_of" if body.best_of else "n" if n > 1 else "prompt", settings)
    prompts = await _prompts(each, client)
    texts = [prompt for prompt in each if isinstance(prompt, str)]
    if body.echo and not texts:
        texts = [client.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts]
    max_tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    logprobs = 0 if body.logprobs is None and best_of == n else max(1, body.logprobs or 0)
    for ids in prompts:
        _check_length(len(ids), max_tokens, "prompt", client, settings)
    requests = _requests(body, prompts, best_of, max_tokens, logprobs, client) if max_tokens else []
    return Asked(prompts, texts, requests, body.stops, n)


async def plan_chat(body: ChatBody, client: AsyncClient, settings: Settings) -> Asked:
    """Raises :class:`BadRequest`, :class:`UnknownModel` or :class:`TooLong`."""
    check_model(body.model, client)
    _check_chat_fields(body)
    n = body.n or 1
    _check_choices(n, "n", settings)
    messages = [{"role": _role(m), "content": _content(m, place)} for place, m in enumerate(body.messages)]
    try:
        if sum(MESSAGE_CHARS + len(m["content"]) for m in messages) > LONG_TEXT_CHARS:
            ids = await asyncio.to_thread(client.chat_prompt, messages)
        else:
            ids = client.chat_prompt(messages)
    except BadRequest as error:
        raise BadField(error.message, "messages") from None
    asked = body.max_completion_tokens or body.max_tokens
    room = _limit(client, settings) - len(ids)
    max_tokens = asked or max(1, min(settings.gateway.chat_tokens, room))
    logprobs = max(1, body.top_logprobs or 0) if body.logprobs else 0
    _check_length(len(ids), max_tokens, "messages", client, settings)
    return Asked([ids], [], _requests(body, [ids], n, max_tokens, logprobs, client), body.stops, n)


def check_model(name: str, client: AsyncClient) -> None:
    """Raises :class:`UnknownModel`."""
    profile = client.profile
    if name not in (profile.name, profile.model_id):
        served = f"'{profile.name}' ({profile.model_id}, {profile.precision})"
        raise UnknownModel(f"The model {name[:200]!r} does not exist; this gateway serves {served}.")


def _check_chat_fields(body: ChatBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options is only allowed when stream is true", "stream_options")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadField("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    unsupported = {
        "tools": bool(body.tools),
        "functions": bool(body.functions),
        "response_format": body.response_format is not None and body.response_format.type != "text",
        "modalities": body.modalities not in (None, ["text"]),
    }
    for param, is_there in unsupported.items():
        if is_there:
            raise BadField(f"{param} is not supported: this swarm answers with text", param, "unsupported_parameter")


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _content(message: Message, place: int) -> str:
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        where = f"messages[{place}].content[{number}]"
        if part.type != "text":
            raise BadField(f"parts of type {part.type[:40]!r} are not supported, only text", f"{where}.type")
        if part.text is None:
            raise BadField(
                f"Missing required parameter: '{where}.text'.", f"{where}.text", "missing_required_parameter"
            )
    return "".join(part.text or "" for part in message.content)


def _each_prompt(
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
) -> Sequence[str | Sequence[int]]:
    """Each prompt, in the four forms that they may have."""
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    return cast(Sequence[str | Sequence[int]], [prompt] if alone else prompt)


async def _prompts(each: Sequence[str | Sequence[int]], client: AsyncClient) -> list[list[int]]:
    """Token ids of each."""
    found: list[list[int]] = []
    for item in each:
        if isinstance(item, str):
            long = len(item) > LONG_TEXT_CHARS
            try:
                ids = await asyncio.to_thread(client.tokenizer.encode, item) if long else client.tokenizer.encode(item)
            except BadRequest as error:
                raise BadField(error.message, "prompt") from None
        else:
            ids = list(item)
        if not ids:
            raise BadField("the prompt is empty", "prompt")
        if max(ids) >= client.profile.vocab_size:
            raise BadField(f"token {max(ids)} is not in the vocabulary of {client.profile.vocab_size}", "prompt")
        found.append(ids)
    return found


def _limit(client: AsyncClient, settings: Settings) -> int:
    return min(client.profile.max_positions, settings.peer.max_cache_tokens_per_session)


def _check_length(prompt: int, max_tokens: int, param: str, client: AsyncClient, settings: Settings) -> None:
    limit = _limit(client, settings)
    if prompt + max(1, max_tokens) > limit:
        raise TooManyTokens(
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt + max_tokens} "
            f"tokens ({prompt} in the {param}, {max_tokens} in the completion).",
            param,
        )


def _check_choices(count: int, param: str, settings: Settings) -> None:
    gateway = settings.gateway
    limits = ((gateway.max_choices, "gateway.max_choices"), (gateway.max_concurrent, "gateway.max_concurrent"))
    limit, name = min(limits)
    if count > limit:
        raise BadField(f"{count} texts in one request; the limit is {limit} ({name})", param)


def _requests(
    body: GenerationBody, prompts: Sequence[list[int]], n: int, max_tokens: int, logprobs: int, client: AsyncClient
) -> list[GenerationRequest]:
    """The same seed gives the same texts: the first of ``n`` is the one that ``n = 1`` gives, the others differ."""
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    for token_id in bias:
        if token_id >= client.profile.vocab_size:
            raise BadField(f"token {token_id} is not in the vocabulary of {client.profile.vocab_size}", "logit_bias")
    return [
        client.request(
            ids,
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else max(body.top_p, LEAST_TOP_P),
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=bias,
            logprobs=logprobs,
            seed=None if body.seed is None else (body.seed + number) % 2**64,
        )
        for ids in prompts
        for number in range(n)
    ]
