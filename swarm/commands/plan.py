"""``swarm plan``: the route that a session would take, and what it is reckoned to cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from swarm.commands.options import AsJson, ConfigFile, InitialPeers, Model, Verbose
from swarm.commands.shared import print_json, run, say
from swarm.commands.tables import table
from swarm.config import Settings
from swarm.coverage import explained, served
from swarm.errors import NoRoute
from swarm.types import LayerRange, PeerId

if TYPE_CHECKING:
    from swarm.routing import Plan

MOST_LEFT_OUT = 8
RUNNERS_UP = 3


def plan(
    initial_peers: InitialPeers = None,
    model: Model = None,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Length of the prompt.")] = 100,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to generate at most.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Plan without this peer: its id, or the end of it; repeatable.")
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(
            help="Plan with one more peer: its layers START:END, then, if wanted, @LINKms one way to everybody and "
            "/LAYERms a token and layer, as in 10:20@5ms/1.5ms; repeatable."
        ),
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Plan a route and open nothing. Exit code 3 if some layers are served by nobody."""

    async def work(settings: Settings) -> None:
        if not as_json:
            say("looking at the swarm")
        from swarm.client import AsyncClient
        from swarm.routing import plan as find_plan
        from swarm.what_if import add_peer, named

        async with AsyncClient(list(settings.network.initial_peers), model, settings) as client:
            announcements = await client.peers()
            profile, knowledge = client.profile, client.knowledge()
            demand = client.demand(prompt_tokens, max_tokens or settings.inference.max_tokens)
            excluded = {named(announcements, name) for name in exclude or ()}
            announcements = [a for a in announcements if a.peer.peer_id not in excluded]
            for spec in add or ():
                announcements, knowledge = add_peer(announcements, knowledge, spec, profile.num_layers)
            try:
                whole = LayerRange(0, profile.num_layers)
                found = find_plan(announcements, whole, demand, knowledge, runners_up=RUNNERS_UP)
            except NoRoute as error:
                if as_json:
                    missing = served(announcements, profile, knowledge.check).missing
                    print_json({"event": "plan", "hops": [], "missing": [[gap.start, gap.end] for gap in missing]})
                raise explained(error, announcements, profile, knowledge.check) from None
            if as_json:
                print_json(as_event(found))
            else:
                print("\n".join(rendered(found, prompt_tokens)))

    run(work, initial_peers, config, as_json=as_json, verbose=verbose)


def rendered(found: Plan, prompt_tokens: int) -> list[str]:
    rows = [
        (
            str(number),
            short(planned.hop.peer.peer_id),
            str(planned.hop.layers),
            f"{1e3 * planned.link_s:.1f} ms",
            f"{1e3 * planned.queue_s:.1f} ms",
            f"{1e3 * planned.compute_s:.1f} ms",
        )
        for number, planned in enumerate(found.hops)
    ]
    lines = table(
        ("hop", "peer", "layers", "link", "queue", "compute"), rows, right=("hop", "link", "queue", "compute")
    )
    lines += [
        "",
        f"predicted: {1e3 * found.decode_s:.1f} ms a token ({1 / found.decode_s:.1f} tokens a second), "
        f"the first one after {found.prefill_s:.2f} s with a prompt of {prompt_tokens}",
    ]
    for other in found.runners_up:
        hops = " > ".join(f"{short(one.hop.peer.peer_id)}[{one.hop.layers}]" for one in other.hops)
        lines.append(f"next best: {1e3 * other.decode_s:.1f} ms a token: {hops}")
    lines += [f"left out: {short(peer)}: {reason}" for peer, reason in found.left_out[:MOST_LEFT_OUT]]
    more = len(found.left_out) - MOST_LEFT_OUT
    return [*lines, f"left out: {more} more"] if more > 0 else lines


def short(peer: PeerId) -> str:
    """The end of an id; whole, for a peer that was only added here."""
    return peer if peer.startswith("added ") else peer[-6:]


def as_event(found: Plan) -> dict[str, Any]:
    return {
        "event": "plan",
        "hops": [
            {
                "peer_id": planned.hop.peer.peer_id,
                "layers": [planned.hop.layers.start, planned.hop.layers.end],
                "link_ms": round(1e3 * planned.link_s, 3),
                "queue_ms": round(1e3 * planned.queue_s, 3),
                "compute_ms": round(1e3 * planned.compute_s, 3),
            }
            for planned in found.hops
        ],
        "ms_per_token": round(1e3 * found.decode_s, 3),
        "first_token_ms": round(1e3 * found.prefill_s, 3),
        "missing": [],
        "runners_up": [
            {
                "hops": [
                    {"peer_id": one.hop.peer.peer_id, "layers": [one.hop.layers.start, one.hop.layers.end]}
                    for one in other.hops
                ],
                "ms_per_token": round(1e3 * other.decode_s, 3),
                "first_token_ms": round(1e3 * other.prefill_s, 3),
            }
            for other in found.runners_up
        ],
        "left_out": [{"peer_id": peer, "reason": reason} for peer, reason in found.left_out],
    }
