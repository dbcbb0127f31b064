"""``swarm chat``: a conversation. Answers go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.commands.generate import show_route, what_cut
from swarm.commands.options import (
    KV,
    ConfigFile,
    InitialPeers,
    MaxTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    Speculation,
    Temperature,
    TopK,
    TopP,
    Verbose,
    Wire,
)
from swarm.commands.shared import failing_well, prepare, say
from swarm.errors import SwarmError, TooLong
from swarm.terminal import shared_line
from swarm.trace_file import keep_trace

if TYPE_CHECKING:
    from swarm.blocking_client import Client
    from swarm.generation import Generation
    from swarm.session import RouteChanged
    from swarm.types import Token

ANSWER_TOKENS = 512
"""An answer may be longer than what ``generate`` gives by default: it usually ends by itself."""
LEAST_ANSWER_TOKENS = 64
"""The oldest messages are forgotten when less than this is left for an answer."""

Messages = list[dict[str, str]]


def chat(
    initial_peers: InitialPeers = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="How the model should behave.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    speculation: Speculation = None,
    wire: Wire = None,
    kv: KV = None,
    config: ConfigFile = None,
    verbose: Verbose = False,
) -> None:
    """Talk to the model, one line a message. Ctrl-C stops an answer; at the prompt it leaves, as Ctrl-D does."""
    flags: dict[str, object] = {"initial_peers": initial_peers, "speculation": speculation, "wire": wire, "kv": kv}
    settings = prepare(config, flags, as_json=False, verbose=verbose)
    options: dict[str, Any] = {
        "max_tokens": ANSWER_TOKENS if max_tokens is None else max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with failing_well(as_json=False):
        say("joining the swarm")
        from swarm.blocking_client import connect

        with connect(list(settings.network.initial_peers), model, settings) as client:
            limit = min(client.profile.max_positions, settings.peer.max_cache_tokens_per_session)
            beginning = [{"role": "system", "content": system}] if system else []
            converse(client, options, beginning, limit)


def converse(client: Client, options: dict[str, Any], beginning: Messages, limit: int) -> None:
    messages = list(beginning)
    client.request([0], **options)  # what is wrong with these is told now, and not after each message
    if sys.stdin.isatty():
        say(f"talking to {client.profile.name}; Ctrl-C stops an answer, Ctrl-D leaves, /new forgets what was said")
    for line in _lines():
        if line == "/new":
            messages = list(beginning)
            say("forgotten")
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages, prompt = fitting(messages, len(beginning), client, limit)
            answer = _answer(client, prompt, options)
        except SwarmError as error:
            if not sys.stdin.isatty():
                raise
            say(error.message)
            messages.pop()
            continue
        if answer is None:
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """What the user says, without empty lines."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
        return
    import readline  # noqa: F401  # gives input() its editing and history

    prompt = "> " if sys.stdout.isatty() else ""  # elsewhere input() would write it among the answers
    while True:
        if not prompt:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        if line:
            yield line


def fitting(messages: Messages, keep: int, client: Client, limit: int) -> tuple[Messages, list[int]]:
    """The messages without the oldest exchanges, as far as need be, and the prompt that they make.

    The first ``keep`` (the system's) stay. Raises :class:`TooLong` if the last message alone is too much.
    """
    messages, dropped = list(messages), 0
    while True:
        prompt = client.tokenizer.apply_chat_template(messages)
        if len(prompt) + LEAST_ANSWER_TOKENS <= limit:
            if dropped:
                say(f"the conversation is too long: its first {dropped} messages are forgotten")
            return messages, prompt
        if len(messages) < keep + 3:  # no whole exchange is left
            raise TooLong(f"this message has {len(prompt)} tokens; the limit is {limit - LEAST_ANSWER_TOKENS}")
        del messages[keep : keep + 2]
        dropped += 2


def _answer(client: Client, prompt: list[int], options: dict[str, Any]) -> str | None:
    """What was said until the end, or until Ctrl-C; None if that was nothing."""
    said: list[str] = []
    try:
        result = _follow(client.events(prompt, **options), said)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        if said:
            shared_line.end(echoed=True)
        else:
            print(file=sys.stderr)
        say("stopped")
        return "".join(said) if said else None
    except SwarmError:
        if said:
            shared_line.end()  # what is said of it gets a line of its own
        raise
    shared_line.end()
    if result is not None:
        keep_trace(result.trace)
        if cut := what_cut(result, options["max_tokens"]):
            say(cut)
    return "".join(said)


def _follow(events: Generator[RouteChanged | Token, None, Generation | None], said: list[str]) -> Generation | None:
    from swarm.session import RouteChanged

    while True:
        try:
            event = next(events)
        except StopIteration as ended:
            result: Generation | None = ended.value
            return result
        if isinstance(event, RouteChanged):
            if event.reason != "opened":
                show_route(event.epoch, event.route, event.reason, as_json=False)
            continue
        said.append(event.text)
        shared_line.write(event.text)
