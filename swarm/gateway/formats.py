"""The shapes of OpenAI's answers, whole and in chunks, for completions and for chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from swarm.gateway.choices import Text
from swarm.gateway.hub import Source
from swarm.gateway.planning import Asked
from swarm.models import ModelProfile
from swarm.tokenizer import TextTokenizer
from swarm.types import Token

Chunk = dict[str, Any]


class Format(Protocol):
    """One request's answer."""

    @property
    def source(self) -> Source: ...

    def whole(self, texts: Sequence[Text], tokens: int, reused: int) -> Chunk:
        """``tokens``: all that were generated, those of texts left out, too."""

    def opening(self, index: int) -> list[Chunk]:
        """What comes before a text's first token, once it has a route."""

    def token(self, index: int, token: Token) -> list[Chunk]: ...

    def closing(self, index: int, finish_reason: str) -> Chunk: ...

    def usage_chunk(self, tokens: int, reused: int) -> Chunk: ...


class _Common:
    def __init__(self, asked: Asked, profile: ModelProfile, tokenizer: TextTokenizer, alternatives: int | None) -> None:
        """``alternatives``: likeliest tokens to show with each token's log-probability; None: show no such thing."""
        self._asked = asked
        self._profile = profile
        self._tokenizer = tokenizer
        self._alternatives = alternatives

    def _head(self, prefix: str, kind: str) -> Chunk:
        return {
            "id": f"{prefix}-{self._asked.name}",
            "object": kind,
            "created": self._asked.created,
            "model": self._profile.name,
            "system_fingerprint": f"fp_{self._profile.model_id.rpartition('@')[2]}",
        }

    def _usage(self, tokens: int, reused: int) -> Chunk:
        prompt = self._asked.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": reused, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def _shown(self, token: Token) -> bool:
        """Whether it has a place among the log-probabilities: one that ends the text is no part of it."""
        return token.logprob is not None and token.token_id not in self._profile.end_ids

    def _top(self, token: Token) -> Sequence[tuple[int, float]]:
        return token.top_logprobs[: self._alternatives or 0]


class ChatFormat(_Common):
    source: Source = "chat"

    def whole(self, texts: Sequence[Text], tokens: int, reused: int) -> Chunk:
        choices: list[Chunk] = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text.text, "refusal": None, "annotations": []},
                "logprobs": self._logprobs(text.tokens),
                "finish_reason": text.finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return self._head("chatcmpl", "chat.completion") | {"choices": choices, "usage": self._usage(tokens, reused)}

    def opening(self, index: int) -> list[Chunk]:
        return [self._chunk(index, {"role": "assistant", "content": "", "refusal": None})]

    def token(self, index: int, token: Token) -> list[Chunk]:
        logprobs = self._logprobs([token])
        if not token.text and not (logprobs and logprobs["content"]):
            return []
        return [self._chunk(index, {"content": token.text}, logprobs=logprobs)]

    def closing(self, index: int, finish_reason: str) -> Chunk:
        return self._chunk(index, {}, finish_reason=finish_reason)

    def usage_chunk(self, tokens: int, reused: int) -> Chunk:
        return self._head("chatcmpl", "chat.completion.chunk") | {"choices": [], "usage": self._usage(tokens, reused)}

    def _chunk(
        self, index: int, delta: Chunk, *, logprobs: Chunk | None = None, finish_reason: str | None = None
    ) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._head("chatcmpl", "chat.completion.chunk") | {"choices": [choice]}

    def _logprobs(self, tokens: Sequence[Token]) -> Chunk | None:
        if self._alternatives is None:
            return None
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(token_id, value) for token_id, value in self._top(token)]}
            for token in tokens
            if self._shown(token)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> Chunk:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class CompletionFormat(_Common):
    source: Source = "completions"

    def __init__(
        self,
        asked: Asked,
        profile: ModelProfile,
        tokenizer: TextTokenizer,
        alternatives: int | None,
        *,
        echo: bool,
    ) -> None:
        super().__init__(asked, profile, tokenizer, alternatives)
        self._echo = echo
        self._offsets: dict[int, int] = {}
        """Characters of each text that were streamed already."""

    def whole(self, texts: Sequence[Text], tokens: int, reused: int) -> Chunk:
        choices = [
            self._choice(index, self._echoed(index) + text.text, self._logprobs(text.tokens, 0), text.finish_reason)
            for index, text in enumerate(texts)
        ]
        return self._head("cmpl", "text_completion") | {"choices": choices, "usage": self._usage(tokens, reused)}

    def opening(self, index: int) -> list[Chunk]:
        return [self._chunk(index, self._echoed(index))]

    def token(self, index: int, token: Token) -> list[Chunk]:
        logprobs = self._logprobs([token], self._offsets.get(index, 0))
        self._offsets[index] = self._offsets.get(index, 0) + len(self._name(token.token_id))
        if not token.text and not (logprobs and logprobs["tokens"]):
            return []
        return [self._chunk(index, token.text, logprobs)]

    def closing(self, index: int, finish_reason: str) -> Chunk:
        return self._chunk(index, "", finish_reason=finish_reason)

    def usage_chunk(self, tokens: int, reused: int) -> Chunk:
        return self._head("cmpl", "text_completion") | {"choices": [], "usage": self._usage(tokens, reused)}

    def _echoed(self, index: int) -> str:
        return self._asked.texts[index // self._asked.n] if self._echo else ""

    def _chunk(self, index: int, text: str, logprobs: Chunk | None = None, finish_reason: str | None = None) -> Chunk:
        choice = self._choice(index, text, logprobs, finish_reason)
        return self._head("cmpl", "text_completion") | {"choices": [choice]}

    @staticmethod
    def _choice(index: int, text: str, logprobs: Chunk | None, finish_reason: str | None) -> Chunk:
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Chunk | None:
        if self._alternatives is None:
            return None
        found: Chunk = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            if self._shown(token):
                name = self._name(token.token_id)
                found["tokens"].append(name)
                found["token_logprobs"].append(token.logprob)
                top = {self._name(token_id): value for token_id, value in self._top(token)}
                found["top_logprobs"].append(({name: token.logprob} | top) if top else top)  # the chosen one always
                found["text_offset"].append(offset)
                offset += len(name)
        return found

    def _name(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:  # a part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
