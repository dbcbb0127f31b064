"""What may be in a request, as OpenAI's API has it. Unknown fields are ignored: its clients send many.

``top_k``, ``min_p`` and ``repetition_penalty`` are not OpenAI's; other servers take them, and clients send them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from swarm.config import MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY
from swarm.sampling import MAX_BIAS, MAX_BIASES, MAX_LOGPROBS, MAX_PENALTY
from swarm.transcript import MAX_TOKENS

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_N = 128
MAX_TEMPERATURE = 2.0
MAX_COMPLETION_LOGPROBS = 5
MAX_PROMPTS = 2048
"""However many texts ``gateway.max_choices`` allows."""
COMPLETION_TOKENS = 16
"""What ``/v1/completions`` gives to who names no limit."""

Penalty = Annotated[float | None, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Some = Field(min_length=1, fail_fast=True)
"""Of lists: the first bad item is told. An error for each of half a million would hold up everybody for seconds."""
Count = Annotated[int | None, Field(ge=1, le=MAX_N)]


def _few_biases(bias: object) -> object:
    """Before each is looked at: pydantic does that first, and words an error for each."""
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise _too_many(len(bias), "entries", MAX_BIASES)
    return bias


def _few_prompts(prompt: object) -> object:
    """Before each is looked at, unless it is one, of token ids."""
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        raise _too_many(len(prompt), "prompts", MAX_PROMPTS)
    return prompt


def _too_many(count: int, things: str, limit: int) -> PydanticCustomError:
    return PydanticCustomError("too_long", f"{count} {things}; the limit is {limit}")


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Body):
    include_usage: bool | None = None


class GenerationBody(Body):
    """What chat and completions have in common."""

    model: str
    frequency_penalty: Penalty = None
    logit_bias: Annotated[
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
            Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)],
        ]
        | None,
        BeforeValidator(_few_biases),
    ] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Count = None
    presence_penalty: Penalty = None
    repetition_penalty: Annotated[float | None, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=MAX_TEMPERATURE)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Some]


class CompletionBody(GenerationBody):
    best_of: Count = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] = None
    max_tokens: Annotated[int | None, Field(ge=0, le=MAX_TOKENS)] = None
    prompt: Annotated[
        str | TokenIds | Annotated[list[str], Some] | Annotated[list[TokenIds], Some], BeforeValidator(_few_prompts)
    ]
    suffix: str | None = None


class Part(Body):
    """Of a message; only text can be answered."""

    type: str
    text: str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Some]


class ResponseFormat(Body):
    type: str


class ChatBody(GenerationBody):
    functions: list[Any] | None = None
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    messages: Annotated[list[Message], Some]
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
