"""``swarm bench``: how fast swarms on this machine are, beside ``transformers``, and what they take."""

from __future__ import annotations

import contextlib
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
from swarm.trace_file import check_place

if TYPE_CHECKING:
    from swarm.bench.reference import Reference
    from swarm.bench.sections import Figure, Scale
    from swarm.local import LocalSwarm

SECTIONS = ("speed", "memory", "prefill", "wire", "mixed", "sessions", "kv-cache", "speculation")
"""In this order: many sessions would count for the memory of some and not of others."""
BY_DEFAULT = tuple(name for name in SECTIONS if name != "wire")
"""Without ``--only``; on fast links it makes no difference how hidden states travel."""
COMPARED = {"speed", "memory", "prefill"}
"""Sections in which all contenders take part; in the others it is the largest swarm alone."""
CONTENDERS = ("transformers", "one", "three")


def bench(
    initial_peers: Annotated[
        list[str] | None, typer.Option(help="Measure this swarm, and start none; repeatable.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Sections: {', '.join(SECTIONS)}; repeatable.")] = None,
    contenders: Annotated[
        list[str] | None, typer.Option(help=f"Who takes part: {','.join(CONTENDERS)}; repeatable.")
    ] = None,
    model: ModelReference = None,
    dtype: Dtype = None,
    weights: Weights = None,
    rounds: Annotated[int, typer.Option(min=1, help="Contenders take turns so often; medians count.")] = 5,
    tokens: Annotated[int, typer.Option(min=4, help="To generate in each run.")] = 48,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    link_ms: Annotated[
        float, typer.Option(min=0, help="Make every link of our peers this slow, one way, through a proxy.")
    ] = 0.0,
    link_mbps: Annotated[float, typer.Option(min=0, help="... and no faster than this; 0: as fast as it is.")] = 0.0,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server to compare with, such as http://127.0.0.1:8080/v1.")
    ] = None,
    url_model: Annotated[str | None, typer.Option(help="Its model; otherwise the first that it names.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the figures there as a picture, in SVG.")] = None,
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
        if not settings.network.initial_peers and not {"one", "three"} & set(taking_part):
            raise BadRequest("no swarm takes part; --contenders names one, three or both, too")
        if initial_peers:
            sections, taking_part = [name for name in sections if name != "memory"], []
        check_length(prompt, tokens, settings)
        if plot is not None:
            check_place(plot)
        from swarm.bench.openai import model_at
        from swarm.bench.sections import Scale

        if url is not None:
            url_model = model_at(url, url_model)
        scale = Scale(rounds, tokens, prompt)
        if quick:
            scale = Scale(2, 16, min(prompt, 32), prefill=64, mixed=200, sessions=(1, 8))
        around = _Around(link_ms / 1e3, link_mbps * 1e6 / 8, url, url_model)
        figures = _measure(settings, sections, taking_part, scale, around)
        if plot is not None:
            from swarm.bench.plot import svg

            plot.write_text(svg(figures), encoding="utf-8")
            say(f"the picture is in {plot}")
        if as_json:
            for figure in figures:
                print_json({"event": "figure", **asdict(figure), "value": round(figure.value, 3)})
        else:
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
    url: str | None
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
    settings: Settings, sections: Sequence[str], contenders: Sequence[str], scale: Scale, around: _Around
) -> list[Figure]:
    """Starts what takes part, before there is an event loop: Ctrl-C is heard at once, and stops all of it."""
    from swarm.bench.reference import Reference
    from swarm.bench.sections import ONE, THREE
    from swarm.local import LocalSwarm, even_ranges
    from swarm.models import config_dict, resolve

    figures: list[Figure] = []
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
                figures.extend(await _sections(settings, sections, scale, swarms, reference, around))
            finally:
                stack.close()  # ends a thread that waits for one of them, for which the loop would wait

        run_async(work())
    return figures


async def _sections(
    settings: Settings,
    sections: Sequence[str],
    scale: Scale,
    swarms: Mapping[str, LocalSwarm],
    reference: Reference | None,
    around: _Around,
) -> list[Figure]:
    from swarm.bench import sections as measure
    from swarm.bench.drafts import speculation
    from swarm.bench.openai import OpenAIContender
    from swarm.bench.prompts import mixed, prefill, wires
    from swarm.client import AsyncClient
    from swarm.sample_text import sample_prompt

    report: Callable[[str], None] = say
    figures: list[Figure] = []
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
        if around.url is not None and around.url_model is not None:
            decode = most.client.tokenizer.decode
            contenders[measure.SERVER] = OpenAIContender(around.url, around.url_model, decode)
        prompt = sample_prompt(most.client.tokenizer, scale.prompt)
        if "speed" in sections:
            figures += await measure.speed(contenders, prompt, scale, report, around.link_s)
        if "memory" in sections:
            if "speed" not in sections:  # something must have run, the same on all
                for contender in contenders.values():
                    await contender.generate(prompt, scale.tokens)
            figures += await measure.memory(swarms, reference)
        if "prefill" in sections:
            figures += await prefill(contenders, sample_prompt(most.client.tokenizer, scale.prefill), scale, report)
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
    return figures
