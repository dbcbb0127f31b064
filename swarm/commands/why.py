"""``swarm why``: where the time of the last generation went."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from swarm.commands.options import AsJson, ConfigFile, InitialPeers, Verbose
from swarm.commands.shared import failing_well, print_json, run, say
from swarm.commands.tables import table
from swarm.config import Settings
from swarm.trace import Why, explain
from swarm.trace_file import export_trace, last_trace, read_trace
from swarm.what_if import Alternative, alternatives


def why(
    trace: Annotated[Path | None, typer.Option(help="Of a generation: generate --trace FILE wrote it.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the generation there, for ui.perfetto.dev or chrome://tracing.")
    ] = None,
    initial_peers: InitialPeers = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Where each millisecond of the last generation on this machine went, beside what was predicted.

    With --initial-peers, or SWARM_INITIAL_PEERS, also what it would change to lose or to double a peer of its route.
    """
    with failing_well(as_json):
        told = last_trace() if trace is None else read_trace(trace)
        if export is not None:
            export_trace(export, told)
        found = explain(told)
    options: list[Alternative] = []

    async def ask(settings: Settings) -> None:
        if not settings.network.initial_peers:
            return
        if not as_json:
            say("looking at the swarm")
        from swarm.client import AsyncClient

        async with AsyncClient(list(settings.network.initial_peers), told.model, settings) as client:
            announcements, demand = await client.peers(), client.demand(told.prompt_tokens, len(told.tokens))
            knowledge = client.knowledge()
            options.extend(alternatives(announcements, told.route, client.profile.num_layers, demand, knowledge))

    async def work(settings: Settings) -> None:
        if not as_json:  # before anybody is asked: the swarm may be gone
            print("\n".join(rendered(found)), flush=True)
        try:
            await ask(settings)
        finally:  # ... and then it is an error, which comes last
            if as_json:
                hops = [asdict(share) | {"layers": [share.layers.start, share.layers.end]} for share in found.hops]
                others = [asdict(option) for option in options]
                print_json({"event": "why", **asdict(found), "hops": hops, "alternatives": others})
            else:
                print("".join(f"{sentence(option)}\n" for option in options), end="")

    run(work, initial_peers, config, as_json=as_json, verbose=verbose)


def sentence(option: Alternative) -> str:
    if option.change == "gone":
        return f"{option.peer_id[-6:]} is not in this swarm any more"
    change = "without" if option.change == "without" else "with a copy of"
    if option.decode_s is None:
        return f"{change} {option.peer_id[-6:]}: no route: {option.note}"
    return f"{change} {option.peer_id[-6:]}: {1e3 * option.decode_s:.1f} ms a token are predicted"


def rendered(found: Why) -> list[str]:
    def pair(measured: float, predicted: float | None) -> str:
        return f"{1e3 * measured:.1f}" + (f" ({1e3 * predicted:.1f})" if predicted is not None else "")

    rows = [
        (
            str(number),
            share.peer_id[-6:],
            str(share.layers),
            pair(share.queue_s, share.predicted.queue_s if share.predicted else None),
            pair(share.compute_s, share.predicted.compute_s if share.predicted else None),
            pair(share.link_s, share.predicted_link_s),
            f"{share.batch:.0f}",
        )
        for number, share in enumerate(found.hops)
    ]
    right = ("hop", "queue ms", "compute ms", "link ms", "batch")
    head = ("hop", "peer", "layers", "queue ms", "compute ms", "link ms", "batch")
    lines = table(head, rows, right=right)
    predicted = f"; predicted {1e3 * found.predicted_s:.1f} ms" if found.predicted_s is not None else ""
    return [
        *lines,
        "",
        f"measured {1e3 * found.measured_s:.1f} ms a token{predicted} (predictions in brackets)",
        f"{pair(found.elsewhere_s, found.predicted_elsewhere_s)} ms are neither queue, nor layers, nor measured links: "
        "wire and waiting",
        f"most of it: {found.dominant}",
    ]
