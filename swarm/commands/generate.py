"""``swarm generate``: one prompt, one answer."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.commands.options import (
    KV,
    AsJson,
    ConfigFile,
    InitialPeers,
    MaxTokens,
    MinP,
    Model,
    RepetitionPenalty,
    Seed,
    Speculation,
    Stop,
    Temperature,
    TopK,
    TopP,
    Verbose,
    Wire,
)
from swarm.commands.shared import print_json, run, say
from swarm.config import Settings
from swarm.config_rules import listed
from swarm.terminal import shared_line
from swarm.types import Route

if TYPE_CHECKING:
    from swarm.client import Generation

SILENT_S = 10.0
"""With ``--json``, silence that is so long gets a line: whoever reads them need not take us for dead."""


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")],
    initial_peers: InitialPeers = None,
    via: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddr of a peer that runs the generation for us; several with commas, or repeated."),
    ] = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    kv_cache: Annotated[
        bool, typer.Option("--kv-cache/--no-kv-cache", help="Off: compute the whole prefix each step.")
    ] = True,
    speculation: Speculation = None,
    wire: Wire = None,
    kv: KV = None,
    trace: Annotated[Path | None, typer.Option(help="Write each hop's times there, for swarm why.")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Generate from PROMPT; the text streams to stdout, the route to stderr."""
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "kv_cache": None if kv_cache else False,
    }
    text = sys.stdin.read() if prompt == "-" else prompt

    async def work(settings: Settings) -> None:
        await _generate(text, options, chat, settings, model, listed(via or ()), trace, as_json)

    flags = {"speculation": speculation, "wire": wire, "kv": kv}
    run(work, initial_peers, config, as_json=as_json, verbose=verbose, flags=flags)


async def _generate(
    text: str,
    options: dict[str, Any],
    chat: bool,
    settings: Settings,
    model: str | None,
    via: Sequence[str],
    trace: Path | None,
    as_json: bool,
) -> None:
    say("joining the swarm")
    from swarm.client import AsyncClient
    from swarm.session import RouteChanged
    from swarm.trace_file import check_place, keep_trace, write_trace

    if trace is not None:
        check_place(trace)
    async with AsyncClient(list(settings.network.initial_peers), model, settings, via) as client:
        prompt = client.chat_prompt([{"role": "user", "content": text}]) if chat else text
        stream, begun = client.events(prompt, **options), False
        try:
            async with telling_of_silence(as_json) as heard, contextlib.aclosing(aiter(stream)) as events:
                async for event in events:
                    heard()
                    if isinstance(event, RouteChanged):
                        show_route(event.epoch, event.route, event.reason, as_json)
                    elif as_json:
                        token = {"event": "token", "index": event.index, "token_id": event.token_id, "text": event.text}
                        print_json(token)
                    else:
                        shared_line.write(event.text)
                        begun = True
        finally:
            if begun and stream.result is None:
                shared_line.end()  # what is said of the end gets a line of its own
        if stream.result is not None:
            _show_result(stream.result, stream.request.max_tokens, as_json)
            keep_trace(stream.result.trace)
            if trace is not None:
                write_trace(trace, stream.result.trace)


@contextlib.asynccontextmanager
async def telling_of_silence(as_json: bool) -> AsyncIterator[Callable[[], None]]:
    """With ``as_json``, a line for each ``SILENT_S`` in which what this gives was not called."""
    loop = asyncio.get_running_loop()
    heard_at = loop.time()
    timer: asyncio.TimerHandle

    def tell() -> None:
        nonlocal timer
        with contextlib.suppress(BrokenPipeError):  # whoever prints next is told
            print_json({"event": "waiting", "silent_s": round(loop.time() - heard_at, 1)})
        timer = loop.call_later(SILENT_S, tell)

    def heard() -> None:
        nonlocal heard_at, timer
        timer.cancel()
        heard_at, timer = loop.time(), loop.call_later(SILENT_S, tell)

    if not as_json:
        yield lambda: None
        return
    timer = loop.call_later(SILENT_S, tell)
    try:
        yield heard
    finally:
        timer.cancel()


def _show_result(result: Generation, max_tokens: int, as_json: bool) -> None:
    timings = result.timings
    if as_json:
        print_json(
            {
                "event": "done",
                "text": result.text,
                "token_ids": result.token_ids,
                "prompt_tokens": result.prompt_tokens,
                "finish_reason": result.finish_reason,
                "ttft_s": round(timings.ttft_s, 4),
                "tokens_per_second": round(timings.tokens_per_second, 3),
                "rebuilds": len(result.rebuilds),
                "longest_gap_s": round(timings.longest_gap_s, 4),
            }
        )
        return
    shared_line.end()
    rebuilds = f"{len(result.rebuilds)} rebuild{'' if len(result.rebuilds) == 1 else 's'}"
    cut = what_cut(result, max_tokens)
    say(
        f"{len(result.token_ids)} tokens, first after {timings.ttft_s:.2f} s, "
        f"{timings.tokens_per_second:.1f} a second, {rebuilds}{f'; {cut}' if cut else ''}"
    )


def what_cut(result: Generation, max_tokens: int) -> str:
    """Why the text ends where it does, if it did not end by itself."""
    if result.finish_reason != "length":
        return ""
    limit = "--max-tokens" if len(result.token_ids) >= max_tokens else "of a session, below --max-tokens"
    return f"cut at the limit of tokens ({limit})"


def show_route(epoch: int, route: Route, reason: str, as_json: bool) -> None:
    if as_json:
        hops = [{"peer_id": h.peer.peer_id, "layers": [h.layers.start, h.layers.end]} for h in route.hops]
        print_json({"event": "route", "epoch": epoch, "hops": hops, "reason": reason})
    else:
        say(f"route {route}" + ("" if reason == "opened" else f" ({reason})"))
