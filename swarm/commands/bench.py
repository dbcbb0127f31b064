"""``swarm bench``: how fast swarms on this machine are, beside ``transformers``, and what they take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.commands.options import AsJson, ConfigFile, Dtype, ModelReference, Verbose, Weights
from swarm.commands.shared import (
    check_length,
    ending_on_sigterm,
    failing_well,
    prepare,
    print_json,
    run_async,
    say,
)
from swarm.commands.tables import table
from swarm.config import Settings
from swarm.config_rules import listed
from swarm.errors import BadRequest
from swarm.trace_file import check_place, write_text

if TYPE_CHECKING:
    from swarm.bench.openai import OpenAIServer
    from swarm.bench.reference import Reference
    from swarm.bench.sections import Figure, Scale
    from swarm.local import LocalSwarm

SECTIONS = ("speed", "memory", "prefill", "wire", "mixed", "sessions", "kv-cache", "speculation")
"""In this order: many sessions would count for the memory of some and not of others."""
BY_DEFAULT = tuple(name for name in SECTIONS if name != "wire")
"""Without ``--only``; on fast links it makes no difference how hidden states travel."""
COMPARED = {"speed", "memory", "prefill"}
"""Sections in which all contenders take part; in the others it is the largest swarm alone."""
MAX_LINK_MS = 10_000
"""Nobody waits longer for a peer to answer."""
CONTENDERS = ("transformers", "one", "three")


def bench(
    initial_peers: Annotated[
        list[str] | None,
        typer.Option(help="Measure this swarm, and start none; repeatable. Or SWARM_INITIAL_PEERS."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: {', '.join(SECTIONS)}; repeatable.")] = None,
    contenders: Annotated[
        list[str] | None, typer.Option(help=f"Who takes part: {','.join(CONTENDERS)}; repeatable.")
    ] = None,
    model: ModelReference = None,
    dtype: Dtype = None,
    weights: Weights = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Contenders take turns so often; medians count. 5, or 2 if quick.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=4, help="To generate in each run. 48, or 16 if quick.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt. 64, or 32 if quick.")] = None,
    link_ms: Annotated[
        float,
        typer.Option(min=0, max=MAX_LINK_MS, help="Make every link of our peers this slow, one way, through a proxy."),
    ] = 0.0,
    link_mbps: Annotated[float, typer.Option(min=0, help="... and no faster than this; 0: as fast as it is.")] = 0.0,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server to compare with, such as http://127.0.0.1:8080/v1.")
    ] = None,
    url_model: Annotated[str | None, typer.Option(help="Its model; otherwise the first that it names.")] = None,
    url_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="Sent to --url as a bearer token."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figures there as a picture: FILE.svg.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two short rounds: only to see that it works.")] = False,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure one peer, three peers and transformers, one thread each, or a swarm that is running."""
    flags: dict[str, object] = {"initial_peers": initial_peers, "model": model, "dtype": dtype, "weights": weights}
    settings = prepare(config, flags, as_json=as_json, verbose=verbose)
    with failing_well(as_json), ending_on_sigterm():
        sections = chosen(only or BY_DEFAULT, SECTIONS, "section")
        taking_part = chosen(contenders or CONTENDERS, CONTENDERS, "contender")
        if not sections:
            raise BadRequest(f"--only names no section; there are: {', '.join(SECTIONS)}")
        running = bool(initial_peers) or (not contenders and bool(settings.network.initial_peers))
        if running:
            if contenders:
                raise BadRequest("--contenders are started here, and --initial-peers run already: name one of the two")
            if link_ms or link_mbps:
                raise BadRequest("links of peers that run already can't be slowed; without --initial-peers, ours are")
            taking_part, sections = [], [name for name in sections if name != "memory"]
            if not sections:
                raise BadRequest("memory is measured of peers that are started here, not of --initial-peers")
        elif not {"one", "three"} & set(taking_part):
            raise BadRequest("no swarm takes part; --contenders names one, three or both, too")
        if plot is not None:
            check_picture(plot)
        from swarm.bench.sections import Scale

        scale = Scale(rounds or 5, tokens or 48, prompt or 64)
        if quick:
            scale = Scale(rounds or 2, tokens or 16, prompt or 32, prefill=64, mixed=200, sessions=(1, 8))
        check_length(scale.prompt, scale.tokens, settings)
        server = None
        if url is not None:
            from swarm.bench.openai import OpenAIServer

            server = OpenAIServer(url, url_key or "")
        around = _Around(link_ms / 1e3, link_mbps * 1e6 / 8, server, url_model)
        figures: list[Figure] = []
        try:
            _measure(settings, sections, taking_part, scale, around, figures)
        finally:  # Ctrl-C, or a contender that fails: what was measured until then took minutes
            _show(figures, as_json)
        if plot is not None:
            from swarm.bench.plot import svg

            write_text(plot, svg(figures))
            say(f"the picture is in {plot}")


def check_picture(file: Path) -> None:
    """Before minutes of measuring; raises :class:`BadRequest`."""
    if file.suffix.lower() not in ("", ".svg"):
        raise BadRequest(f"the picture is SVG, not {file.suffix}: name it {file.with_suffix('.svg').name}")
    check_place(file)


def _show(figures: Sequence[Figure], as_json: bool) -> None:
    if as_json:
        for figure in figures:
            print_json({"event": "figure", **asdict(figure), "value": round(figure.value, 3)})
    elif figures:
        print("\n".join(rendered(figures)))


def chosen(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """``names`` in the order of ``known``; raises :class:`BadRequest`."""
    wanted = listed(names)
    for name in wanted:
        if name not in known:
            raise BadRequest(f"{name!r} is no {what}; there are: {', '.join(known)}")
    return [name for name in known if name in wanted]


def rendered(figures: Sequence[Figure]) -> list[str]:
    rows = [
        (
            figure.section if index == 0 or figures[index - 1].section != figure.section else "",
            figure.name,
            f"{figure.value:.0f}" if figure.unit in ("", "MiB") else f"{figure.value:.2f}",
            figure.unit,
        )
        for index, figure in enumerate(figures)
    ]
    return table(("section", "what", "figure", ""), rows, right=("figure",))


@dataclass(frozen=True, slots=True)
class _Around:
    """What the swarm has around it: its links, and a server to compare it with."""

    link_s: float
    """One way; 0: as it is."""
    bytes_per_s: float
    server: OpenAIServer | None
    url_model: str | None

    @property
    def slowed(self) -> bool:
        return bool(self.link_s or self.bytes_per_s)


def _slow_peers(stack: contextlib.ExitStack, peers: int, around: _Around) -> dict[int, list[str]]:
    """Arguments of each peer, by which it is reached through a proxy."""
    from swarm.bench.delay_proxy import DelayProxy

    proxies = [DelayProxy.for_new_peer(delay_s=around.link_s, bytes_per_s=around.bytes_per_s) for _ in range(peers)]
    return {number: stack.enter_context(proxy).peer_args for number, proxy in enumerate(proxies)}


def _measure(
    settings: Settings,
    sections: Sequence[str],
    contenders: Sequence[str],
    scale: Scale,
    around: _Around,
    figures: list[Figure],
) -> None:
    """Starts what takes part, before there is an event loop: Ctrl-C is heard at once, and stops all of it."""
    from swarm.bench.reference import Reference
    from swarm.bench.sections import ONE, THREE
    from swarm.local import LocalSwarm, even_ranges
    from swarm.models import config_dict, resolve

    server_model = around.url_model
    if around.server is not None and server_model is None:
        server_model = run_async(around.server.first_model())  # a wrong URL is told before the peers start
    with contextlib.ExitStack() as stack:
        swarms: dict[str, LocalSwarm] = {}
        reference: Reference | None = None
        name, dtype = settings.model.name, settings.model.dtype
        num_layers = int(config_dict(resolve(name, dtype))["num_hidden_layers"]) if contenders else 0
        if "transformers" in contenders and set(sections) & COMPARED:
            reference = stack.enter_context(Reference(name, dtype))
            say(f"transformers loads {name}")
            reference.ready()
        for contender, title, parts in (("one", ONE, 1), ("three", THREE, 3)):
            if contender in contenders and (contender == contenders[-1] or set(sections) & COMPARED):
                say(f"starting {title}")
                args = _slow_peers(stack, parts, around) if around.slowed else None
                local = LocalSwarm(
                    name,
                    even_ranges(num_layers, parts),
                    dtype=dtype,
                    weights=settings.model.weights,
                    threads=1,
                    # Each run computes its whole prompt, as those that it is compared with do.
                    env={
                        "SWARM_PEER_PREFILL_THREADS": "1",
                        "SWARM_PEER_PREFIX_CACHE": "false",
                        "SWARM_NETWORK_UNIX_SOCKETS": str(settings.network.unix_sockets),
                    },
                    args_of=args,
                    report=say,
                )
                swarms[title] = stack.enter_context(local)

        async def work() -> None:
            try:
                await _sections(settings, sections, scale, swarms, reference, around, server_model, figures)
            finally:
                stack.close()  # ends a thread that waits for one of them, for which the loop would wait

        run_async(work())


async def _sections(
    settings: Settings,
    sections: Sequence[str],
    scale: Scale,
    swarms: Mapping[str, LocalSwarm],
    reference: Reference | None,
    around: _Around,
    server_model: str | None,
    figures: list[Figure],
) -> None:
    """Each section's figures are there as soon as it is done."""
    from swarm.bench import sections as measure
    from swarm.bench.drafts import speculation
    from swarm.bench.openai import OpenAIContender
    from swarm.bench.prompts import mixed, prefill, wires
    from swarm.client import AsyncClient
    from swarm.sample_text import sample_prompt

    report: Callable[[str], None] = say
    async with contextlib.AsyncExitStack() as stack:
        contenders: dict[str, measure.Contender] = {}
        if reference is not None:
            contenders[measure.TRANSFORMERS] = measure.ReferenceContender(reference)
        addresses = {name: swarm.initial_peers for name, swarm in swarms.items()}
        if not swarms:
            addresses[measure.GIVEN] = list(settings.network.initial_peers)
        pids = {name: [peer.pid for peer in swarm.peers] for name, swarm in swarms.items()}
        on_swarm: dict[str, measure.SwarmContender] = {}
        for name, initial_peers in addresses.items():
            client = await stack.enter_async_context(AsyncClient(initial_peers, None, settings))
            contenders[name] = on_swarm[name] = measure.SwarmContender(client, pids.get(name, []))
        most = list(on_swarm.values())[-1]
        if around.server is not None and server_model is not None:
            contenders[measure.SERVER] = OpenAIContender(around.server, server_model, most.client.tokenizer.decode)
        prompt = sample_prompt(most.client.tokenizer, scale.prompt)
        if "speed" in sections:
            figures += await measure.speed(contenders, prompt, scale, report, around.link_s)
        if "memory" in sections:
            if "speed" not in sections:  # something must have run, the same on all
                for contender in contenders.values():
                    await contender.generate(prompt, scale.tokens)
            figures += await measure.memory(swarms, reference)
        if "prefill" in sections:
            prompt_of = functools.partial(sample_prompt, most.client.tokenizer, scale.prefill)
            figures += await prefill(contenders, prompt_of, scale, report)
        if "wire" in sections:
            figures += await wires(most, scale, report)
        if "mixed" in sections:
            figures += await mixed(most, scale, report)
        if "sessions" in sections:
            figures += await measure.sessions(most, scale, report)
        if "kv-cache" in sections:
            figures += await measure.kv_cache(most, prompt, scale, report)
        if "speculation" in sections:
            figures += await speculation(most, scale, report)
